"""Augmented copies: what each kind changes, what stays, what is counted, and that nothing depends on processes."""

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import multiprocess
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import BERT_SIZES, VOCABULARY, tiny_teacher, tiny_tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertConfig, BertForMaskedLM, BertModel, RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

from modeling_spikebert.commands import main
from modeling_spikebert.commands.augment import ending_children
from modeling_spikebert.data import augmentation, load_labelled
from modeling_spikebert.data.augmentation import (
    NUM_CANDIDATES,
    AugmentationSettings,
    MaskedLanguageModel,
    augment,
    change,
    count_words,
    sentences_of,
    split_words,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
OFF = {"p_mask": 0.0, "p_pos": 0.0, "p_ngram": 0.0}
ENGLISH = [
    "The  crew was great, thank you!",
    "I don't like it's well-made plot ... at all.",
    "A slow film; the actors were bored, and the music was loud.",
    "Bad food and cold rooms",
]
CHINESE = ["酒店很好。服务员非常热情。", "房间太小 早餐也不好吃", "位置不错。下次还会来。"]
TEXTS = {"en": ENGLISH, "zh": CHINESE}
languages = pytest.mark.parametrize("language", ["en", "zh"])


def table(texts: list[str], labels: list | None = None, **columns: list) -> Dataset:
    return Dataset.from_dict({"text": texts, **columns, "label": labels or [i % 2 for i in range(len(texts))]})


def settings_of(language: str, **options) -> AugmentationSettings:
    return AugmentationSettings(language, **(OFF | options))


def changed(text: str, language: str = "en", seed: int = 0, train: list[str] | None = None, **options):
    """One copy of a text, with the words of `train`."""
    pieces, tags = split_words(text, language)
    words = Dataset.from_list(
        [dict(zip(("text_pieces", "text_tags"), split_words(t, language), strict=True)) for t in train or [text]]
    )
    return change(pieces, tags, None, count_words(words, ["text"]), settings_of(language, **options), Random(seed))


def copies_of(result: Dataset) -> list[dict]:
    return [row for row in result if row["kind"] != "original"]


def normal(text: str) -> str:
    return " ".join(text.split()).casefold()


# Words and tags


@languages
@settings(deadline=None)
@given(text=st.text())
def test_pieces_join_to_the_text(language, text):
    pieces, tags = split_words(text, language)
    assert "".join(pieces) == text
    assert [not tag for tag in tags] == [piece.isspace() for piece in pieces]


def test_english_words_have_clitics_and_punctuation_apart():
    pieces, tags = split_words("She can't say it's well-made... 3.5 of 1,000 CAN'T", "en")
    words = [(piece, tag) for piece, tag in zip(pieces, tags, strict=True) if tag]
    assert [word for word, _ in words] == (
        ["She", "ca", "n't", "say", "it", "'s", "well-made", "...", "3.5", "of", "1,000", "CA", "N'T"]
    )
    assert dict(words) | {"She": "PRP", "n't": "RB", "'s": "POS", "3.5": "CD", "of": "IN"} == dict(words)


def test_chinese_words_are_segmented_and_tagged():
    pieces, tags = split_words("酒店 很好吃饭", "zh")
    assert list(zip(pieces, tags, strict=True)) == [("酒店", "n"), (" ", ""), ("很", "zg"), ("好", "a"), ("吃饭", "v")]


def test_the_vocabulary_counts_the_words_of_each_tag():
    result = count_words(
        Dataset.from_dict({"text_pieces": [["b", " ", "a"], ["a"]], "text_tags": [["N", "", "N"], ["V"]]}), ["text"]
    )
    assert result == {"N": (["b", "a"], [1, 2]), "V": (["a"], [1])}


# Kinds


def test_masking_with_probability_1_masks_every_word_and_keeps_the_spaces():
    assert changed("The  crew was great, thanks!", p_mask=1) == (
        "[MASK]  [MASK] [MASK] [MASK][MASK] [MASK][MASK]",
        {"masking"},
    )
    assert changed("one two", p_mask=1, mask_token="<mask>")[0] == "<mask> <mask>"


def test_a_chinese_word_has_one_mask_for_each_character():
    text, kinds = changed("酒店 hello 很好", "zh", p_mask=1)
    assert text == "[MASK][MASK] [MASK] [MASK][MASK]"
    assert kinds == {"masking"}


def test_masking_is_as_frequent_as_asked():
    n, p = 20_000, 0.1
    text, _ = changed("word " * n, p_mask=p)
    assert abs(text.count("[MASK]") - n * p) < 5 * math.sqrt(n * p * (1 - p))


@languages
def test_replacement_by_part_of_speech_keeps_the_tags_and_takes_words_of_the_training_text(language):
    texts = TEXTS[language]
    known = {}
    for text in texts:
        for piece, tag in zip(*split_words(text, language), strict=True):
            known.setdefault(tag, set()).add(piece)
    different = 0
    for seed, text in enumerate(texts * 5):
        pieces, tags = split_words(text, language)
        result, kinds = changed(text, language, seed, train=texts, p_pos=1)
        options = [
            "|".join(map(re.escape, known[tag] if tag else {piece})) for piece, tag in zip(pieces, tags, strict=True)
        ]
        assert re.fullmatch("".join(f"({option})" for option in options), result)
        different += result != text
        assert kinds == ({"pos"} if result != text else set())
    assert different > len(texts)


def test_words_are_drawn_as_often_as_they_occur():
    n = 4000
    text, _ = changed("cat " * n, train=["cat cat cat dog"], p_pos=1)
    assert abs(text.count("dog") - n / 4) < 5 * math.sqrt(n * 3 / 16)


@languages
def test_ngrams_are_contiguous_parts_of_one_to_five_words(language):
    text = " ".join(TEXTS[language])
    pieces, tags = split_words(text, language)
    places = [i for i, tag in enumerate(tags) if tag]
    ngrams = {
        "".join(pieces[places[k] : places[k + n - 1] + 1]): n for n in range(1, 6) for k in range(len(places) - n + 1)
    }
    lengths = Counter()
    for seed in range(200):
        result, kinds = changed(text, language, seed, p_ngram=1)
        assert result in text
        assert kinds == {"ngram"}
        lengths[ngrams[result]] += 1
    assert set(lengths) == {1, 2, 3, 4, 5}
    assert min(lengths.values()) > 20  # of 40, five standard deviations are 28


def test_a_text_of_one_word_has_no_ngram():
    assert changed("word", p_ngram=1) == ("word", set())


def test_the_kind_of_a_copy_is_what_is_left_in_it():
    """An n-gram may cut the masked words away."""
    kinds = Counter()
    for seed in range(300):
        text, done = changed("a b c d e f g h i j", seed=seed, p_mask=0.1, p_ngram=1)
        assert ("masking" in done) == ("[MASK]" in text)
        kinds["+".join(sorted(done))] += 1
    assert set(kinds) == {"masking+ngram", "ngram"}


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"p_mask": 0.3}, {"masking"}),
        ({"p_pos": 0.5}, {"pos"}),
        ({"p_ngram": 0.5}, {"ngram"}),
        (
            {"p_mask": 0.3, "p_pos": 0.3, "p_ngram": 0.5},
            {"masking", "pos", "masking+pos", "ngram", "masking+ngram", "pos+ngram", "masking+pos+ngram"},
        ),
    ],
    ids=["masking", "pos", "ngram", "all"],
)
@languages
def test_a_kind_with_probability_0_does_not_occur(language, options, kinds):
    result, _ = augment(table(TEXTS[language]), settings_of(language, copies=60, **options))
    assert set(result["kind"]) == {"original"} | kinds


