"""`examples/one_bit_bert.py`: what the dense twin computes, and that it learns by the recipe of a student."""

import json
import random
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import flags, make_neurons_fire
from tiny_training import BERT_SIZES, LABELS, tiny_teacher, tiny_tokenizer
from transformers import BertForSequenceClassification

from modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification

EXAMPLE = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "one_bit_bert.py"))


def twin() -> SpikeBertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = SpikeBertForSequenceClassification(SpikeBertConfig(**sizes, num_time_steps=1, tau=1.0)).eval()
    make_neurons_fire(model)
    return EXAMPLE["dense_twin"](model)


def test_signals_are_signs_and_attention_is_a_softmax():
    model = twin()
    seen = {}
    attention = model.spikebert.encoder.layer[0].attention
    for name, module in attention.named_children():
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: (args[0], out)}))
    model(torch.randint(0, 40, (2, 5)))
    signs = {name: seen[f"{name}_neuron"][1] for name in ("input", "query", "key", "value", "context")}
    for name, value in signs.items():
        assert value.unique().tolist() == [-1.0, 1.0], name
    query, key, value = (signs[name].view(2, 5, 2, 8).transpose(1, 2) for name in ("query", "key", "value"))
    mixed = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1) @ value  # [B, H, L, d]
    torch.testing.assert_close(seen["context_neuron"][0].view(2, 5, 16), mixed.transpose(1, 2).flatten(2))


def test_padding_takes_no_part():
    model, ids, mask = twin(), torch.randint(0, 40, (2, 6)), torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    together = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(together[1:], model(ids[1:, :3]).logits)
    torch.testing.assert_close(together[:1], model(ids[:1]).logits)


def test_it_learns_from_a_teacher_in_both_stages(tmp_path, capsys):
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    teacher = tiny_teacher(BertForSequenceClassification, **BERT_SIZES)
    teacher.save_pretrained(tmp_path / "teacher")
    words = random.Random(0)
    rows = [" ".join(f"word{words.randrange(59)}" for _ in range(6)) for _ in range(16)]
    names = list(LABELS["id2label"].values())
    table = Dataset.from_dict({"text": rows, "label": [names[i % len(names)] for i in range(16)]})
    table.to_csv(tmp_path / "train.csv")
    table.select(range(4)).to_csv(tmp_path / "validation.csv")
    common = {
        "teacher": tmp_path / "teacher",
        "max_steps": 20,
        "logging_steps": 5,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    new = {"student_config": json.dumps({"num_hidden_layers": 1, "num_time_steps": 1})}
    text = {"stage": "general", "train_file": tmp_path / "train.csv"}
    assert EXAMPLE["main"](flags(**common, **new, **text, output_dir=tmp_path / "stage1")) == {}

    files = {"train_file": tmp_path / "train.csv", "validation_file": tmp_path / "validation.csv"}
    stage1 = {"model_name_or_path": tmp_path / "stage1", "output_dir": tmp_path / "twin"}
    metrics = EXAMPLE["main"](flags(**common, **files, **stage1))
    assert f"Projections: those of {tmp_path / 'stage1'}." in capsys.readouterr().out
    assert 0 <= metrics["eval_accuracy"] <= 1
    state = json.loads((tmp_path / "twin" / "eval_results.json").read_text())
    assert state["eval_loss_hidden_states"] == pytest.approx(metrics["eval_loss_hidden_states"])
    assert (tmp_path / "twin" / "model.safetensors").is_file()


def test_only_one_time_step_has_a_twin():
    model = SpikeBertForSequenceClassification(SpikeBertConfig(vocab_size=40, hidden_size=16, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"num_time_steps 1"):
        EXAMPLE["dense_twin"](model)
