"""What the documentation says of options, files and links."""

import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from modeling_spikebert import DistillationTrainingArguments
from modeling_spikebert.commands.options.augment import AugmentArguments
from modeling_spikebert.commands.options.distill import DataArguments, ModelArguments
from modeling_spikebert.data.settings import AugmentationSettings

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

HEADER = ("| option | default | |", "|---|---|---|")


def rows(*classes: Any) -> Iterator[str]:
    """The lines of a table of options, from the help texts of the command line."""
    inherited = {field.name for field in fields(TrainingArguments)}
    for cls in classes:
        for field in fields(cls):
            if cls is not DistillationTrainingArguments or field.name not in inherited:
                yield f"| `--{field.name.replace('_', '-')}` | {default_of(field)} | {field.metadata['help']} |"


def default_of(field: Field) -> str:
    if field.default is MISSING:
        return "required"
    return "" if field.default is None else f"`{field.default}`"


def tables() -> dict[str, list[str]]:
    return {
        "spikebert distill": [*HEADER, *rows(ModelArguments, DataArguments, DistillationTrainingArguments)],
        "spikebert augment": [*HEADER, *rows(AugmentArguments, AugmentationSettings)],
    }


def tables_of(text: str) -> list[list[str]]:
    """The lines of each table of a page."""
    groups = groupby(text.splitlines(), lambda line: line.startswith("|"))
    return [list(lines) for is_table, lines in groups if is_table]


@pytest.mark.parametrize("command", ["spikebert distill", "spikebert augment"])
def test_every_option_is_in_the_guide(command):
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    expected = tables()[command]
    assert len(expected) > 10
    (table,) = (table for table in tables_of(text) if expected[2] in table)
    assert table == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_have_one_header(page):
    """The line of dashes is the second of its table, and as wide as each row."""
    for table in tables_of(page.read_text(encoding="utf-8")):
        dashes = [i for i, line in enumerate(table) if re.fullmatch(r"[|: -]+", line) and "-" in line]
        assert dashes == [1], table[:4]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {table[1].count("|")}, table[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = re.findall(
        r"(?<![\w/])((?:examples|tests|docs|modeling_spikebert)/[\w/.-]+\.\w+)", page.read_text(encoding="utf-8")
    )
    assert [file for file in named if not (ROOT / file).exists()] == []