# The whole table


@languages
def test_originals_come_first_and_are_unchanged(language):
    result, _ = augment(table(TEXTS[language]), AugmentationSettings(language))
    originals = result.select(range(len(TEXTS[language])))
    assert originals["text"] == TEXTS[language]
    assert originals["label"] == table(TEXTS[language])["label"]
    assert set(originals["kind"]) == {"original"}
    assert {row["label"] for row in copies_of(result)} == {None}
    assert result.column_names == ["text", "label", "kind"]


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        (["good", "bad"], Value("string")),
        ([3, 1], Value("int64")),
        ([0.25, -1.5], Value("float64")),
        ([1, 0], ClassLabel(names=["bad", "good"])),
    ],
    ids=["strings", "integers", "regression", "class_label"],
)
def test_labels_stay_as_they_are(labels, feature):
    texts = Dataset.from_dict(
        {"text": ENGLISH[:2], "label": labels}, features=Features({"text": Value("string"), "label": feature})
    )
    result, _ = augment(texts, AugmentationSettings("en", copies=3))
    assert result.features["label"] == feature
    assert result["label"][:2] == labels
    assert len(result) > 2
    assert set(result["label"][2:]) == {None}


@languages
def test_copies_equal_no_original_and_no_other_copy_and_all_are_counted(language):
    texts = [*TEXTS[language], TEXTS[language][0], "word"]
    result, dropped = augment(table(texts), AugmentationSettings(language, copies=30))
    keys = [normal(row["text"]) for row in copies_of(result)]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & set(map(normal, texts))
    assert len(keys) + dropped["duplicates"] == 30 * len(texts)
    assert dropped["duplicates"] > 0
    assert dropped["validation"] == 0


