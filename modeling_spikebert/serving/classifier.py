"""A text classifier in a folder of `spikebert export --format onnx`, run by ONNX Runtime."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..runtime.session import open_graph

PREFERRED = ("model_int8.onnx", "model.onnx")  # in the order in which they are looked for
INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
LONGEST = 512  # tokens, where neither the tokenizer nor the model names a limit
MAKE_ONE = "`spikebert export MODEL --format onnx --output-dir DIR` writes such a folder"

Text = str | tuple[str, str]  # one text, or a pair


class InputError(ValueError):
    """A text that the model cannot take.

    Args:
        index: which one of the texts, from 0.
        reason: what is wrong with it and what to do.
        too_long: whether its length is what is wrong.
    """

    def __init__(self, index: int, reason: str, too_long: bool = False) -> None:
        super().__init__(f"inputs[{index}] {reason}")
        self.too_long = too_long


@dataclass
class Tokens:
    """A text as the graph takes it: two lists of the same length."""

    ids: list[int]
    type_ids: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class OnnxClassifier:
    """Texts to logits and scores.

    Args:
        folder: has `config.json`, `tokenizer.json`, `tokenizer_config.json` and `onnx/`.
        file: name of the graph in `onnx/`; by default the int8 one, if it is there.
        threads: threads of ONNX Runtime for one batch; by default one for each core.
        max_length: longest text in tokens, special ones counted; by default what tokenizer and model take.

    Raises:
        OSError: the folder or one of its files is missing.
        ValueError: a file is damaged, they do not belong together, or `max_length` exceeds what the model takes.
    """

    def __init__(
        self, folder: Path, file: str | None = None, threads: int | None = None, max_length: int | None = None
    ) -> None:
        if not folder.is_dir():
            raise OSError(f"{folder}: no such folder; {MAKE_ONE}.")
        config = _read_json(folder / "config.json")
        self.path = _graph_file(folder, file)
        self.labels = _labels_of(config, folder)
        self.to_scores = _score_function(config, len(self.labels))
        self.max_length = _longest_input(folder, config, max_length)
        self.pad_token_id = int(config.get("pad_token_id") or 0)
        self._tokenizer, self._tokenizing = _tokenizer(folder), Lock()
        # The threads of one batch and the HTTP server share the cores; waiting must not keep them busy.
        self._session = open_graph(self.path, threads or 0, spinning=False)
        self._inputs = {value.name for value in self._session.get_inputs()}
        if not {"input_ids", "attention_mask"} <= self._inputs <= INPUTS:
            raise ValueError(f"{self.path} takes {', '.join(sorted(self._inputs))}, not {', '.join(sorted(INPUTS))}.")
        if "logits" not in {value.name for value in self._session.get_outputs()}:
            raise ValueError(f"{self.path} has no output named logits; {MAKE_ONE}.")
        self._check()

    def encode(self, texts: Sequence[Text], truncate: bool = False) -> list[Tokens]:
        """Tokens of each text, special ones included.

        Args:
            texts: texts or pairs; none is empty.
            truncate: cut what is longer than `max_length`, rather than refuse it.

        Raises:
            InputError: a text is empty, too long or no Unicode, or a pair does not fit the graph.
        """
        for index, text in enumerate(texts):
            for part in (text,) if isinstance(text, str) else text:
                if not part.strip():
                    raise InputError(index, "is empty. Write at least one word.")
                if not _is_unicode(part):  # JSON can spell half a surrogate pair
                    raise InputError(index, "is not valid Unicode: it has half of a surrogate pair.")
        with self._tokenizing:  # whether to truncate is a setting of the tokenizer, not of a call
            if truncate:
                self._tokenizer.enable_truncation(self.max_length)
            else:
                self._tokenizer.no_truncation()
            encodings = self._tokenizer.encode_batch([*texts])
        for index, encoding in enumerate(encodings):
            if len(encoding.ids) > self.max_length:
                reason = f"has {len(encoding.ids)} tokens; at most {self.max_length} are allowed. Shorten it, or pass "
                raise InputError(index, f'{reason}"truncate": true.', too_long=True)
            if "token_type_ids" not in self._inputs and any(encoding.type_ids):
                raise InputError(index, "is a pair, and the graph takes no token_type_ids. Send single texts.")
        return [Tokens(encoding.ids, encoding.type_ids) for encoding in encodings]

    def logits(self, batch: Sequence[Tokens]) -> np.ndarray:
        """Logits of a batch, [B, C] float32."""
        shape = (len(batch), max(map(len, batch)))
        feed = {
            "input_ids": np.full(shape, self.pad_token_id, np.int64),  # [B, L]
            "attention_mask": np.zeros(shape, np.int64),
            "token_type_ids": np.zeros(shape, np.int64),
        }
        for row, tokens in enumerate(batch):
            feed["input_ids"][row, : len(tokens)] = tokens.ids
            feed["attention_mask"][row, : len(tokens)] = 1
            feed["token_type_ids"][row, : len(tokens)] = tokens.type_ids
        return self._session.run(["logits"], {name: feed[name] for name in self._inputs})[0]

    def _check(self) -> None:
        """One run, which also warms up, so that a folder whose files do not belong together is refused at once."""
        try:
            shape = self.logits(self.encode(["a"])).shape
        except Exception as error:  # whatever ONNX Runtime raises
            raise ValueError(f"{self.path} cannot be run: {error}") from error
        if shape != (1, len(self.labels)):
            raise ValueError(
                f"{self.path} gives logits of shape {list(shape)} for one text, but config.json names "
                f"{len(self.labels)} labels. Do they belong together?"
            )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise OSError(f"{file} is missing; {MAKE_ONE}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object.")
    return content


def _graph_file(folder: Path, name: str | None) -> Path:
    there = sorted(path.name for path in (folder / "onnx").glob("*.onnx"))
    found = name if name is not None else next((name for name in PREFERRED if name in there), None)
    if found is None:
        raise OSError(f"{folder / 'onnx'} has neither {' nor '.join(PREFERRED)}; {MAKE_ONE}.")
    if found not in there:
        raise OSError(f"{folder / 'onnx' / found} is missing; --file is one of {', '.join(there) or 'none'}.")
    return folder / "onnx" / found


def _labels_of(config: dict[str, Any], folder: Path) -> list[str]:
    """Names in the order of the logits."""
    names = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # transformers leaves out this default
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))} or not names:
        raise ValueError(f"{folder / 'config.json'}: id2label must name the classes 0, 1, ... of a classifier.")
    return [str(names[str(i)]) for i in range(len(names))]


def _score_function(config: dict[str, Any], num_labels: int) -> Callable[[np.ndarray], np.ndarray]:
    """Logits to scores, both [B, C], by the rule of transformers' text-classification pipeline."""
    problem = config.get("problem_type")
    if problem == "regression":
        return np.asarray
    if problem == "multi_label_classification" or num_labels == 1:
        return lambda logits: 1 / (1 + np.exp(-logits))
    return _softmax


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def _longest_input(folder: Path, config: dict[str, Any], asked: int | None) -> int:
    limits = [
        _read_json(folder / "tokenizer_config.json").get("model_max_length"),
        config.get("max_position_embeddings"),
    ]
    # A tokenizer without a limit says 1e30.
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 1e9]
    longest = min(known, default=LONGEST)
    if asked is not None and known and asked > longest:
        raise ValueError(f"--max-length {asked} exceeds the {longest} tokens that {folder} takes.")
    return asked or longest


def _tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise OSError(f"{file} is missing; {MAKE_ONE}.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises nothing more special
        raise ValueError(f"{file} is not a tokenizer: {error}") from error
    tokenizer.no_padding()
    return tokenizer
