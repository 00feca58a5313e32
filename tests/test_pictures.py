"""Spikes of a sentence, and the pictures of them: what they show, that they are the same each time and fit."""

import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from matplotlib.axis import Axis, Tick
from matplotlib.figure import Figure
from matplotlib.text import Text
from tiny_training import LABELS, VOCABULARY, tiny_teacher, tiny_tokenizer
from transformers import AutoTokenizer, BertTokenizerFast

from modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel
from modeling_spikebert.commands import main
from modeling_spikebert.energy import bert_of_same_shape, estimate_energy
from modeling_spikebert.modeling_spikebert import FIRING_RATE_NAMES
from modeling_spikebert.pictures import (
    StepAccuracy,
    accuracies_of,
    accuracy_by_steps,
    energy_by_layer,
    firing_rates,
    not_drawable,
    raster,
    save,
    scores_by_steps,
    spikes_of,
    words,
)

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "examples" / "checkpoints" / "spikebert-6x384-sst2"
SENTENCE = "A wonderful film, funny and moving."
LONG = " ".join(f"word{i % 59} multi-million-dollar $5 $6 很 🙂" for i in range(12))


@pytest.fixture(scope="module", params=["default", "reference"])
def model(request):
    return tiny_model(SpikeBertForSequenceClassification, request.param, num_time_steps=3, **LABELS)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def pieces() -> BertTokenizerFast:
    """A tokenizer that cuts words."""
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "un",
        "##fun",
        "##ny",
        "it",
        "'",
        "s",
        "well",
        "-",
        "made",
        ".",
    ]
    return BertTokenizerFast(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=16)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def outside(axis: Axis) -> list[Tick]:
    """Ticks that are not drawn, as they lie outside of the view."""
    low, high = sorted(axis.get_view_interval())
    return [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]


def figures_of(model, tokenizer, text: str) -> dict[str, Figure]:
    spikes = spikes_of(model, tokenizer, text)
    encoded = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
    reports = [estimate_energy(each, encoded) for each in (model, bert_of_same_shape(model))]
    accuracies = [StepAccuracy(steps, 0.5 + 0.1 * steps, 100) for steps in (1, 2, 4)]
    return {
        "raster": raster(spikes),
        "words": words(spikes),
        "firing_rates": firing_rates(spikes),
        "energy": energy_by_layer(*reports),
        "scores": scores_by_steps(spikes),
        "accuracy": accuracy_by_steps(accuracies, "reviews.csv"),
    }


# Spikes


def test_spikes_are_those_that_the_model_reports(model, tokenizer):
    spikes = spikes_of(model, tokenizer, "word1 word2 word3")
    outputs = model(**tokenizer("word1 word2 word3", return_tensors="pt"), output_firing_rates=True)
    assert len(spikes.spikes) == model.config.num_hidden_layers
    for block, reported in zip(spikes.spikes, outputs.firing_rates, strict=True):
        rates = dict(zip(FIRING_RATE_NAMES, reported[0].tolist(), strict=True))
        for name, fired in block.items():
            assert fired.dtype == torch.bool
            assert fired.shape == (3, 5, 64 if name == "intermediate" else 32)
            if name in rates and not (model.config.variant == "published" and name.endswith("_input")):
                assert fired.float().mean() == pytest.approx(rates[name])
    if model.config.variant == "membrane":
        assert list(spikes.spikes[0]) == list(FIRING_RATE_NAMES)
        assert spikes.rates.shape == (2, 7)
    assert 0 < spikes.firing_rate < 1


def test_scores_after_some_steps_are_those_of_a_model_with_so_many(model, tokenizer):
    spikes = spikes_of(model, tokenizer, "word1 word2 word3", 4)
    assert spikes.num_time_steps == 4
    inputs = tokenizer("word1 word2 word3", return_tensors="pt")
    for steps in (1, 2, 3, 4):
        expected = model(**inputs, num_time_steps=steps).logits[0].float()
        torch.testing.assert_close(spikes.logits[steps - 1], expected)
    label, score = spikes.answer
    assert label == spikes.labels[int(spikes.logits[-1].argmax())]
    assert score == pytest.approx(float(spikes.logits[-1].softmax(-1).max()))


