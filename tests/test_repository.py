"""What the files around the code say: versions, bounds, the workflow and the example of CONTRIBUTING.md."""

import re
from configparser import ConfigParser
from types import SimpleNamespace

import pytest
import test_norm_lif
import yaml
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from modeling_spikebert import norm_lif_spikebert

SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")
EXTRAS = SETUP["options.extras_require"]


def requirements(text: str) -> dict[str, Requirement]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def pins_of(file: str) -> dict[str, str]:
    pins = requirements((ROOT / file).read_text(encoding="utf-8"))
    assert all(next(map(str, pin.specifier)).startswith("==") for pin in pins.values())
    return {name: next(iter(pin.specifier)).version for name, pin in pins.items()}


def test_one_version_everywhere():
    version = SETUP["metadata"]["version"]
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert next(name for name in headings if name != "Unreleased").split()[0] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version


def test_every_bound_is_one_of_the_lowest_versions_that_are_tested():
    bounds = requirements(SETUP["options"]["install_requires"])
    lowest = pins_of("constraints-lowest.txt")
    assert bounds.keys() == lowest.keys()
    for name, requirement in bounds.items():
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        assert bound.contains(lowest[name])
        assert lowest[name].startswith(bound.version), f"{requirement}, but {lowest[name]} was tested"


def test_tested_versions_lie_within_the_bounds_and_name_every_requirement():
    pins = pins_of("constraints.txt")
    for text in (SETUP["options"]["install_requires"], *EXTRAS.values()):
        for name, requirement in requirements(text).items():
            assert name in pins, f"constraints.txt has no {name}"
            assert requirement.specifier.contains(pins[name]), f"{requirement}, but {pins[name]} is pinned"


def test_constraints_are_in_alphabetical_order():
    names = list(requirements((ROOT / "constraints.txt").read_text(encoding="utf-8")))
    assert names == sorted(names)


def test_the_workflow_runs_the_script_of_ci_on_each_python_that_is_allowed():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    assert {"run": ".ci/run"} in jobs["tests"]["steps"]
    pythons = jobs["tests"]["strategy"]["matrix"]["python"]
    assert SETUP["options"]["python_requires"] == f">={pythons[0]}"
    tested = re.findall(r"Python :: (3\.\d+)$", SETUP["metadata"]["classifiers"], re.MULTILINE)
    assert set(tested) <= set(pythons)
    lowest = [step.get("run", "") for step in jobs["lowest-versions"]["steps"]]
    assert any("-c constraints-lowest.txt" in command for command in lowest)


def test_the_example_of_contributing_passes_the_tests_that_it_names():
    """The class as the page has it, in the module that it names, through the tests that `-k surrogate` selects."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names = dict(vars(norm_lif_spikebert))
    exec(blocks[0], names)
    listed = eval(blocks[1].removeprefix("SURROGATES = "), names | {"Triangle": test_norm_lif.Triangle})
    *known, new = listed
    assert known == test_norm_lif.SURROGATES
    assert isinstance(new, names["Sigmoid"])
    for form in test_norm_lif.FORMS.values():
        test_norm_lif.test_surrogate_gives_the_gradient_of_a_spike(form, new)
    test_norm_lif.test_surrogate_rises_from_0_to_1(new)
    wrong = SimpleNamespace(primitive=lambda x: new.primitive(x) ** 2)
    with pytest.raises(AssertionError):
        test_norm_lif.test_surrogate_rises_from_0_to_1(wrong)