def test_copies_that_equal_a_validation_sentence_are_dropped_and_counted():
    train = table(["one two three four", "five six seven"])
    options = settings_of("en", p_ngram=1, copies=60)
    free, _ = augment(train, options)
    held_out = ["ONE  two", "unseen words"]
    result, dropped = augment(train, options, validation=table(held_out))
    assert "one two" in free["text"]
    assert [row for row in free if row["text"] != "one two"] == list(result)
    assert dropped["validation"] >= 1
    assert len(result) - 2 + sum(dropped.values()) == 120


def test_words_of_validation_data_are_never_used():
    train, validation = table(["cats like milk", "dogs like bones"]), table(["zebras like grass", "lions eat zebras"])
    result, _ = augment(train, settings_of("en", p_pos=1), validation=validation)
    words = {word for text in result["text"] for word in text.split()}
    assert words == {"cats", "like", "milk", "dogs", "bones"}


@languages
def test_the_result_does_not_depend_on_the_number_of_processes(language):
    train = table([f"{text} {i}" for i in range(60) for text in TEXTS[language]])
    results = [augment(train, AugmentationSettings(language, copies=4), num_proc) for num_proc in (1, 2)]
    assert list(results[0][0]) == list(results[1][0])
    assert results[0][1] == results[1][1]


