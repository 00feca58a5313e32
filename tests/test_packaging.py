"""The sdist and the wheel: what they hold, and that they work where nothing else of this package is.

The wheel is built from the sdist, so what it can do the sdist holds. Dependencies are those of this environment: the
new one looks into its folders, and nothing is fetched.
"""

import subprocess
import sys
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from helpers import ROOT, copy_tracked_files

CHECKPOINT = ROOT / "examples" / "checkpoints" / "spikebert-6x384-sst2"
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")
VERSION = SETUP["metadata"]["version"]

CLASSIFY = """
import sys
import modeling_spikebert
from transformers import pipeline
classify = pipeline("text-classification", model=sys.argv[1])  # with the code that is installed
print(modeling_spikebert.__file__, modeling_spikebert.__version__, classify(sys.argv[2])[0]["label"])
"""


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Suffix to file, of a build on a copy: setuptools writes next to its sources."""
    folder = tmp_path_factory.mktemp("build")
    copy_tracked_files(folder / "source")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=folder / "source")
    files = sorted((folder / "dist").iterdir())
    assert [path.name for path in files] == [
        f"modeling_spikebert-{VERSION}-py3-none-any.whl",
        f"modeling_spikebert-{VERSION}.tar.gz",
    ]
    return dict(zip(("wheel", "sdist"), files, strict=True))


def environment(folder: Path, distribution: Path) -> Path:
    """The programs of a new environment with this distribution; its own folder comes before those of this one."""
    venv.create(folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("-packages")]  # plain lines: their own .pth files do not run
    (site_packages / "others.pth").write_text("\n".join(others))
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", folder / "bin" / "python", "install"]
    run(*pip, "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", distribution, cwd=folder)
    return folder / "bin"


def test_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built["wheel"]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "modeling_spikebert").rglob("*.py")}
    others = {"py.typed", "hub/model_card.md", "runtime/spike_operators.cpp"}
    assert names == code | {f"modeling_spikebert/{name}" for name in others}
    assert built["wheel"].stat().st_size < 1e6


def test_sdist_holds_what_the_wheel_is_built_from_and_no_weights(built):
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names > {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
    assert not [name for name in names if name.startswith(("tests", "examples", "docs"))]
    assert built["sdist"].stat().st_size < 1e6


def test_wheel_works_in_an_empty_environment(built, tmp_path):
    programs = environment(tmp_path / "environment", built["wheel"])
    assert "--train-file" in run(programs / "spikebert", "quickstart", "--help", cwd=tmp_path)
    classify = (programs / "python", "-c", CLASSIFY, CHECKPOINT, "A wonderful film, funny and moving.")
    file, version, label = run(*classify, cwd=tmp_path).split()
    assert Path(file).is_relative_to(tmp_path)
    assert (version, label) == (VERSION, "positive")


def test_sdist_installs_the_same_files(built, tmp_path):
    programs = environment(tmp_path / "environment", built["sdist"])
    assert VERSION in run(programs / "spikebert", "--version", cwd=tmp_path)
    (package,) = tmp_path.glob("environment/lib/python*/site-packages/modeling_spikebert")
    installed = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if path.suffix != ".pyc"}
    with zipfile.ZipFile(built["wheel"]) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} <= installed
