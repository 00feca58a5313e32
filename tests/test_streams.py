"""Streams: what they read, in which order, and that a training which is resumed reads on where it stopped."""

import gc
import gzip
import json
import resource
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard, prepare_data_loader
from datasets import Dataset
from tiny_training import VOCABULARY, make_trainer, stage_models, tiny_tokenizer, weights_of
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, RobertaTokenizerFast

from modeling_spikebert.data import DataError
from modeling_spikebert.data import streams as streams_module
from modeling_spikebert.data.streams import TextStream

TEXT_EN = Path(__file__).parents[2] / "shared" / "data" / "text-en"
# pandas leaves a file open that is not read to its end; it is closed when its generator is collected, in any test.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning",
    "ignore:unclosed file:ResourceWarning",
)
packings = pytest.mark.parametrize("packing", ["none", "length", "packed"])


@pytest.fixture(autouse=True, scope="module")
def collected():
    yield
    gc.collect()


def sentences(count: int, start: int = 0) -> list[str]:
    """Of one to eight words; no two are the same."""
    return [
        " ".join(f"word{(i + j * (1 + i // 59)) % 59}" for j in range(1 + i % 8)) for i in range(start, start + count)
    ]


def write(file: Path, texts: list, column: str = "text") -> str:
    table = Dataset.from_dict({column: texts}) if file.suffix in (".parquet", ".csv") else None
    lines = "".join(f"{text}\n" if ".txt" in file.name else json.dumps({column: text}) + "\n" for text in texts)
    if table is None:
        file.write_bytes(gzip.compress(lines.encode()) if file.suffix == ".gz" else lines.encode())
    else:
        table.to_csv(file) if file.suffix == ".csv" else table.to_parquet(file)
    return str(file)


def stream_of(source: object, max_length: int = 12, **options) -> TextStream:
    return TextStream(str(source), tiny_tokenizer(), max_length, **({"buffer_size": 8} | options))


def first(stream: TextStream, count: int) -> list[list[int]]:
    rows = iter(stream)
    taken = [row["input_ids"] for row in islice(rows, count)]
    rows.close()
    return taken


def text_of(sequences: list[list[int]]) -> list[str]:
    """Without special tokens."""
    return [" ".join(VOCABULARY[i] for i in ids if i > 4) for ids in sequences]


# What is read


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json", ".jsonl", ".jsonl.gz", ".txt", ".txt.gz"])
def test_every_row_comes_once_in_each_pass(tmp_path, suffix):
    texts = sentences(20)
    rows = text_of(first(stream_of(write(tmp_path / f"text{suffix}", texts)), 60))
    for i in (0, 20, 40):
        assert sorted(rows[i : i + 20]) == sorted(texts)


def test_files_of_different_sizes_of_a_folder_or_pattern(tmp_path):
    (tmp_path / "below").mkdir()
    write(tmp_path / "small.parquet", sentences(3))
    write(tmp_path / "below" / "large.parquet", sentences(30, 3))
    (tmp_path / "README.md").write_text("not text to train on")
    for source in (tmp_path, tmp_path / "**" / "*.parquet"):
        assert sorted(text_of(first(stream_of(source), 33))) == sorted(sentences(33))


def test_another_column(tmp_path):
    file = write(tmp_path / "text.parquet", sentences(3), column="passage")
    assert sorted(text_of(first(stream_of(file, text_column="passage"), 3))) == sorted(sentences(3))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_without_text_are_left_out(tmp_path, suffix):
    file = write(tmp_path / f"text{suffix}", ["", "word1", None, "  ", "word2", "\u200b"])
    assert set(text_of(first(stream_of(file), 10))) == {"word1", "word2"}


def test_numbers_in_a_csv_are_text(tmp_path):
    (tmp_path / "text.csv").write_text("text\n12\nNA\n")
    assert first(stream_of(tmp_path / "text.csv"), 2) == [[2, 1, 3]] * 2  # [UNK]


def test_a_split_on_the_hub_by_name(monkeypatch):
    asked = []

    def load(*name, **options):
        asked.append((name, options))
        return Dataset.from_dict({"id": [0], "text": ["word1"]}).to_iterable_dataset()

    monkeypatch.setattr(streams_module, "load_dataset", load)
    assert text_of(first(stream_of("name/corpus:en:train"), 1)) == ["word1"]
    assert asked == [(("name/corpus", "en"), {"split": "train", "streaming": True})]


# In which order


