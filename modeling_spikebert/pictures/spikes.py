"""What a model's neurons do while it reads a sentence, and what it answers after each time step.

Shapes: `T` time steps, `B` batch, `L` tokens, `N` neurons, `C` classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from ..energy.counting import eval_mode, model_arguments

MAX_LENGTH = 128  # tokens of a sentence
BATCH_SIZE = 32
JOINTS = ("'", "\N{RIGHT SINGLE QUOTATION MARK}", "-")  # tokenizers cut "it's" and "well-made" here


@dataclass(frozen=True)
class SentenceSpikes:
    """Spikes of one sentence, made by `spikes_of`.

    Args:
        text: the sentence.
        tokens: as the tokenizer names them, special ones (`[CLS]`, `</s>`) among them; `L` of them.
        words: as they stand in the text.
        word_of_token: index of each token's word, None for a special token.
        spikes: of each block, from the first to the last, the name of a layer of neurons to its spikes, bool
            `[T, L, N]`. The names are those of `FIRING_RATE_NAMES`; as published, of the neurons that are there.
        logits: `[T, C]`, class scores after 1, 2, ... `T` time steps; None if the model has no classifier.
        labels: name of each class.
        problem_type: as in the config of the model.
        description: kind and size of the model.
    """

    text: str
    tokens: list[str]
    words: list[str]
    word_of_token: list[int | None]
    spikes: list[dict[str, Tensor]]
    logits: Tensor | None
    labels: list[str]
    problem_type: str | None
    description: str

    @property
    def num_time_steps(self) -> int:
        return len(next(iter(self.spikes[0].values())))

    @property
    def rates(self) -> Tensor:
        """Spikes per neuron and time step, mean over all tokens: `[blocks, layers of neurons]`."""
        return torch.tensor([[spikes.float().mean() for spikes in block.values()] for block in self.spikes])

    @property
    def token_rates(self) -> Tensor:
        """Spikes per neuron and time step of each token, mean over all neurons: `[L]`."""
        return torch.cat([spikes.float() for block in self.spikes for spikes in block.values()], dim=-1).mean((0, 2))

    @property
    def word_rates(self) -> Tensor:
        """The same of each word, mean over its tokens: `[words]`."""
        rates = self.token_rates
        words = torch.tensor([-1 if word is None else word for word in self.word_of_token])  # [L]
        return torch.stack([rates[words == word].mean() for word in range(len(self.words))])

    @property
    def firing_rate(self) -> float:
        """Spikes per neuron and time step, mean over all tokens and neurons."""
        return float(self.token_rates.mean())

    @property
    def scores(self) -> Tensor | None:
        """`[T, C]`: probabilities after 1, 2, ... `T` time steps; in regression the numbers themselves."""
        if self.logits is None or self.problem_type == "regression":
            return self.logits
        return self.logits.sigmoid() if self.problem_type == "multi_label_classification" else self.logits.softmax(-1)

    @property
    def answer(self) -> tuple[str, float] | None:
        """The class with the highest score and that score, after all time steps; None without a classifier."""
        if self.scores is None:
            return None
        score, index = self.scores[-1].max(-1)
        return self.labels[int(index)], float(score)


def spikes_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, num_time_steps: int | None = None
) -> SentenceSpikes:
    """Lets a SpikeBERT read a sentence and keeps every spike; a sentence is cut at 128 tokens.

    Args:
        model: with or without a classifier; its state stays as it is.
        tokenizer: that of the model.
        text: one sentence.
        num_time_steps: `T`; the config's if absent. With early exit, too, all of them are taken.

    Raises:
        ValueError: the model is no SpikeBERT, or there is no word in the text.
    """
    config: Any = model.config
    if config.model_type != "spikebert":
        raise ValueError(f"Spikes need a SpikeBERT, got {type(model).__name__}. Name another folder.")
    encoded = encode(tokenizer, [text], config)
    words, word_of_token = _words(encoded, tokenizer, text)
    if not words:
        raise ValueError(f"There is no word in {text!r}. Write at least one.")
    base: Any = model.base_model
    spikes: list[dict[str, Tensor]] = []
    with ExitStack() as stack:
        for block in base.encoder.layer:
            spikes.append({})
            for name, module in block.named_modules():
                if name.endswith("_neuron") and hasattr(module, "neurons"):
                    hook = _keep(spikes[-1], _signal(name))
                elif getattr(module, "spike_driven", False):  # behind the gates, whose neurons belong to no token
                    hook = _keep_context(spikes[-1])
                else:
                    continue
                stack.callback(module.register_forward_hook(hook).remove)
        logits = logits_per_step(model, encoded, num_time_steps)
    steps = config.num_time_steps if num_time_steps is None else num_time_steps
    return SentenceSpikes(
        text=text,
        tokens=list(tokenizer.convert_ids_to_tokens(encoded["input_ids"][0].tolist())),
        words=words,
        word_of_token=word_of_token,
        spikes=spikes,
        logits=None if logits is None else logits[:, 0],
        labels=[config.id2label[i] for i in sorted(config.id2label)],
        problem_type=config.problem_type,
        description=f"spiking {config.num_hidden_layers} x {config.hidden_size}, T {steps}",
    )


def logits_per_step(
    model: PreTrainedModel, batch: Mapping[str, Any], num_time_steps: int | None = None
) -> Tensor | None:
    """Class scores `[T, B, C]` after 1, 2, ... `T` time steps, from one pass; None if there is no classifier."""
    options = {"num_time_steps": num_time_steps, "output_logits_per_step": True, "return_dict": True}
    with eval_mode(model), torch.no_grad():
        outputs = model(**model_arguments(model, batch), **options)
    return outputs.logits_per_step.float().cpu() if hasattr(model, "scores") else None


@dataclass(frozen=True)
class StepAccuracy:
    """Accuracy with a number of time steps.

    Args:
        num_time_steps: `T`.
        accuracy: fraction of sentences.
        num_sentences: how many were classified.
    """

    num_time_steps: int
    accuracy: float
    num_sentences: int

    @property
    def standard_error(self) -> float:
        """Over sentences, as a fraction."""
        return (self.accuracy * (1 - self.accuracy) / self.num_sentences) ** 0.5


def accuracies_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Iterable[int],
    steps: Sequence[int] = (1, 2, 4, 8),
) -> list[StepAccuracy]:
    """Accuracy with each number of time steps, from one pass with the largest.

    Args:
        model: a SpikeBERT with a classifier.
        tokenizer: that of the model.
        texts: sentences; each is cut at 128 tokens.
        labels: class id of each.
        steps: numbers of time steps.

    Raises:
        ValueError: the model has no classes to choose from.
    """
    config: Any = model.config
    if not hasattr(model, "scores") or config.problem_type not in (None, "single_label_classification"):
        raise ValueError(f"{config.name_or_path or type(model).__name__} does not choose one class of several.")
    predictions = []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = encode(tokenizer, texts[start : start + BATCH_SIZE], config)
        logits = logits_per_step(model, batch, max(steps))
        assert logits is not None
        predictions.append(logits.argmax(-1)[[k - 1 for k in steps]])  # [steps, B]
    right = (torch.cat(predictions, dim=1) == torch.tensor(list(labels))).double().mean(1)
    return [StepAccuracy(k, float(accuracy), len(texts)) for k, accuracy in zip(steps, right, strict=True)]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], config: Any) -> BatchEncoding:
    max_length = min(MAX_LENGTH, config.max_position_embeddings)
    return tokenizer(list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt")


def _keep(spikes: dict[str, Tensor], name: str) -> Any:
    def hook(module: Any, args: Any, output: Tensor) -> None:  # [T, N, D]: of one sentence, the tokens of all
        spikes[name] = (output != 0).cpu()

    return hook


def _keep_context(spikes: dict[str, Tensor]) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        _, (*_, context) = output
        spikes["context"] = (context != 0).cpu()

    return hook


def _signal(name: str) -> str:
    """`attention.query_neuron` as `query`, `mlp.input_neuron` as `mlp_input`: a name of `FIRING_RATE_NAMES`."""
    part, _, neuron = name.removesuffix("_neuron").rpartition(".")
    return f"{part}_{neuron}" if neuron in ("input", "output") else neuron


def _words(encoded: BatchEncoding, tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[str], list[int | None]]:
    """Words as they stand in the text, and the word of each token. Those that JOINTS hold together are one."""
    words: list[str] = []
    word_of_token: list[int | None] = []
    if not encoded.is_fast:  # it does not say where its tokens stand
        ids = encoded["input_ids"][0].tolist()
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
            if i not in special:
                words.append(token)
            word_of_token.append(None if i in special else len(words) - 1)
        return words, word_of_token
    previous: int | None = None
    stop = 0
    for given in encoded.word_ids(0):
        if given is not None and given != previous:
            span = encoded.word_to_chars(0, given)
            start = span.end - len(text[span.start : span.end].lstrip())  # some take the space along
            word = text[start : span.end]
            if words and start == stop and (words[-1][-1:] in JOINTS or word[:1] in JOINTS):
                words[-1] += word
            else:
                words.append(word)
            previous, stop = given, span.end
        word_of_token.append(None if given is None else len(words) - 1)
    return words, word_of_token


def word_starts(spikes: SentenceSpikes) -> list[tuple[int, int]]:
    """First token of each word and the one behind its last."""
    tokens = [(i, word) for i, word in enumerate(spikes.word_of_token) if word is not None]
    starts = [tokens[0][0], *(i for (_, before), (i, word) in pairwise(tokens) if word != before)]
    return list(zip(starts, [*starts[1:], tokens[-1][0] + 1], strict=True))
