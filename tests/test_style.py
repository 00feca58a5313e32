"""Format, lint, types and commit hooks, so that the one test command checks them too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import copy_tracked_files

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", ["ruff format --check", "ruff check", "mypy"])
def test_style(command):
    result = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_hooks_pass_on_all_files(tmp_path):
    """On a copy, for they mend what they find. They are tools of this environment: nothing is fetched."""
    copy = tmp_path / "copy"
    copy_tracked_files(copy)
    for command in ("git init --quiet", "git add --all"):
        subprocess.run(command.split(), cwd=copy, check=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PRE_COMMIT_HOME": str(tmp_path), "SKIP": "ruff-format,ruff-check"}
    hooks = [sys.executable, "-m", "pre_commit", "run", "--all-files", "--color", "never"]
    result = subprocess.run(hooks, cwd=copy, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("Passed") >= 4


def test_ci_runs_the_command_of_the_readme():
    install = 'pip install -c constraints.txt -e ".[quickstart,test]"'
    command = f"{install} && pip install -c constraints.txt --no-deps neurobench spikingjelly && pytest"
    for file in ("README.md", ".ci/run"):
        assert command in (ROOT / file).read_text().splitlines(), file
    for part in command.split(" && "):
        assert f"\t{part}\n" in (ROOT / "Makefile").read_text(), part