def test_pieces_of_a_word_and_what_joins_words_are_one_word(tmp_path):
    model = tiny_model(SpikeBertForSequenceClassification)
    spikes = spikes_of(model, pieces(), "It's  unfunny, well-made.")
    assert spikes.words == ["It's", "unfunny", ",", "well-made", "."]
    assert spikes.word_of_token == [None, 0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4, None]
    assert len(spikes.tokens) == 13
    torch.testing.assert_close(spikes.word_rates[1], spikes.token_rates[4:7].mean())


def test_spikes_leave_the_model_as_it_is(tokenizer):
    model = tiny_model(SpikeBertForSequenceClassification).train()
    spikes_of(model, tokenizer, "word1")
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_classifier_has_spikes_and_no_scores(tokenizer):
    spikes = spikes_of(tiny_model(SpikeBertModel), tokenizer, "word1 word2")
    assert (spikes.logits, spikes.answer) == (None, None)
    assert "word1" in texts(raster(spikes))
    with pytest.raises(ValueError, match="has no classifier"):
        scores_by_steps(spikes)


def test_what_spikes_cannot_be_had_of(tokenizer):
    with pytest.raises(ValueError, match="Spikes need a SpikeBERT, got BertForSequenceClassification"):
        spikes_of(tiny_teacher(), tokenizer, "word1")
    with pytest.raises(ValueError, match="There is no word"):
        spikes_of(tiny_model(SpikeBertModel), tokenizer, " ")


def test_accuracies_are_those_of_single_sentences(model, tokenizer):
    sentences = [f"word{i} word{2 * i} {'word7 ' * (i % 5)}" for i in range(1, 20)]
    labels = [i % 3 for i in range(len(sentences))]
    for result in accuracies_of(model, tokenizer, sentences, labels, (1, 2)):
        if model.config.variant == "published":  # padding counts there
            continue
        predictions = [
            int(model(**tokenizer(text, return_tensors="pt"), num_time_steps=result.num_time_steps).logits.argmax())
            for text in sentences
        ]
        right = sum(predicted == label for predicted, label in zip(predictions, labels, strict=True))
        assert result.accuracy == right / len(sentences)
        assert result.standard_error == pytest.approx((result.accuracy * (1 - result.accuracy) / 19) ** 0.5)


def test_a_bert_of_the_same_shape(model):
    bert = bert_of_same_shape(model)
    assert type(bert).__name__ == "BertForSequenceClassification"
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_labels"):
        assert getattr(bert.config, name) == getattr(model.config, name)
    random = torch.random.get_rng_state()
    bert_of_same_shape(model)
    assert torch.equal(random, torch.random.get_rng_state())


# Pictures


def test_the_same_picture_gives_the_same_bytes(tokenizer, tmp_path):
    model = tiny_model(SpikeBertForSequenceClassification)
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        figures = figures_of(model, tokenizer, "word1 word2")
        for name, figure in [(name, figures[name]) for name in ("raster", "energy")]:
            assert [file.name for file in save(figure, tmp_path / place, name)] == [f"{name}.png", f"{name}.svg"]
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name
        assert b"<dc:date>" not in file.read_bytes()


@pytest.mark.parametrize(("text", "num_labels"), [("word1 word2 word3", 2), (LONG, 12)])
def test_texts_do_not_touch_and_stay_inside(text, num_labels):
    tokenizer = BertTokenizerFast(vocab={token: i for i, token in enumerate([*VOCABULARY, "multi", "-", "$"])})
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "num_labels": num_labels}
    model = tiny_model(SpikeBertForSequenceClassification, **options)
    for name, figure in figures_of(model, tokenizer, text).items():
        figure.draw_without_rendering()
        hidden = {tick.label1 for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in outside(axis)}
        boxes = [
            (artist.get_text(), artist.get_window_extent())
            for artist in figure.findobj(Text)
            if artist.get_text() and artist.get_visible() and artist not in hidden
        ]
        seen = [(text, box) for text, box in boxes if box.width and figure.bbox.overlaps(box)]
        assert len(seen) > 5
        for (one, box), (other, second) in combinations(seen, 2):
            inner = box.intersection(box, second)
            assert inner is None or inner.width * inner.height < 0.12 * min(
                box.width * box.height, second.width * second.height
            ), f"{name}: {one!r} lies over {other!r}"
        for shown, box in seen:
            assert box.x0 > -1, f"{name}: {shown!r}"
            assert box.x1 < figure.bbox.width + 1, f"{name}: {shown!r}"
            assert box.y1 < figure.bbox.height + 1, f"{name}: {shown!r}"