def test_another_seed_gives_other_copies():
    texts = [augment(table(ENGLISH), AugmentationSettings("en", seed=seed))[0]["text"][:] for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_copies_of_a_row_do_not_depend_on_the_rows_behind_it():
    few, _ = augment(table(ENGLISH[:2]), settings_of("en", p_mask=0.3))
    many, _ = augment(table(ENGLISH), settings_of("en", p_mask=0.3))
    assert many["text"][len(ENGLISH) :][: len(few) - 2] == few["text"][2:]


def test_a_row_of_one_word_stays_with_fewer_copies():
    result, _ = augment(table(["word", "another word here"]), AugmentationSettings("en"))
    assert result["text"][:2] == ["word", "another word here"]
    assert 2 < len(result) < 20


def test_pairs_change_the_first_the_second_and_both_sides_in_turn():
    train = table(["one two three"], text_pair=["four five six"], labels=[1])
    result, _ = augment(train, settings_of("en", p_mask=1, copies=3))
    masked = "[MASK] [MASK] [MASK]"
    assert [(row["text"], row["text_pair"]) for row in result] == [
        ("one two three", "four five six"),
        (masked, "four five six"),
        ("one two three", masked),
        (masked, masked),
    ]
    assert result["kind"] == ["original", "masking", "masking", "masking"]


def test_a_pair_is_dropped_only_if_both_sides_equal_validation():
    train = table(["one two"], text_pair=["three four"], labels=[1])
    validation = table(["[mask] [mask]"], text_pair=["three four"], labels=[0])
    result, dropped = augment(train, settings_of("en", p_mask=1, copies=3), validation=validation)
    assert dropped == {"duplicates": 0, "validation": 1}
    assert len(result) == 3


@pytest.mark.parametrize(
    "text", ["a" * 100_000, "very good, " * 9_000, "很好的酒店" * 20_000, "n't" * 30_000, "😀\0 " * 30_000]
)
@languages
def test_long_and_strange_rows(language, text):
    result, dropped = augment(table([text, "it 's 好 \0 😀 \u200d e\u0301"]), AugmentationSettings(language, copies=2))
    assert result["text"][0] == text
    assert len(result) - 2 + dropped["duplicates"] == 4


# Masked language model

WORDS = [*VOCABULARY[:40], "##ing", "##s", "好", "店", "酒"]


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory) -> MaskedLanguageModel:
    folder = tmp_path_factory.mktemp("masked_lm")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**(BERT_SIZES | {"vocab_size": len(WORDS)}))).double().save_pretrained(folder)
    tiny_tokenizer().__class__(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=16).save_pretrained(
        folder
    )
    return MaskedLanguageModel(str(folder))


def test_candidates_are_the_most_likely_words(masked_lm):
    pieces = split_words("word1 word2s word3, word99", "en")[0]
    found = masked_lm.candidates([pieces, ["word5"]])
    assert [bool(words) for words in found[0]] == [True, False, False, False, True, True, False, True]
    ids = masked_lm.tokenizer("word1 word2s word3, word99", return_tensors="pt")["input_ids"]
    place = ids[0].tolist().index(WORDS.index("word3"))
    ids[0, place] = WORDS.index("[MASK]")
    with torch.no_grad():
        order = masked_lm.model(ids).logits[0, place].argsort(descending=True).tolist()
    words = [WORDS[i] for i in order if i >= 5 and not WORDS[i].startswith("##") and WORDS[i] != "word3"]
    assert found[0][4] == words[:NUM_CANDIDATES]


def test_a_chinese_word_changes_in_one_character(masked_lm):
    found = masked_lm.candidates([["酒店", "好"]])[0]
    assert len(found[0]) == 2 * NUM_CANDIDATES
    assert all(word.endswith("店") != word.startswith("酒") for word in found[0])
    assert "酒店" not in found[0]
    assert len(found[1]) == NUM_CANDIDATES


def test_masked_language_model_replaces_words(masked_lm):
    train = table(["word1 word2 word3", "word4  word5s word6"])
    result, _ = augment(train, settings_of("en", p_mlm=1, copies=5), masked_lm=masked_lm)
    again, _ = augment(train, settings_of("en", p_mlm=1, copies=5), num_proc=2, masked_lm=masked_lm)
    assert list(result) == list(again)
    assert set(result["kind"]) == {"original", "mlm"}
    assert len(result) > 8
    for row in copies_of(result):
        first, second, third = row["text"].split()
        if second == "word5s":  # two wordpieces
            assert row["text"] == f"{first}  word5s {third}"
            assert first != "word4"
            assert third != "word6"
        else:
            assert first != "word1"
            assert second != "word2"
            assert third != "word3"
        assert {first, second, third} <= {*WORDS[5:40], "word5s", "好", "店", "酒"}


