"""Text beside that of the task for stage 2, to be labelled by the teacher: copies of the training text, masked,
replaced and cut, and sentences of text without labels.

Sources: Tang et al., "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks", 2019, section 3.2
(masking, replacement by part of speech, n-grams, cycling through the sides of a pair), which the SpikeBERT paper
follows; Jiao et al., "TinyBERT", Findings of EMNLP 2020, algorithm 1 (replacement by a masked language model).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from itertools import accumulate, islice
from random import Random
from typing import Any

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForMaskedLM, AutoTokenizer

from .mapping import mapped
from .settings import AugmentationSettings

KINDS = ("masking", "pos", "mlm", "ngram")  # the order in which a copy's `kind` names them
SENTENCE_KIND = "sentence"
SENTENCE_WORDS = range(5, 41)  # shorter ones say little, longer ones are mostly lists and tables
# In English a full stop may also stand inside of a number or a name.
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])\s*")
LONGEST_NGRAM = 5  # Tang et al.: n is drawn from 1 to 5
NUM_CANDIDATES = 15  # TinyBERT's script: K
MASKED_LM_LENGTH = 128  # tokens of a sentence that the masked language model reads
MASKED_LM_TOKENS = 2048  # tokens in one forward pass; with 30,000 words their logits take 250 MB

# Words of English text as the tagger knows them, with clitics apart ("do" "n't", "it" "'s"), equal punctuation marks
# together, and white space. Every character is in one of them.
ENGLISH = re.compile(
    r"""\s+ | n['\u2019]t\b | ['\u2019](?:s|re|ve|ll|d|m)\b
    | \w+?(?=n['\u2019]t\b) | \w+(?:[-.,]\w+)* | ([^\w\s])\1*""",
    re.VERBOSE | re.IGNORECASE,
)

# Characters that the tokenizers of Chinese BERTs make tokens of their own.
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")

# Of each tag, the words of the training text that have it, and their cumulative counts.
Vocabulary = dict[str, tuple[list[str], list[int]]]


def augment(
    train: Dataset,
    settings: AugmentationSettings,
    num_proc: int = 1,
    masked_lm: "MaskedLanguageModel | None" = None,
    validation: Dataset | None = None,
    sentences: list[str] | None = None,
) -> tuple[Dataset, dict[str, int]]:
    """Appends copies, and sentences from elsewhere, to training text.

    Every word of a copy is masked, replaced by part of speech, replaced by the masked language model or kept; then the
    copy may be cut to an n-gram. Of pairs the first copy changes the first side, the second the second, the third both,
    and so on. What equals an original, another copy or sentence or a validation row but for case and white space is
    dropped.

    Args:
        train: columns `text`, `label`, for pairs `text_pair`, with words in each. All words and tags come from here.
        settings: kinds and probabilities.
        num_proc: processes; the result does not depend on it.
        masked_lm: goes with `settings.p_mlm`.
        validation: columns `text` and `text_pair`; only compared with.
        sentences: of other text, from `sentences_of`; they stay as they are.

    Returns:
        The rows of `train`, kind "original", then the copies, label null and kind as `"masking+pos"`, then the
        sentences, kind "sentence"; and how many of both were dropped as `"duplicates"` and for `"validation"`.
    """
    if not settings.copies and not sentences:
        raise ValueError("copies is 0 and there are no sentences: nothing would be added.")
    if sentences and "text_pair" in train.column_names:
        raise ValueError("Sentences of other text make no pairs: leave them out, or the second column.")
    if (settings.p_mlm > 0) != (masked_lm is not None):
        raise ValueError("p_mlm (TinyBERT: 0.4) and a masked language model need each other: pass both, or neither.")
    sides = [side for side in ("text", "text_pair") if side in train.column_names]
    schema = Features(
        {side: Value("string") for side in sides} | {"label": train.features["label"], "kind": Value("string")}
    )
    _tagger(settings.language)  # is it installed? and read once, before the processes part
    every: dict[str, Any] = {"batched": True, "batch_size": 100, "load_from_cache_file": False}
    parallel = every | {"num_proc": min(num_proc, len(train)) if num_proc > 1 else None}

    texts = train.select_columns(sides)
    options: dict[str, Any] = {"fn_kwargs": {"language": settings.language}, "remove_columns": sides}
    words = mapped(texts, _split, desc="Splitting into tagged words", **options, **parallel)
    vocabulary = count_words(words, sides)
    if masked_lm is not None:
        candidates = Features({f"{side}_candidates": List(List(Value("string"))) for side in sides})
        features = Features({**words.features, **candidates})
        words = mapped(
            words, masked_lm.add_candidates, features=features, desc="Asking the masked language model", **every
        )
    options = {"fn_kwargs": {"sides": sides, "vocabulary": vocabulary, "settings": settings}, "features": schema}
    options |= {"with_indices": True, "remove_columns": words.column_names}
    copies = mapped(words, _copy, desc="Making copies", **options, **parallel)
    if sentences:
        added = {"text": sentences, "label": [None] * len(sentences), "kind": [SENTENCE_KIND] * len(sentences)}
        copies = concatenate_datasets([copies, Dataset.from_dict(added, features=schema)])

    held_out = set() if validation is None else set(_keys(validation, sides))
    seen = set(_keys(texts, sides))
    kept, dropped = [], {"duplicates": 0, "validation": 0}
    for index, key in enumerate(_keys(copies, sides)):
        if key in held_out:
            dropped["validation"] += 1
        elif key in seen:
            dropped["duplicates"] += 1
        else:
            seen.add(key)
            kept.append(index)
    originals = train.select_columns([*sides, "label"]).add_column("kind", ["original"] * len(train)).cast(schema)
    return concatenate_datasets([originals, copies.select(kept)]), dropped


def sentences_of(texts: Iterable[str], language: str, count: int) -> list[str]:
    """The first sentences of texts, without those of fewer or more words than `SENTENCE_WORDS` has.

    Args:
        texts: paragraphs; read as far as needed.
        language: as in `AugmentationSettings`.
        count: how many; fewer if the texts have no more.
    """
    sentences = (sentence.strip() for text in texts for sentence in SENTENCE_END.split(text))
    fitting = (s for s in sentences if sum(map(bool, split_words(s, language)[1])) in SENTENCE_WORDS)
    return list(islice(fitting, count))


# Words and tags


def split_words(text: str, language: str) -> tuple[list[str], list[str]]:
    """Pieces of a text, which join to it again, and their tags; white space has the tag ""."""
    return _tagger(language)(text)


@cache
def _tagger(language: str) -> Callable[[str], tuple[list[str], list[str]]]:
    package = {"en": "textblob", "zh": "rjieba"}[language]
    try:
        return {"en": _english, "zh": _chinese}[language]()
    except ImportError as error:
        raise ImportError(
            f"Augmentation of language {language!r} needs {package}: pip install -c constraints.txt '.[augmentation]'"
        ) from error


def _english() -> Callable[[str], tuple[list[str], list[str]]]:
    from textblob.en import Lexicon, Parser, lexicon

    with open(lexicon.path, encoding="utf-8") as file:  # which `lexicon` itself would leave open
        words = Lexicon(path=file)
        len(words)  # reads it
    parser = Parser(lexicon=words, default=("NN", "NNP", "CD"), language="en")  # as the package makes its own

    def split(text: str) -> tuple[list[str], list[str]]:
        pieces = [match.group() for match in ENGLISH.finditer(text)]
        tags = [""] * len(pieces)
        sentence: list[int] = []  # the first word of a sentence has a capital letter and is no name
        for i, piece in enumerate(pieces):
            if not piece.isspace():
                sentence.append(i)
            if sentence and (piece[0] in ".!?" or i == len(pieces) - 1):
                for j, (_, tag) in zip(sentence, parser.find_tags([pieces[j] for j in sentence]), strict=True):
                    tags[j] = tag
                sentence = []
        return pieces, tags

    return split


def _chinese() -> Callable[[str], tuple[list[str], list[str]]]:
    import rjieba

    def split(text: str) -> tuple[list[str], list[str]]:
        tagged = rjieba.tag(text)
        return [piece for piece, _ in tagged], ["" if piece.isspace() else tag for piece, tag in tagged]

    return split


def _split(batch: dict[str, list[str]], language: str) -> dict[str, list[list[str]]]:
    columns = {}
    for side, texts in batch.items():
        split = [split_words(text, language) for text in texts]
        columns[f"{side}_pieces"], columns[f"{side}_tags"] = map(list, zip(*split, strict=True))
    return columns


def count_words(words: Dataset, sides: list[str]) -> Vocabulary:
    """The unigram distribution of each tag."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for batch in words.iter(1000):
        for side in sides:
            for pieces, tags in zip(batch[f"{side}_pieces"], batch[f"{side}_tags"], strict=True):
                for piece, tag in zip(pieces, tags, strict=True):
                    if tag:
                        counts[tag][piece] += 1
    return {tag: (list(count), list(accumulate(count.values()))) for tag, count in counts.items()}


# Copies


def _copy(
    batch: dict[str, list[Any]],
    rows: list[int],
    sides: list[str],
    vocabulary: Vocabulary,
    settings: AugmentationSettings,
) -> dict[str, list[Any]]:
    turns = [[side] for side in sides] + ([sides] if len(sides) > 1 else [])
    columns: dict[str, list[Any]] = {name: [] for name in (*sides, "kind")}
    for k, row in enumerate(rows):
        rng = Random(f"{settings.seed} {row}")  # of the row alone, whichever process has it
        pieces = {side: batch[f"{side}_pieces"][k] for side in sides}
        tags = {side: batch[f"{side}_tags"][k] for side in sides}
        candidates = {side: batch[f"{side}_candidates"][k] if settings.p_mlm else None for side in sides}
        for copy in range(settings.copies):
            done: set[str] = set()
            for side in sides:
                text = "".join(pieces[side])
                if side in turns[copy % len(turns)]:
                    text, kinds = change(pieces[side], tags[side], candidates[side], vocabulary, settings, rng)
                    done |= kinds
                columns[side].append(text)
            columns["kind"].append("+".join(kind for kind in KINDS if kind in done))
    return columns | {"label": [None] * len(columns["kind"])}


def change(
    pieces: list[str],
    tags: list[str],
    candidates: list[list[str]] | None,
    vocabulary: Vocabulary,
    settings: AugmentationSettings,
    rng: Random,
) -> tuple[str, set[str]]:
    """One changed copy of a text, and the kinds of change that are left in it.

    Args:
        pieces, tags: from `split_words`.
        candidates: of each piece, what the masked language model would put in its place; may be empty.
        vocabulary: what words with the same tag are drawn from.
        settings: probabilities.
        rng: what is drawn with.
    """
    up_to_mask = settings.p_mask
    up_to_pos = up_to_mask + settings.p_pos
    up_to_mlm = up_to_pos + settings.p_mlm
    places = [i for i, tag in enumerate(tags) if tag]
    changed, done = list(pieces), [""] * len(pieces)
    for i in places:
        x = rng.random()
        if x < up_to_mask:
            # As many masks as a Chinese BERT has tokens there, so that the teacher sees the length of the word.
            changed[i], done[i] = settings.mask_token * max(1, len(HAN.findall(pieces[i]))), "masking"
        elif x < up_to_pos:
            words, cumulative = vocabulary[tags[i]]
            changed[i], done[i] = rng.choices(words, cum_weights=cumulative)[0], "pos"
        elif x < up_to_mlm and candidates is not None and candidates[i]:
            changed[i], done[i] = rng.choice(candidates[i]), "mlm"
        if changed[i] == pieces[i]:
            done[i] = ""
    first, last, cut = 0, len(pieces) - 1, False
    if places and rng.random() < settings.p_ngram:
        n = rng.randint(1, LONGEST_NGRAM)
        if n < len(places):
            start = rng.randint(0, len(places) - n)
            first, last, cut = places[start], places[start + n - 1], True
    kinds = set(done[first : last + 1]) - {""} | ({"ngram"} if cut else set())
    return "".join(changed[first : last + 1]), kinds


def _keys(table: Dataset, sides: list[str]) -> Iterable[tuple[str, ...]]:
    """The text of each row, without case and amount of white space."""
    for batch in table.select_columns(sides).iter(1000):
        for texts in zip(*(batch[side] for side in sides), strict=True):
            yield tuple(" ".join(text.split()).casefold() for text in texts)


class MaskedLanguageModel:
    """Says which words fit in the place of a word, on the accelerator if there is one.

    Each word is masked alone, as in TinyBERT. Words of one token have candidates; in Chinese each character of a word
    has, and the candidates of the word are the word with one character replaced. Of long texts it reads the first
    `MASKED_LM_LENGTH` tokens.

    Args:
        name: folder or Hub name of a checkpoint with the weights of its masked-language-model head.

    Raises:
        ValueError: the weights of the head are missing, or the tokenizer is unfit.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        model, report = AutoModelForMaskedLM.from_pretrained(name, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(
                f"{name}: the weights of the masked-language-model head are missing: "
                f"{', '.join(sorted(report['missing_keys']))}. Name a checkpoint that was pre-trained with this "
                "head, or leave it out."
            )
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.model = model.to(accelerator or torch.device("cpu")).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        if not self.tokenizer.is_fast or self.tokenizer.mask_token_id is None:
            raise ValueError(f"{name}: the tokenizer must be a fast one with a mask token.")
        positions = getattr(model.config, "max_position_embeddings", MASKED_LM_LENGTH)
        self.max_length = min(MASKED_LM_LENGTH, self.tokenizer.model_max_length, positions)
        # Each token's word, and its group: words that start behind a space, other words, or -1 for special tokens and
        # parts of words. A word is replaced by one of its own group.
        self.words = [""] * model.config.vocab_size
        groups = [-1] * model.config.vocab_size
        for token, i in self.tokenizer.get_vocab().items():
            word = self.tokenizer.convert_tokens_to_string([token]).strip()
            part = token.startswith("##") or "\ufffd" in word or not word.isprintable()
            if word and not part and i not in self.tokenizer.all_special_ids:
                self.words[i], groups[i] = word, int(token[0] in "\u0120\u2581")  # of byte pairs, of SentencePiece
        if not any(self.words):
            raise ValueError(f"{name}: the tokenizer has no words. Are its files in the folder?")
        self.groups = torch.tensor(groups, device=self.model.device)  # [V]

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return MaskedLanguageModel, (self.name,)  # `datasets` pickles what it maps with; not the weights

    def add_candidates(self, batch: dict[str, list[Any]]) -> dict[str, list[list[list[str]]]]:
        """For `Dataset.map`: beside the pieces of each side, the candidates of each piece."""
        sides = [name.removesuffix("_pieces") for name in batch if name.endswith("_pieces")]
        return {f"{side}_candidates": self.candidates(batch[f"{side}_pieces"]) for side in sides}

    def candidates(self, texts: list[list[str]]) -> list[list[list[str]]]:
        """What may stand in the place of each piece of each text; nothing for most white space and rare words."""
        found: list[list[list[str]]] = [[[] for _ in pieces] for pieces in texts]
        inputs, tokens, places = [], [], []  # a sentence, the token in it to be replaced, and where that stands
        for row, pieces in enumerate(texts):
            encoded = self.tokenizer(
                "".join(pieces), truncation=True, max_length=self.max_length, return_offsets_mapping=True
            )
            ids = torch.tensor(encoded["input_ids"])
            token_of = {span: token for token, span in enumerate(encoded["offset_mapping"])}
            start = 0
            for i, piece in enumerate(pieces):
                whole = [(0, len(piece))]
                characters = [(k, k + 1) for k in range(len(piece))] if HAN.fullmatch(piece[0]) else whole
                for begin, end in characters:
                    token = token_of.get((start + begin, start + end))
                    if token is not None and not piece.isspace():
                        inputs.append(ids)
                        tokens.append(token)
                        places.append((row, i, begin, end))
                start += len(piece)
        for k, words in enumerate(self._fill(inputs, tokens)):
            row, i, begin, end = places[k]
            piece = texts[row][i]
            found[row][i] += [piece[:begin] + word + piece[end:] for word in words]
        return found

    @torch.inference_mode()
    def _fill(self, inputs: list[Tensor], tokens: list[int]) -> list[list[str]]:
        """The most likely words in the place of one token of each sentence, without the token itself."""
        device = self.model.device
        words: list[list[str]] = [[] for _ in inputs]
        order = sorted(range(len(inputs)), key=lambda k: -len(inputs[k]))  # sentences of like length share a batch
        while order:
            size = max(1, MASKED_LM_TOKENS // len(inputs[order[0]]))
            chosen, order = order[:size], order[size:]
            some = [inputs[k] for k in chosen]
            ids = pad_sequence(some, batch_first=True, padding_value=self.tokenizer.pad_token_id).to(device)  # [B, L]
            real = pad_sequence([torch.ones_like(x) for x in some], batch_first=True).to(device)  # [B, L]
            rows = torch.arange(len(chosen), device=device)
            at = torch.tensor([tokens[k] for k in chosen], device=device)  # [B]
            original = ids[rows, at]
            ids[rows, at] = self.tokenizer.mask_token_id
            logits = self.model(input_ids=ids, attention_mask=real).logits[rows, at].float()  # [B, L, V] to [B, V]
            group = self.groups[original].clamp(min=0).unsqueeze(1)  # [B, 1]; an unknown word has the group of words
            logits[self.groups != group] = -torch.inf
            logits[rows, original] = -torch.inf
            best = logits.topk(min(NUM_CANDIDATES, logits.shape[1]))
            for k, values, indices in zip(chosen, best.values.tolist(), best.indices.tolist(), strict=True):
                words[k] = [self.words[i] for value, i in zip(values, indices, strict=True) if value > -torch.inf]
        return words
