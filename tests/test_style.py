"""Format, lint and types, so that the one test command checks them too."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", ["ruff format --check", "ruff check", "mypy"])
def test_style(command):
    result = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ci_runs_the_command_of_the_readme():
    install = 'pip install -c constraints.txt -e ".[quickstart,test]"'
    command = f"{install} && pip install -c constraints.txt --no-deps neurobench && pytest"
    for file in ("README.md", ".ci/run"):
        assert command in (ROOT / file).read_text().splitlines(), file