def test_many_rows_without_candidates_in_front_of_others(masked_lm):
    result, _ = augment(table(["word5s"] * 1200 + ["word1"]), settings_of("en", p_mlm=1, copies=1), masked_lm=masked_lm)
    assert result["kind"][1200:] == ["original", "mlm"]


def test_words_behind_the_models_positions_stay(masked_lm):
    result, _ = augment(table(["word1 " * 30, "word2"]), settings_of("en", p_mlm=1, copies=1), masked_lm=masked_lm)
    words = result["text"][2].split()
    assert "word1" not in words[:14]  # with [CLS] and [SEP] 16 tokens
    assert words[14:] == ["word1"] * 16


def test_words_of_byte_pairs_are_replaced_by_whole_words(tmp_path):
    alphabet = sorted(ByteLevel.alphabet())
    space = "\u0120"
    merges = [(space, "a"), (space + "a", "b"), (space, "c"), (space + "c", "d"), ("a", "b"), ("c", "d")]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet, *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = RobertaTokenizerFast(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=16)
    torch.manual_seed(0)
    sizes = BERT_SIZES | {"vocab_size": len(tokens), "max_position_embeddings": 18}
    RobertaForMaskedLM(RobertaConfig(**sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = MaskedLanguageModel(str(tmp_path)).candidates([["ab", " ", "cd", " ", "ab"]])[0]
    assert set(found[2]) == {"a", "ab", "c"}  # all other words that start behind a space
    assert set(found[4]) == {"a", "c", "cd"}
    assert len(found[0]) == NUM_CANDIDATES
    assert found[1] == found[3] == []


@pytest.mark.filterwarnings("ignore")  # transformers reports the missing weights, too
def test_a_model_without_head_is_refused(tmp_path):
    tiny_teacher(BertModel).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"head are missing: .*cls\.predictions\.transform\.dense\.weight.*pre-trained"
    ):
        MaskedLanguageModel(str(tmp_path))


@pytest.mark.parametrize("options", [{"p_mlm": 0.4}, {}])
def test_masked_language_model_and_its_probability_need_each_other(masked_lm, options):
    with pytest.raises(ValueError, match="need each other"):
        augment(table(ENGLISH), AugmentationSettings("en", **options), masked_lm=None if options else masked_lm)


# Sentences of other text


def test_sentences_end_at_their_marks_and_have_five_to_forty_words():
    long = " ".join(["word"] * 40)
    texts = ["It cost 3.5 dollars, I think. Too short. Was it worth it, then?  Yes!", f"{long}. {long} more."]
    expected = ["It cost 3.5 dollars, I think.", "Was it worth it, then?"]
    assert sentences_of(texts, "en", 10) == expected  # with its full stop the third has 41
    assert sentences_of([long], "en", 10) == [long]
    assert sentences_of(texts, "en", 1) == expected[:1]
    assert sentences_of(["酒店的位置很不错。服务员都非常热情。再来"], "zh", 10) == [
        "酒店的位置很不错。",
        "服务员都非常热情。",
    ]


def test_sentences_are_added_once_and_without_label():
    sentences = ["A new sentence of the kind.", "bad  FOOD and cold rooms", "A new sentence of the kind.", "Held out!"]
    result, dropped = augment(
        table(ENGLISH), settings_of("en", p_mask=1, copies=0), validation=table(["held out!"]), sentences=sentences
    )
    assert result["text"][:] == [*ENGLISH, sentences[0]]
    assert (result["label"][-1], result["kind"][-1]) == (None, "sentence")
    assert dropped == {"duplicates": 2, "validation": 1}


def test_sentences_make_no_pairs():
    with pytest.raises(ValueError, match="make no pairs"):
        augment(table(ENGLISH, text_pair=ENGLISH), AugmentationSettings("en"), sentences=["one"])


def test_the_command_adds_sentences_of_all_files(tmp_path):
    train = write_csv(tmp_path / "train.csv", [("bad food", 0), ("good food", 1)])
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"\nHere is what {name} says.  And there is more of {name}!\n")
    output = tmp_path / "out.parquet"
    options = ["--language", "en", "--copies", "0", "--sentences-file", str(tmp_path / "*.txt"), "--num-sentences", "3"]
    main(["augment", "--train-file", str(train), "--output-file", str(output), *options])
    text = load_labelled(str(output), str(train))
    assert text.num_unlabelled == 3
    possible = {f"{sentence} {name}{end}" for name in "ab" for sentence, end in (("And there is more of", "!"),)}
    possible |= {f"Here is what {name} says." for name in "ab"}
    assert len(set(text.train["text"][2:]) & possible) == 3