def test_a_raster_has_a_mark_for_each_spike(tokenizer):
    model = tiny_model(SpikeBertForSequenceClassification, num_time_steps=2)
    spikes = spikes_of(model, tokenizer, "word1 word2 word3")
    figure = raster(spikes)
    cells, marks = figure.axes[0].patches
    assert len(cells.get_path().to_polygons()) == 3 * 2 * 2  # words, time steps, blocks
    drawn = int(
        re.search(r"([\d,]+) of the 256 neurons of a block are drawn", " ".join(" ".join(texts(figure)).split()))[1]
    )
    assert drawn == 256
    fired = sum(int(layer[:, 1:-1].sum()) for block in spikes.spikes for layer in block.values())
    assert len(marks.get_path().to_polygons()) == fired
    shown = texts(figure)
    assert {"block 1", "block 2", "word1", "word2", "word3"} <= set(shown)
    assert spikes.answer[0] in shown


def test_words_bars_are_the_rates(model, tokenizer):
    spikes = spikes_of(model, tokenizer, "word1 word2 word3")
    heights = [bar.get_height() for bar in words(spikes).axes[0].patches]
    assert heights == pytest.approx((100 * spikes.word_rates).tolist())


def test_firing_rates_of_a_report_are_those_of_its_sentence(model, tokenizer):
    encoded = tokenizer("word1 word2 word3", return_tensors="pt")
    of_sentence = firing_rates(spikes_of(model, tokenizer, "word1 word2 word3")).axes[0]
    of_report = firing_rates(estimate_energy(model, encoded)).axes[0]
    numbers = [[text.get_text() for text in axis.texts] for axis in (of_sentence, of_report)]
    assert numbers[0] == numbers[1]
    labels = [[label.get_text() for label in axis.get_xticklabels()] for axis in (of_sentence, of_report)]
    assert labels[0] == labels[1]


def test_energy_of_layers_adds_up_to_that_of_the_sentence(model, tokenizer):
    encoded = tokenizer("word1 word2 word3", return_tensors="pt")
    student, teacher = (estimate_energy(each, encoded) for each in (model, tiny_teacher(num_hidden_layers=3)))
    figure = energy_by_layer(student, teacher)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["embeddings", "block 1", "block 2", "block 3", "classifier", "whole sentence"]
    for axis, energies in zip(
        figure.axes,
        [
            (student.published.energy_mj, teacher.published.energy_mj),
            (student.strict.energy_mj, teacher.strict.energy_mj),
            (student.memory_energy_mj, teacher.memory_energy_mj),
        ],
        strict=True,
    ):
        lines = [line for line in axis.lines if line.get_label() in (student.description, teacher.description)]
        for line, energy in zip(lines, energies, strict=True):
            *layers, whole = sorted(line.get_xdata())
            assert whole == pytest.approx(1e-3 * energy)
            assert sum(layers) == pytest.approx(whole)


def test_scores_of_other_problem_types(tokenizer):
    number = tiny_model(SpikeBertForSequenceClassification, problem_type="regression", num_labels=1)
    spikes = spikes_of(number, tokenizer, "word1 word2")
    assert spikes.answer[1] == pytest.approx(float(spikes.logits[-1, 0]))
    assert f"{spikes.answer[1]:.2f}" in texts(raster(spikes))
    assert "output" in texts(scores_by_steps(spikes))
    labels = tiny_model(SpikeBertForSequenceClassification, problem_type="multi_label_classification", num_labels=3)
    spikes = spikes_of(labels, tokenizer, "word1 word2")
    torch.testing.assert_close(spikes.scores, spikes.logits.sigmoid())
    with pytest.raises(ValueError, match="does not choose one class"):
        accuracies_of(labels, tokenizer, ["word1"], [0])


def test_characters_without_a_font_become_boxes(tmp_path):
    assert not_drawable("naïve $5\N{COMBINING ACUTE ACCENT}") == set()
    assert not_drawable("a\U000e0001\n") == {"\U000e0001", "\n"}
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\U00012000"])}
    model = tiny_model(SpikeBertForSequenceClassification)
    figure = raster(spikes_of(model, BertTokenizerFast(vocab=vocabulary), "\U00012000 $x$"))
    save(figure, tmp_path, "raster")  # a missing glyph would warn, and a warning is an error
    assert "□ $x$" in texts(figure)


