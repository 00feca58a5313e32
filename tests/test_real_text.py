"""Real sentences in batches with others: what the default model promises, and how often float32 falls short of it.

Run with `-s` (or `-rP`) to see the count.
"""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.data import bundled
from modeling_spikebert.data.bundled import bundled_teacher, bundled_tweets

NUM_SENTENCES = 32


@pytest.fixture(scope="module")
def student_and_text():
    try:
        folder, text = bundled_teacher(), bundled_tweets().validation
    except ImportError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    teacher = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    student = SpikeBertForSequenceClassification.from_teacher(teacher, num_hidden_layers=3).eval()
    return student, AutoTokenizer.from_pretrained(folder), text[:NUM_SENTENCES]["text"]


def logits_alone_and_together(student, tokenizer, sentences):
    with torch.no_grad():
        alone = torch.cat([student(**tokenizer(s, return_tensors="pt", truncation=True)).logits for s in sentences])
        together = student(**tokenizer(sentences, return_tensors="pt", truncation=True, padding=True)).logits
    return (alone - together).abs().amax(1)


def test_logits_do_not_depend_on_the_batch_in_float64(student_and_text):
    student, tokenizer, sentences = student_and_text
    assert logits_alone_and_together(student.double(), tokenizer, sentences).max() < 1e-10


def test_few_spikes_flip_in_float32(student_and_text):
    """Another shape rounds a product otherwise; where that moves a membrane across its threshold, a spike flips."""
    student, tokenizer, sentences = student_and_text
    difference = logits_alone_and_together(student.float(), tokenizer, sentences)
    flipped = int((difference > 1e-5).sum())
    print(f"{flipped} of {len(sentences)} sentences differ by more than 1e-5, at most by {difference.max():.1e}")
    assert flipped <= len(sentences) // 10


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # where there is no GPU
def test_example_of_two_stages(student_and_text, tmp_path, monkeypatch, capsys):
    """With few tweets and one step a stage: that the example runs as it stands, not what it reaches."""
    text = bundled_tweets()
    few = replace(text, train=text.train.select(range(64)), validation=text.validation.select(range(16)))
    monkeypatch.setattr(bundled, "bundled_tweets", lambda: few)
    monkeypatch.setattr(sys, "argv", ["two_stages.py", str(tmp_path), "1"])
    runpy.run_path(str(Path(__file__).parent.parent / "examples" / "two_stages.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "eval_accuracy" in printed
    assert any(label in printed.splitlines()[-1] for label in text.label_names)
    assert (tmp_path / "student" / "README.md").is_file()