# Refusals


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"copies": -1}, "copies must not be negative, got -1"),
        ({"p_mask": -0.1}, r"p_mask must be from 0 to 1, got -0\.1"),
        ({"p_ngram": math.nan}, "p_ngram must be from 0 to 1, got nan"),
        ({"p_mask": 0.6, "p_pos": 0.5}, "p_mask \\+ p_pos \\+ p_mlm must be at most 1"),
        (OFF, "are all 0"),
        ({"mask_token": ""}, "mask_token must not be empty"),
    ],
    ids=["copies", "negative", "nan", "sum", "nothing", "mask_token"],
)
def test_settings_are_checked(options, expected):
    with pytest.raises(ValueError, match=expected):
        AugmentationSettings("en", **options)


@pytest.mark.parametrize(("language", "module"), [("en", "textblob"), ("zh", "rjieba")])
def test_an_absent_package_is_named(monkeypatch, language, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.en", None)
    augmentation._tagger.cache_clear()
    with pytest.raises(ImportError, match=rf"needs {module}: pip install"):
        augment(table(ENGLISH), AugmentationSettings(language))


# The command


def write_csv(file: Path, rows: list[tuple[str, object]]) -> Path:
    file.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows), encoding="utf-8")
    return file


def test_the_command_writes_what_it_counts(tmp_path):
    train = write_csv(tmp_path / "train.csv", [(text, ("bad", "good")[i % 2]) for i, text in enumerate(ENGLISH)])
    validation = write_csv(tmp_path / "validation.csv", [("bad food", "bad"), ("A slow film", "good")])
    before = validation.read_bytes()
    output = tmp_path / "train_augmented.parquet"
    command = ["augment", "--train-file", train, "--output-file", output, "--language", "en", "--num-proc", "2"]
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "modeling_spikebert",
            *map(str, command),
            "--validation-file",
            str(validation),
        ],
        env=os.environ | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr  # the tagger's package leaves a file open, this must not
    assert validation.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "train.csv",
        "train_augmented.parquet",
        "validation.csv",
    ]

    written = load_dataset("parquet", data_files=str(output), split="train")
    header, *counts, dropped, file, advice = result.stdout.splitlines()
    assert header.split() == ["kind", "rows"]
    assert {kind: int(count) for kind, count in map(str.split, counts)} == Counter(written["kind"])
    assert file == f"Written: {output}, {len(written)} rows."
    assert f"--train-file {output}" in advice
    duplicates, held_out = map(int, re.findall(r"\d+", dropped))
    assert len(written) + duplicates + held_out == 21 * len(ENGLISH)
    assert written["label"][:4] == ["bad", "good", "bad", "good"]

    text = load_labelled(str(output), str(validation))
    assert text.train["label"][:4] == [0, 1, 0, 1]
    assert text.num_unlabelled == len(written) - 4