def test_without_matplotlib_the_error_names_the_extra():
    code = "import sys; sys.modules['matplotlib'] = None; import modeling_spikebert.pictures"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "ImportError: Pictures need matplotlib" in result.stderr
    assert "'.[energy]'" in result.stderr


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32, **LABELS).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_show_writes_all_pictures(folder, tmp_path, capsys):
    main(["show", str(folder), "--text", "word1 word2", "--output-dir", str(tmp_path), "--num-time-steps", "2"])
    names = {"raster", "words", "firing_rates", "energy", "scores"}
    assert {file.name for file in tmp_path.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    shown = capsys.readouterr().out
    assert re.match(r"(bad|fair|good) \(\d+\.\d %\)\nspiking 2 x 32, T 2: ", shown)
    assert "BERT 2 x 32" in shown


def test_show_measures_accuracy_on_a_labelled_file(folder, tmp_path, capsys):
    rows = [f"word{i} word{i + 1},{('bad', 'fair', 'good')[i % 3]}" for i in range(30)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    options = ["--file", str(tmp_path / "reviews.csv"), "--num-sentences", "12", "--format", "svg"]
    main(["show", str(folder), "--text", "word1 很", "--output-dir", str(tmp_path / "pictures"), *options])
    names = {"raster.svg", "words.svg", "firing_rates.svg", "energy.svg", "accuracy.svg"}
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == names
    shown = capsys.readouterr().out
    assert [line.split(":")[0] for line in shown.splitlines()[1:5]] == ["T 1", "T 2", "T 4", "T 8"]


def test_show_next_to_a_teacher(folder, tmp_path, capsys):
    tiny_teacher(num_hidden_layers=3).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    options = ["--teacher", str(tmp_path / "teacher"), "--format", "png"]
    main(["show", str(folder), "--text", "word1", "--output-dir", str(tmp_path / "pictures"), *options])
    assert "BERT 3 x 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--text", " "], "spikebert show: --text is empty. Write at least one word."),
        (["--text", "a", "--num-time-steps", "0"], "spikebert show: --num-time-steps must be at least 1, got 0."),
        (["--text", "a", "--format", "pdf"], "spikebert show: argument --format: no choice 'pdf'; there is png, svg."),
        ([], "spikebert show: the following arguments are required: --text"),
    ],
)
def test_what_show_refuses(capsys, options, expected):
    with pytest.raises(SystemExit) as stopped:
        main(["show", "folder", *options])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(expected)


def test_show_of_a_bert_is_one_line(tmp_path):
    tiny_teacher().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="spikebert show: Spikes need a SpikeBERT, got BertForSequenceClassification"):
        main(["show", str(tmp_path), "--text", "word1", "--output-dir", str(tmp_path / "pictures")])
    assert not (tmp_path / "pictures").exists()


def test_help_has_an_example_that_exists(capsys):
    with pytest.raises(SystemExit):
        main(["show", "--help"])
    shown = capsys.readouterr().out
    assert f'spikebert show {CHECKPOINT.relative_to(ROOT)} --text "{SENTENCE}"' in shown


def test_the_picture_of_the_readme_is_made_by_the_command(tmp_path):
    """`spikebert show examples/checkpoints/spikebert-6x384-sst2 --text "A wonderful film, funny and moving."`

    Its raster.png lies in docs/pictures. Other versions of matplotlib draw it otherwise, so figures are compared here.
    """
    model = SpikeBertForSequenceClassification.from_pretrained(CHECKPOINT)
    spikes = spikes_of(model, AutoTokenizer.from_pretrained(CHECKPOINT), SENTENCE)
    assert spikes.words == ["A", "wonderful", "film", ",", "funny", "and", "moving", "."]
    assert (spikes.answer[0], round(spikes.answer[1], 3)) == ("positive", 0.999)
    figure = raster(spikes)
    assert {"99.9 %", "positive", "block 6", "wonderful"} <= set(texts(figure))
    assert "14 % of all neurons" in " ".join(" ".join(texts(figure)).split())
    picture = ROOT / "docs" / "pictures" / "raster.png"
    assert picture.stat().st_size < 150_000
    (drawn,) = save(figure, tmp_path, "raster", ["png"])
    width, height = (int.from_bytes(picture.read_bytes()[i : i + 4], "big") for i in (16, 20))
    assert drawn.read_bytes()[16:24] == picture.read_bytes()[16:24], (width, height)
