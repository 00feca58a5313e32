"""Streams: what they read, in which order, and that a training which is resumed reads on where it stopped."""

import gzip
import json
import resource
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset, IterableDataset
from tiny_training import VOCABULARY, make_trainer, stage_models, tiny_tokenizer, weights_of
from transformers import DataCollatorWithPadding, RobertaTokenizerFast

from modeling_spikebert.data import DataError
from modeling_spikebert.data import streams as streams_module
from modeling_spikebert.data.streams import stream_text, tokenize_stream

# The reader of csv files leaves a file open that is not read to its end.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning",
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning",
)

TEXT_EN = Path(__file__).parents[2] / "shared" / "data" / "text-en"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """datasets sleeps for seconds at the end of each pass over parquet files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def sentences(count: int, start: int = 0) -> list[str]:
    """Of one to eight words, each sentence another."""
    return [" ".join(f"word{(i * 7 + j * j) % 59}" for j in range(1 + i % 8)) for i in range(start, start + count)]


def write(folder: Path, suffix: str, texts: list, column: str = "text") -> Path:
    file = folder / f"text{suffix}"
    table = Dataset.from_dict({column: texts})
    if suffix == ".parquet":
        table.to_parquet(file)
    elif suffix == ".csv":
        table.to_csv(file, index=False)
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    elif suffix == ".txt":
        file.write_text("".join(f"{text}\n" for text in texts))
    elif suffix == ".txt.gz":
        file.write_bytes(gzip.compress("".join(f"{text}\n" for text in texts).encode()))
    return file


def first(stream: IterableDataset, count: int) -> list:
    return list(stream.take(count))


def words_of(rows: list[dict]) -> list[str]:
    """Text of rows without special tokens, one behind the other."""
    return [VOCABULARY[i] for row in rows for i in row["input_ids"] if i > 4]


# What is read


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".txt", ".txt.gz"])
def test_every_row_comes_once_in_each_pass(tmp_path, suffix):
    texts = sentences(20)
    stream = stream_text(str(write(tmp_path, suffix, texts)), buffer_size=4)
    rows = [row["text"] for row in first(stream, 60)]
    assert sorted(set(rows)) == sorted(set(texts))
    counts = {text: rows.count(text) for text in set(texts)}
    assert all(2 <= count <= 5 for count in counts.values())  # three passes, but for what the buffer holds back


def test_a_folder_and_a_pattern_are_all_their_files(tmp_path):
    for i in range(3):
        write(tmp_path, ".parquet", sentences(4, 4 * i)).rename(tmp_path / f"part{i}.parquet")
    (tmp_path / "README.md").write_text("not text to train on")
    for source in (tmp_path, tmp_path / "*.parquet"):
        rows = {row["text"] for row in first(stream_text(str(source), buffer_size=2), 24)}
        assert rows == set(sentences(12))


def test_another_column(tmp_path):
    file = write(tmp_path, ".parquet", sentences(3), column="passage")
    assert {row["text"] for row in first(stream_text(str(file), "passage", 2), 9)} == set(sentences(3))


def test_rows_without_text_are_left_out(tmp_path):
    texts = ["", "word1", None, "  ", "word2", "\u200b"]
    stream = stream_text(str(write(tmp_path, ".parquet", texts)), buffer_size=2)
    assert {row["text"] for row in first(stream, 10)} == {"word1", "word2"}


def test_a_split_on_the_hub_by_name(monkeypatch):
    asked = []

    def load(*name, **options):
        asked.append((name, options))
        return Dataset.from_dict({"text": ["word1"]}).to_iterable_dataset()

    monkeypatch.setattr(streams_module, "load_dataset", load)
    assert first(stream_text("name/corpus:en:train", buffer_size=2), 1) == [{"text": "word1"}]
    assert asked == [(("name/corpus", "en"), {"split": "train", "streaming": True})]


# Its order


def test_the_order_follows_from_the_seed_and_differs_in_each_pass(tmp_path):
    file = str(write(tmp_path, ".txt", sentences(40)))
    orders = [[row["text"] for row in first(stream_text(file, buffer_size=16, seed=seed), 80)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:40] != orders[0][40:]
    assert orders[0][:40] != sentences(40)


@pytest.mark.parametrize("packing", ["none", "length", "packed"])
def test_tokens_follow_from_the_seed(tmp_path, packing):
    file = str(write(tmp_path, ".txt", sentences(40)))

    def rows(seed: int) -> list:
        stream = stream_text(file, buffer_size=16, seed=seed)
        return first(tokenize_stream(stream, tiny_tokenizer(), 12, packing, 4, seed), 30)

    assert rows(0) == rows(0) != rows(1)


# Rows for a model


def test_plain_rows_are_the_tokens_of_each_text(tmp_path):
    stream = stream_text(str(write(tmp_path, ".txt", sentences(30))), buffer_size=16)
    tokenizer = tiny_tokenizer()
    texts = [row["text"] for row in first(stream, 20)]
    expected = tokenizer(texts, truncation=True, max_length=6)
    rows = first(tokenize_stream(stream, tokenizer, 6), 20)
    assert [row["input_ids"] for row in rows] == expected["input_ids"]
    assert rows[0].keys() == expected.keys()


def test_packed_rows_are_full_and_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(streams_module, "ROWS_PACKED_TOGETHER", 10)
    tokenizer = tiny_tokenizer()
    stream = stream_text(str(write(tmp_path, ".txt", sentences(30))), buffer_size=16)
    rows, groups = [], 0
    texts = [row["text"] for row in first(stream, 50)]
    total = sum(len(text.split()) for text in texts)
    for row in tokenize_stream(stream, tokenizer, 12, "packed"):
        rows.append(row)
        groups += len(row["input_ids"]) < 11
        if len(words_of(rows)) >= total:
            break
    assert words_of(rows) == " ".join(texts).split()
    assert groups <= 5  # of ten texts each, the last row of which may be short
    for row in rows:
        assert (row["input_ids"][0], row["input_ids"][-1]) == (2, 3)  # [CLS], [SEP]
        assert len(row["input_ids"]) <= 12
        assert row["attention_mask"] == [1] * len(row["input_ids"])
        assert row["token_type_ids"] == [0] * len(row["input_ids"])
    inner = [token for row in rows for token in row["input_ids"][1:-1]]
    assert 2 not in inner
    # A [SEP] behind each text, and one more where a row ends within a text.
    assert sum(row["input_ids"].count(3) for row in rows) >= len(texts)


def test_a_long_text_goes_on_in_the_next_row(tmp_path, monkeypatch):
    monkeypatch.setattr(streams_module, "ROWS_PACKED_TOGETHER", 10)
    text = " ".join(f"word{i}" for i in range(50))
    stream = stream_text(str(write(tmp_path, ".txt", [text])), buffer_size=2)
    rows = first(tokenize_stream(stream, tiny_tokenizer(), 12, "packed"), 5)
    assert words_of(rows)[:50] == text.split()
    cut = first(tokenize_stream(stream, tiny_tokenizer(), 12), 1)
    assert words_of(cut) == text.split()[:10]


def test_rows_grouped_by_length_need_little_padding(tmp_path):
    tokenizer = tiny_tokenizer()
    stream = stream_text(str(write(tmp_path, ".txt", sentences(300))), buffer_size=100)

    def padding(packing: str) -> float:
        rows = iter(first(tokenize_stream(stream, tokenizer, 16, packing, batch_size=4), 64 * 4))
        padded = real = 0
        lengths = []
        while batch := [len(row["input_ids"]) for row in islice(rows, 4)]:
            padded += 4 * max(batch) - sum(batch)
            real += sum(batch)
            lengths.append(max(batch))
        assert lengths != sorted(lengths)  # batches come in random order
        return padded / (padded + real)

    assert padding("length") < 0.02 < 0.2 < padding("none")
    grouped = words_of(first(tokenize_stream(stream, tokenizer, 16, "length", batch_size=4), 64 * 4))
    assert sorted(grouped) == sorted(words_of(first(tokenize_stream(stream, tokenizer, 16), 64 * 4)))


def test_a_tokenizer_without_token_types(tmp_path):
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5, "b": 6}
    tokenizer = RobertaTokenizerFast(vocab=vocabulary, merges=[])
    stream = stream_text(str(write(tmp_path, ".txt", ["ab"])), buffer_size=2)
    (row,) = first(tokenize_stream(stream, tokenizer, 7, "packed"), 1)
    assert row == {"input_ids": [0, 5, 6, 2, 5, 6, 2], "attention_mask": [1] * 7}


# Refused


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.parquet", "no such file, and no folder or pattern"),
        ("*.parquet", "no such file, and no folder or pattern"),
        ("notes.md", "no such file, and no folder or pattern"),
        ("empty", "no such file, and no folder or pattern"),
    ],
)
def test_a_source_that_is_not_there(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        stream_text(str(tmp_path / source))


def test_files_of_two_types(tmp_path):
    write(tmp_path, ".txt", ["word1"])
    write(tmp_path, ".csv", ["word1"])
    with pytest.raises(DataError, match="files of one type are needed"):
        stream_text(str(tmp_path))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_column_that_is_not_there(tmp_path, suffix):
    with pytest.raises(DataError, match=r"no column 'text'; it has \['passage'\]"):
        stream_text(str(write(tmp_path, suffix, ["word1"], column="passage")))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
def test_no_text_at_all(tmp_path, suffix):
    with pytest.raises(DataError, match="there are no rows with text"):
        stream_text(str(write(tmp_path, suffix, ["", "  "])))


def test_a_damaged_file(tmp_path):
    file = tmp_path / "text.parquet"
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"text\.parquet: cannot be opened: Parquet magic bytes"):
        stream_text(str(file))


def test_a_value_that_is_no_text_is_named_by_its_row(tmp_path):
    file = write(tmp_path, ".parquet", [3.5, 1.0])
    with pytest.raises(DataError, match=r"row 1 has 3\.5 in 'text', which is no text"):
        stream_text(str(file))


def test_another_packing():
    with pytest.raises(ValueError, match="packing must be one of none, length, packed, got 'tight'"):
        tokenize_stream(IterableDataset.from_generator(lambda: iter([])), tiny_tokenizer(), 12, "tight")


# Training


def stream_trainer(folder: Path, file: str, packing: str = "none", **options):
    tokenizer = tiny_tokenizer()
    stream = tokenize_stream(stream_text(file, buffer_size=8, seed=1), tokenizer, 12, packing, batch_size=4, seed=1)
    data = {"train_dataset": stream, "data_collator": DataCollatorWithPadding(tokenizer)}
    models = stage_models("general", hidden_dropout_prob=0.1)
    return make_trainer(folder, "general", models, data, save_strategy="steps", save_steps=3, **options)


@pytest.mark.parametrize(("packing", "workers"), [("none", 0), ("length", 0), ("packed", 0), ("packed", 2)])
def test_a_resumed_training_reads_on_where_it_stopped(tmp_path, packing, workers):
    """Within the first pass over 20 rows of text (step 3), and behind it (step 9)."""
    file = str(write(tmp_path, ".txt", sentences(20)))
    options = {"max_steps": 12, "dataloader_num_workers": workers, "gradient_accumulation_steps": 1 + (workers == 0)}
    whole = stream_trainer(tmp_path / "whole", file, packing, **options)
    whole.train()
    for step in (3, 9):
        resumed = stream_trainer(tmp_path / "resumed", file, packing, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 12
        expected = weights_of(whole.model)
        for name, weight in weights_of(resumed.model).items():
            assert torch.equal(weight, expected[name]), (step, name)


def test_two_processes_share_what_one_sees(tmp_path):
    """Each reads the stream and takes its rows of each step (of eight, four each)."""
    stream = tokenize_stream(stream_text(str(write(tmp_path, ".txt", sentences(40))), 16), tiny_tokenizer(), 12)
    shards = [
        list(islice(IterableDatasetShard(stream, batch_size=4, num_processes=2, process_index=rank), 20))
        for rank in (0, 1)
    ]
    alone = first(stream, 40)
    for step in range(5):
        together = [row for shard in shards for row in shard[4 * step : 4 * step + 4]]
        assert together == alone[8 * step : 8 * step + 8]


def test_batches_are_not_sent_between_processes(tmp_path):
    trainer = stream_trainer(tmp_path / "run", str(write(tmp_path, ".txt", sentences(8))), max_steps=1)
    assert trainer.accelerator.dispatch_batches is False


@pytest.mark.skipif(not TEXT_EN.is_dir(), reason="the English corpus is not here")
def test_a_corpus_is_not_read_at_once():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stream = tokenize_stream(stream_text(str(TEXT_EN), buffer_size=1000), tiny_tokenizer(), 128, "packed")
    assert len(first(stream, 500)) == 500
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 600  # MB; its 529,125 rows are 160 MB of text, in Python's objects and tokens several GB