def test_the_command_keeps_numbers_as_labels_and_reads_pairs(tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text('{"a": "one two", "b": "three four", "score": 0.5}\n{"a": "5", "b": "6 7", "score": 2.0}\n')
    output = tmp_path / "out.parquet"
    columns = ["--text-column", "a", "--text-pair-column", "b", "--label-column", "score"]
    main(["augment", "--train-file", str(train), "--output-file", str(output), "--language", "en", *columns])
    written = load_dataset("parquet", data_files=str(output), split="train")
    assert written.column_names == ["text", "text_pair", "label", "kind"]
    assert written["label"][:2] == [0.5, 2.0]
    assert written["text"][:2] == ["one two", "5"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--train-file": "absent.csv"}, "absent.csv: no such file"),
        ({"--validation-file": "absent.csv"}, "absent.csv: no such file"),
        ({"--text-column": "sentence"}, "no column 'sentence'; it has ['text', 'label']"),
        ({"--text-pair-column": "other"}, "no column 'other'"),
        ({"--label-column": "mood"}, "no column 'mood'"),
        ({"--output-file": "out.csv"}, "the output is a parquet file. Name it so: out.parquet"),
        ({"--output-file": "absent/out.parquet"}, "absent: no such folder"),
        ({"--num-proc": "0"}, "--num-proc must be at least 1, got 0"),
        ({"--copies": "0"}, "copies is 0 and there are no sentences"),
        ({"--sentences-file": "absent.txt"}, "absent.txt: no such file"),
        ({"--num-sentences": "0"}, "--num-sentences must be at least 1, got 0"),
        ({"--p-mask": "1.5"}, "p_mask must be from 0 to 1, got 1.5"),
        ({"--p-mlm": "0.4"}, "need each other"),
    ],
    ids=lambda value: " ".join(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_the_command_refuses(tmp_path, monkeypatch, changes, expected):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "train.csv", [("one two", 0), ("three", 1)])
    options = {"--train-file": "train.csv", "--output-file": "out.parquet", "--language": "en"} | changes
    with pytest.raises(SystemExit) as stopped:
        main(["augment", *(part for option in options.items() for part in option)])
    assert str(stopped.value.code).startswith("spikebert augment: ")
    assert expected in str(stopped.value.code)
    assert [path.name for path in tmp_path.iterdir()] == ["train.csv"]


def test_the_command_refuses_to_write_over_what_it_reads(tmp_path):
    train = tmp_path / "train.parquet"
    table(ENGLISH).to_parquet(str(train))
    before = train.read_bytes()
    with pytest.raises(SystemExit, match=r"train\.parquet is read"):
        main(["augment", "--train-file", str(train), "--output-file", str(train), "--language", "en"])
    assert train.read_bytes() == before
    other = write_csv(tmp_path / "other.csv", [("one two", 0)])
    options = ["--train-file", str(other), "--sentences-file", str(train)]
    with pytest.raises(SystemExit, match=r"train\.parquet is read"):
        main(["augment", *options, "--output-file", str(train), "--language", "en"])
    assert train.read_bytes() == before


def test_the_command_refuses_rows_without_label(tmp_path):
    """As in a file that was augmented before."""
    train = tmp_path / "train.parquet"
    augment(table(ENGLISH), AugmentationSettings("en", copies=1))[0].to_parquet(str(train))
    with pytest.raises(SystemExit, match="rows have no label in 'label', the first is row 5"):
        main(["augment", "--train-file", str(train), "--output-file", str(tmp_path / "x.parquet"), "--language", "en"])


def test_ctrl_c_is_one_line_with_several_processes(tmp_path):
    train = write_csv(tmp_path / "train.csv", [(ENGLISH[i % 4] * 40, i % 2) for i in range(4000)])
    options = [
        "--train-file",
        train,
        "--output-file",
        tmp_path / "x.parquet",
        "--language",
        "en",
        "--num-proc",
        "2",
        "-v",
    ]
    command = [Path(sys.executable).with_name("spikebert"), "augment", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    shown = ""
    while "(num_proc=2):" not in shown and (character := process.stderr.read(1)):
        shown += character
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, rest = process.communicate(timeout=100)
    assert "Traceback" not in rest
    assert process.returncode == 1
    assert rest.endswith("\nspikebert augment: interrupted; nothing was written.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["train.csv"]


def test_ctrl_c_during_a_fork_comes_behind_it_and_ends_one_process():
    """Hooks that are registered first run inside those of the command."""
    script = """
import ctypes, functools, os, signal, time
from modeling_spikebert.commands.augment import keep_children_quiet

HOOKS = ("before", "after_in_parent", "after_in_child")


def press(hook):
    if hook == now:
        os.killpg(0, signal.SIGINT)


os.register_at_fork(**{hook: functools.partial(press, hook) for hook in HOOKS})
last = ctypes.c_int(0)  # this signal, or none, where no Python function follows that could see it
os.register_at_fork(after_in_parent=functools.partial(getattr(ctypes.CDLL(None), "raise"), last))
keep_children_quiet()
for now in (*HOOKS, "last"):
    last.value = signal.SIGINT if now == "last" else 0
    child = None
    try:
        child = os.fork()
        if child == 0:
            time.sleep(0.5)
            os._exit(7)
        while True:
            time.sleep(0.01)
    except KeyboardInterrupt:
        print(now, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    # From Python 3.12 on it says that a fork beside threads is a risk.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, start_new_session=True)
    assert (result.stdout, result.stderr) == ("before 7\nafter_in_parent 7\nafter_in_child 7\nlast 7\n", "")


def test_no_child_outlives_the_command():
    child = multiprocess.get_context("spawn").Process(target=time.sleep, args=(100,))
    with ending_children():
        child.start()
    child.join(50)
    assert child.exitcode == -signal.SIGTERM


def test_ctrl_c_stays_ignored_where_it_was():
    script = """
import signal
from modeling_spikebert.commands.augment import keep_children_quiet

keep_children_quiet()
signal.raise_signal(signal.SIGINT)
print("goes on")
"""
    command = ["bash", "-c", "trap '' INT; exec \"$@\"", "bash", sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (result.stdout, result.stderr) == ("goes on\n", "")


def test_the_command_leaves_nothing_on_a_full_disk(tmp_path):
    words = Random(0)
    rows = [(" ".join(f"{words.random():.9f}" for _ in range(20)), i % 2) for i in range(200)]
    train, disk = write_csv(tmp_path / "train.csv", rows), tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=16k none {shlex.quote(str(disk))}"
    spikebert = Path(sys.executable).with_name("spikebert")
    options = ["--train-file", train, "--output-file", disk / "out.parquet", "--language", "en", "--copies", "1"]
    command = shlex.join(map(str, [spikebert, "augment", *options]))
    script = f"{mount} || exit 77; {command}; status=$?; ls {shlex.quote(str(disk))}; exit $status"
    try:
        output = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
            capture_output=True,
            text=True,
            timeout=150,
        )
    except FileNotFoundError:
        pytest.skip("a small disk cannot be mounted here (unshare)")
    if output.returncode == 77 or output.stderr.startswith("unshare"):
        pytest.skip("a small disk cannot be mounted here (unshare, tmpfs)")
    assert (output.returncode, output.stdout) == (1, ""), output.stderr
    message = output.stderr.splitlines()[-1]
    assert message.startswith(
        f"spikebert augment: {disk}/out.parquet could not be written (No space left on device). It"
    )


# Real text


@pytest.mark.parametrize(("name", "language"), [("sst2", "en"), ("chnsenti", "zh")])
def test_real_reviews(name, language):
    file = DATA / name / "train.parquet"
    if not file.is_file():
        pytest.skip("no reviews in ../shared/data")
    train = load_dataset("parquet", data_files=str(file), split="train").select(range(200))
    result, dropped = augment(train, AugmentationSettings(language, copies=5), num_proc=2)
    assert len(result) + dropped["duplicates"] == 6 * 200
    assert len(result) > 700
    kinds = Counter(result["kind"])
    assert kinds["original"] == 200
    assert all(count > 5 for count in kinds.values())
    assert len(kinds) == 8
