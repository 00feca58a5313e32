import os
import tempfile

# Before transformers, datasets and huggingface_hub read them: no network, and caches that go away.
_cache = tempfile.TemporaryDirectory(prefix="spikebert-tests-")
os.environ |= {"HF_HOME": _cache.name, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

import pytest  # noqa: E402
import torch  # noqa: E402

from modeling_spikebert import native_spikebert  # noqa: E402
from modeling_spikebert.energy import measure_cost  # noqa: E402

# Tiny tensors are many times faster on one thread, and pytest-xdist brings the processes.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def short_measurements():
    """Each command and script that ends with energies measures two models for a second each; here for a hundredth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_cost, "__defaults__", (0.01,))
        yield


@pytest.fixture
def kernels_at_once(monkeypatch):
    """The C++ kernels without gradients, too, however little was computed."""
    monkeypatch.setattr(native_spikebert, "WORTH_COMPILING", 0)


@pytest.fixture
def nan_in_new_memory():
    """For what a kernel does not write."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# Files whose tests start processes, train, or run a tool over the whole project. The others take a minute together.
SLOW = [
    "augmentation",
    "benchmarks",
    "checkpoints",
    "commands",
    "convert",
    "data",
    "distill",
    "distillation",
    "documented_commands",
    "examples_gpu",
    "hub",
    "imports",
    "nir",
    "notebook",
    "one_bit_bert",
    "onnx",
    "packaging",
    "real_text",
    "released",
    "scale",
    "serve",
    "site",
    "space",
    "streams",
    "style",
    "tasks",
    "teachers",
    "training",
    "triton",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker("slow")
    # A process takes whole files, so short ones go last: then no process is left with a long one.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