@packings
def test_the_order_follows_from_the_seed(tmp_path, packing):
    file = write(tmp_path / "text.txt", sentences(40))
    orders = [first(stream_of(file, packing=packing, batch_size=4, seed=seed), 60) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_each_pass_has_an_order_of_its_own(tmp_path):
    rows = text_of(first(stream_of(write(tmp_path / "text.txt", sentences(40)), buffer_size=16), 80))
    assert rows[:40] != rows[40:]
    assert rows[:40] != sentences(40)


# What a sequence is


def test_sequences_of_rows_are_cut(tmp_path):
    row = next(iter(stream_of(write(tmp_path / "text.txt", ["word1 word2 word3"]), 4)))
    assert row == {"input_ids": [2, 6, 7, 3], "token_type_ids": [0] * 4, "attention_mask": [1] * 4}


def test_packed_sequences_by_hand(tmp_path):
    file = write(tmp_path / "text.txt", ["word1 word2"])
    # [CLS] 1 2 [SEP] 1 [SEP], then 2 of the row that was begun
    assert first(stream_of(file, 6, packing="packed"), 3) == [
        [2, 6, 7, 3, 6, 3],
        [2, 7, 3, 6, 7, 3],
        [2, 6, 7, 3, 6, 3],
    ]
    # No room for a token and its [SEP] behind the row.
    assert first(stream_of(file, 5, packing="packed"), 2) == [[2, 6, 7, 3]] * 2


def test_packing_loses_nothing(tmp_path):
    file = write(tmp_path / "text.txt", [*sentences(40), " ".join(f"word{i}" for i in range(50))])
    words = " ".join(text_of(first(stream_of(file, 60), 82))).split()  # of two passes, whole rows
    packed = first(stream_of(file, packing="packed"), 40)
    packed_words = " ".join(text_of(packed)).split()
    assert packed_words == words[: len(packed_words)]
    assert len(packed_words) > len(words) / 2
    for ids in packed:
        assert len(ids) in (11, 12)
        assert [i for i, token in enumerate(ids) if token == 2] == [0]
        assert ids[1] != 3
        assert ids[-1] == 3


def test_sequences_grouped_by_length_need_little_padding(tmp_path):
    file = write(tmp_path / "text.txt", sentences(300))
    count = 2 * 64 * 4

    def padding(packing: str) -> float:
        lengths = [len(ids) for ids in first(stream_of(file, packing=packing, batch_size=4, buffer_size=100), count)]
        longest = [max(lengths[i : i + 4]) for i in range(0, count, 4)]
        assert longest[:64] != sorted(longest[:64])  # batches come in random order
        return 1 - sum(lengths) / (4 * sum(longest))

    assert padding("length") < 0.02 < 0.2 < padding("none")
    sequences = [sorted(first(stream_of(file, packing=packing, batch_size=4), count)) for packing in ("length", "none")]
    assert sequences[0] == sequences[1]


def test_a_tokenizer_without_token_types(tmp_path):
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5, "b": 6}
    file = write(tmp_path / "text.txt", ["ab"])
    stream = TextStream(file, RobertaTokenizerFast(vocab=vocabulary, merges=[]), 7, packing="packed")
    assert next(iter(stream)) == {"input_ids": [0, 5, 6, 2, 5, 6, 2], "attention_mask": [1] * 7}


# Refused


@pytest.mark.parametrize("source", ["missing.parquet", "*.parquet", "notes.md", "empty"])
def test_a_source_that_is_not_there(tmp_path, source):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no such file, and no folder or pattern"):
        stream_of(tmp_path / source)


