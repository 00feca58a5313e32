"""Imports go one way, and the files that travel with a checkpoint need nothing of the rest of the package."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import tiny_config
from tiny_training import tiny_tokenizer

import modeling_spikebert
from modeling_spikebert import SpikeBertForSequenceClassification

ROOT = Path(modeling_spikebert.__file__).parent
PACKAGE = "modeling_spikebert"
# What a checkpoint carries, each with the files among them that it may import.
FLAT = {
    "compiler_spikebert": set(),
    "native_spikebert": {"compiler_spikebert"},
    "triton_spikebert": set(),
    "norm_lif_spikebert": {"compiler_spikebert", "native_spikebert", "triton_spikebert"},
    "int8_spikebert": {"native_spikebert"},
    "spike_linear_spikebert": {"compiler_spikebert", "int8_spikebert", "native_spikebert"},
    "spike_attention_spikebert": {"compiler_spikebert", "native_spikebert", "triton_spikebert"},
    "configuration_spikebert": set(),
    "checks_spikebert": {"configuration_spikebert"},
    "loading_spikebert": set(),
    "teacher_spikebert": {"configuration_spikebert"},
    "quantization_spikebert": {"int8_spikebert"},
    "modeling_spikebert": {
        "checks_spikebert",
        "configuration_spikebert",
        "loading_spikebert",
        "native_spikebert",
        "norm_lif_spikebert",
        "quantization_spikebert",
        "spike_attention_spikebert",
        "spike_linear_spikebert",
        "teacher_spikebert",
    },
}
# Imported when a model is asked for int8 weights, and not before.
LATE = {"quantization_spikebert"}
# From the bottom up: a module imports only from layers below its own, or from its own sub-package.
LAYERS = [
    {"compiler_spikebert", "configuration_spikebert", "console", "lazy", "loading_spikebert", "triton_spikebert"},
    {"native_spikebert", "runtime"},
    {"int8_spikebert", "norm_lif_spikebert", "spike_attention_spikebert"},
    {"checks_spikebert", "quantization_spikebert", "spike_linear_spikebert", "teacher_spikebert"},
    {"modeling_spikebert"},
    {"export", "hub", "registration", "serving"},
    {"data", "energy"},
    {"distillation", "pictures"},
    {"neuromorphic"},
    {"commands"},
    {"__main__"},
]


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name inside it; "" is the package itself."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def statements(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports of a file, those inside functions and conditions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def internal_imports(name: str) -> set[str]:
    """The modules of the package that a module imports."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in statements(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    found.add(alias.name.partition(".")[2])
            continue
        if node.level:
            base = [part for part in package[: len(package) - node.level + 1] if part]
            target = base + (node.module.split(".") if node.module else [])
        elif node.module.split(".")[0] == PACKAGE:
            target = node.module.split(".")[1:]
        else:
            continue
        for alias in node.names:  # `from . import x` imports the module x, `from .x import y` the module x
            full = ".".join([*target, alias.name])
            found.add(full if full in MODULES else ".".join(target))
    return found


def external_imports(path: Path) -> set[str]:
    found = set()
    for node in statements(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif not node.level:
            found.add(node.module)
    return found


def layer_of(module: str) -> int:
    top = module.split(".")[0]
    return next(rank for rank, members in enumerate(LAYERS) if top in members)


def run_python(code: str, folder: Path) -> str:
    """Runs code in a fresh, isolated process: no current folder, no environment variables for Python."""
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, str(folder)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# The files that travel with a checkpoint


@pytest.mark.parametrize("name", FLAT)
def test_flat_file_imports_only_torch_transformers_and_the_standard_library(name):
    for module in external_imports(ROOT / f"{name}.py"):
        top = module.split(".")[0]
        # The decorator of huggingface_hub belongs to the way configs of transformers are written.
        allowed = top in sys.stdlib_module_names or top in {"torch", "transformers"}
        allowed = allowed or (name == "triton_spikebert" and top == "triton")  # in a `try`, so that it may be absent
        assert allowed or (name == "configuration_spikebert" and module == "huggingface_hub.dataclasses"), module


def test_flat_config_takes_only_the_decorator_from_huggingface_hub():
    names = [
        alias.name
        for node in statements(ROOT / "configuration_spikebert.py")
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("huggingface_hub")
        for alias in node.names
    ]
    assert names == ["strict"]


@pytest.mark.parametrize("name", FLAT)
def test_flat_file_imports_its_neighbours_in_one_direction(name):
    assert internal_imports(name) == FLAT[name]


@pytest.mark.parametrize("name", FLAT)
def test_flat_file_imports_its_neighbours_as_transformers_wants_it(name):
    """Remote code follows `from .x import y` only: one dot, one file, no absolute name of this package."""
    for node in statements(ROOT / f"{name}.py"):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module in FLAT
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] != PACKAGE
        else:
            assert all(alias.name.split(".")[0] != PACKAGE for alias in node.names)


def test_flat_files_work_in_a_folder_of_their_own(tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    for name in FLAT:
        shutil.copy(ROOT / f"{name}.py", folder)
    assert not (folder / "__init__.py").exists()
    code = f"""
import sys
sys.path.insert(0, sys.argv[1])
from alone.modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification
import torch
config = SpikeBertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
logits = SpikeBertForSequenceClassification(config)(torch.tensor([[1, 2, 3]])).logits
assert logits.shape == (1, 2) and logits.isfinite().all()
print(sorted(name for name in sys.modules if name.split(".")[0] in ("alone", {PACKAGE!r})))
"""
    assert run_python(code, tmp_path) == str(sorted(["alone", *(f"alone.{name}" for name in FLAT.keys() - LATE)]))


# The package


def test_no_cycle_of_imports():
    graph = {name: internal_imports(name) - {name} for name in MODULES}
    assert set().union(*graph.values()) <= set(MODULES), "an import of a module that does not exist"
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError with the cycle
    assert order.index("native_spikebert") < order.index("norm_lif_spikebert") < order.index("modeling_spikebert")


def test_imports_go_from_upper_layers_to_lower_ones():
    assert len(MODULES) > len(FLAT)
    for name in filter(None, MODULES):
        top = name.split(".")[0]
        for imported in internal_imports(name):
            assert imported, f"{name} imports the package itself"
            same = imported.split(".")[0] == top and top not in FLAT
            assert same or layer_of(imported) < layer_of(name), f"{name} imports {imported}"


def test_every_module_has_a_layer():
    known = set().union(*LAYERS)
    assert {name.split(".")[0] for name in MODULES if name} <= known, (
        "a new part of the package needs a place in LAYERS"
    )


def test_importing_the_package_costs_next_to_nothing():
    """Seconds of the import, next to those of torch and transformers in the same process; and what it imports."""
    code = f"""
import sys, time
sys.path.insert(0, sys.argv[1])
def loaded():
    return sorted(name for name in sys.modules if name.startswith("{PACKAGE}."))
from {PACKAGE}.commands import main
main(["--help"])
assert not {{"torch", "transformers", "numpy"}} & sys.modules.keys()
for name in ["{PACKAGE}", *loaded()]:
    del sys.modules[name]
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("{PACKAGE}")]

start = time.perf_counter()
import torch, transformers
middle = time.perf_counter()
import {PACKAGE}
end = time.perf_counter()
assert end - middle < max(0.3, (middle - start) / 3), (middle - start, end - middle)
assert loaded() == ["{PACKAGE}.lazy", "{PACKAGE}.registration"]

trainer = {PACKAGE}.DistillationTrainer
assert trainer.__module__.startswith("{PACKAGE}.distillation"), trainer.__module__
from transformers import Trainer
assert issubclass(trainer, Trainer)
"""
    run_python(code, ROOT.parent)


@pytest.mark.parametrize(
    "first",
    [
        f"import {PACKAGE}; from transformers import BertModel",  # imports the Auto classes half-way
        f"from transformers import AutoModel; import {PACKAGE}",
        f"from {PACKAGE}.modeling_spikebert import SpikeBertModel",
    ],
)
def test_auto_classes_know_the_package_whichever_is_imported_first(tmp_path, first):
    SpikeBertForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT.parent)!r})
{first}
from transformers import AutoConfig
assert type(AutoConfig.from_pretrained(sys.argv[1])).__module__ == "{PACKAGE}.configuration_spikebert"
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline
classify = pipeline("text-classification", model=sys.argv[1])
models = AutoModel.from_pretrained(sys.argv[1]), AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
from {PACKAGE} import SpikeBertForSequenceClassification, SpikeBertModel
assert [type(model) for model in (*models, classify.model)] == [
    SpikeBertModel, SpikeBertForSequenceClassification, SpikeBertForSequenceClassification
]
load = SpikeBertForSequenceClassification.from_pretrained
load(sys.argv[1], config=AutoConfig.from_pretrained(sys.argv[1]))
# It extends transformers by a method of quantisation, which only int8 weights need.
assert "{PACKAGE}.quantization_spikebert" not in sys.modules
load(sys.argv[1], quantization_config={{"quant_method": "spikebert_int8"}})
assert "{PACKAGE}.quantization_spikebert" in sys.modules
print(classify("word1")[0]["label"])
"""
    assert run_python(code, tmp_path / "model").startswith("LABEL_")


def test_every_public_name_exists_and_no_other_is_made_up():
    for name in modeling_spikebert.__all__:
        assert getattr(modeling_spikebert, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'DistillationTeacher'"):
        modeling_spikebert.DistillationTeacher  # noqa: B018
    assert set(modeling_spikebert.__all__) < set(dir(modeling_spikebert))