def test_files_of_two_types(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        write(tmp_path / name, ["word1"])
    with pytest.raises(DataError, match="files of one type are needed"):
        stream_of(tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_column_that_is_not_there(tmp_path, suffix):
    with pytest.raises(DataError, match=r"no column 'text'; it has \['passage'\]"):
        stream_of(write(tmp_path / f"text{suffix}", ["word1"], column="passage"))


def test_a_column_that_one_of_the_files_lacks(tmp_path):
    write(tmp_path / "a.parquet", ["word1"])
    write(tmp_path / "b.parquet", ["word1"], column="passage")
    with pytest.raises(DataError, match=r"b\.parquet: no column 'text'"):
        stream_of(tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
def test_no_text_at_all(tmp_path, suffix):
    with pytest.raises(DataError, match="there are no rows with text"):
        stream_of(write(tmp_path / f"text{suffix}", ["", "  "]))


def test_damaged_and_empty_files(tmp_path):
    file = tmp_path / "text.parquet"
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"text\.parquet: cannot be read"):
        stream_of(file)
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"text\.parquet: the file is empty"):
        stream_of(file)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_numbers_are_no_text(tmp_path, suffix):
    with pytest.raises(
        DataError, match=r"'text' has values of type double, which are no text \(row 1 over all.*: 1\.5\)"
    ):
        stream_of(write(tmp_path / f"text{suffix}", [1.5, 2.5]))


def test_json_thatbegins_with_null(tmp_path):
    (tmp_path / "text.jsonl").write_text('null\n{"text": "word1"}\n')
    with pytest.raises(DataError, match="it begins with null"):
        stream_of(tmp_path / "text.jsonl")


def test_text_and_numbers_in_one_file(tmp_path):
    with pytest.raises(DataError, match=r"which are no text \(row 3 over all files, in the order of their names: 3\.5"):
        stream_of(write(tmp_path / "text.jsonl", ["word1", "word2", 3.5]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "tight"}, "packing must be one of none, length, packed, got 'tight'"),
        ({"buffer_size": 0}, r"buffer_size \(0\) must be at least 1"),
        ({"batch_size": 0}, r"batch_size \(0\)"),
    ],
)
def test_options_that_do_not_exist(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        stream_of(write(tmp_path / "text.txt", ["word1"]), **options)


# Resuming


@packings
@pytest.mark.parametrize("seen", [0, 7, 30, 100])
def test_a_stream_goes_on_from_any_place(tmp_path, packing, seen):
    """In the first pass over 40 rows and behind it; the sequences that a Trainer skips come before."""
    file = write(tmp_path / "text.txt", [*sentences(40), "  "])
    whole = stream_of(file, packing=packing, batch_size=4)
    expected = first(whole, 130)
    first(whole, seen + 5)  # the loader is ahead of the training
    state = json.loads(json.dumps(whole.state_dict(seen)))
    resumed = stream_of(file, packing=packing, batch_size=4)
    resumed.load_state_dict(state, num_skipped=20)
    assert first(resumed, 130 - seen + 20)[20:] == expected[seen:]
    assert resumed.state_dict(25) == whole.state_dict(seen + 5)


def test_a_place_that_is_not_known_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr(streams_module, "PLACES", 8)
    stream = stream_of(write(tmp_path / "text.txt", sentences(10)))
    expected = first(stream, 20)
    assert stream.state_dict(11) is None
    assert stream.state_dict(13) is not None
    stream.load_state_dict(stream.state_dict(13), 13)
    stream.load_state_dict(None, 13)
    assert first(stream, 20) == expected


def test_a_stream_of_other_options_is_not_resumed(tmp_path):
    file = write(tmp_path / "text.txt", sentences(10))
    state = stream_of(file, seed=1).state_dict(0)
    with pytest.raises(ValueError, match="buffer_size was 8, is 9, seed was 1, is 2"):
        stream_of(file, seed=2, buffer_size=9).load_state_dict(state, 0)


def stream_trainer(folder: Path, file: str, packing: str, **options):
    stream = stream_of(file, packing=packing, batch_size=4)
    data = {"train_dataset": stream, "data_collator": DataCollatorWithPadding(tiny_tokenizer())}
    models = stage_models("general", hidden_dropout_prob=0.1)
    return make_trainer(folder, "general", models, data, save_strategy="steps", save_steps=3, **options)


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 2), (2, 1)])
@packings
@pytest.mark.parametrize("places", [True, False])
def test_a_resumed_training_ends_with_the_same_weights(tmp_path, packing, workers, accumulation, places, monkeypatch):
    """Within the first pass over 30 rows (step 3) and behind it (step 9); without a place, all is read again."""
    file = write(tmp_path / "text.txt", sentences(30))
    options = {"max_steps": 11, "dataloader_num_workers": workers, "gradient_accumulation_steps": accumulation}
    if not places:
        monkeypatch.setattr(TextStream, "state_dict", lambda self, num_sequences: None)
    whole = stream_trainer(tmp_path / "whole", file, packing, **options)
    whole.train()
    expected = weights_of(whole.model)
    for step in (3, 9):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert (checkpoint / "stream.json").is_file() == places
        resumed = stream_trainer(tmp_path / "resumed", file, packing, **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.state.global_step == 11
        for name, weight in weights_of(resumed.model).items():
            assert torch.equal(weight, expected[name]), (step, name)


# Processes


@packings
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_share_what_one_sees(tmp_path, packing, workers):
    """As accelerate makes their loaders; of each eight sequences each process has four."""
    for i in range(3):
        write(tmp_path / f"{i}.txt", sentences(20, 20 * i))
    stream = stream_of(tmp_path, packing=packing, batch_size=8)
    alone = first(stream, 80)
    loader = DataLoader(
        stream, batch_size=4, num_workers=workers, collate_fn=lambda rows: [r["input_ids"] for r in rows]
    )
    shards = [
        prepare_data_loader(loader, num_processes=2, process_index=rank, dispatch_batches=False) for rank in (0, 1)
    ]
    assert isinstance(shards[0].dataset, IterableDatasetShard)
    batches = [list(islice(shard, 10)) for shard in shards]
    for step, (one, other) in enumerate(zip(*batches, strict=True)):
        assert one + other == alone[8 * step : 8 * step + 8]


def test_a_stream_can_be_sent_to_a_process_and_has_no_length(tmp_path):
    stream = stream_of(write(tmp_path / "text.txt", sentences(10)))
    with pytest.raises(TypeError):
        len(stream)
    loader = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert [row["input_ids"] for row in islice(loader, 20)] == first(stream, 20)


@pytest.mark.skipif(not TEXT_EN.is_dir(), reason="the English corpus is not here")
def test_a_corpus_is_not_read_at_once():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first(stream_of(TEXT_EN, 128, packing="packed", buffer_size=1000), 500)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 300, f"{grown} MB"  # its 529,125 rows are 55 MB compressed, and hundreds in memory
