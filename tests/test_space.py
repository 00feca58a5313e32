"""The Space of examples/space: pushed as its page says, started, and used in headless Chromium."""

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard
from local_hub import LocalHub
from transformers import AutoTokenizer

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.energy import estimate_energy

ROOT = Path(__file__).parent.parent
SPACE = ROOT / "examples" / "space"
CHECKPOINT = ROOT / "examples" / "checkpoints" / "spikebert-6x384-sst2"
PACKAGE = ROOT / "modeling_spikebert"

MISSING = [name for name in ("gradio", "matplotlib", "playwright") if find_spec(name) is None]
MISSING += [] if shutil.which("chromium") else ["chromium"]
needs_chromium = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="not installed: gradio")


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def imported_by(file: Path) -> set[str]:
    """What a file imports when it is imported itself, by the first part of the name."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names


def test_header_and_requirements_name_the_tested_versions_of_all_that_is_imported():
    card = SpaceCard.load(SPACE / "README.md").data
    assert card.sdk_version == pinned()["gradio"]
    assert (SPACE / card.app_file).is_file()
    assert len(card.short_description) <= 60  # the Hub refuses longer ones

    requirements = dict(line.split("==") for line in (SPACE / "requirements.txt").read_text().splitlines())
    assert requirements.items() <= pinned().items()
    files = [SPACE / "app.py", *PACKAGE.glob("*.py"), *(PACKAGE / "energy").glob("*.py")]
    files += (PACKAGE / "pictures").glob("*.py")
    imported = set.union(*map(imported_by, files)) - {"modeling_spikebert"}
    # Gradio is the Space's sdk, and transformers brings huggingface_hub.
    assert imported == requirements.keys() | {"gradio", "huggingface_hub"}


@needs_gradio
@pytest.mark.filterwarnings("ignore")  # those of gradio's import
def test_without_a_model_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("SPIKEBERT_MODEL", raising=False)
    app = shutil.copy(SPACE / "app.py", tmp_path)
    with pytest.raises(SystemExit, match="there is no model"):
        runpy.run_path(app)


def push(hub: LocalHub, home: Path) -> None:
    """Runs the commands of README.md that push the Space."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (SPACE / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    (commands,) = (block for block in blocks if block.startswith("hf "))
    for line in commands.splitlines():
        _, *arguments = shlex.split(line)
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", *arguments]
        result = subprocess.run(
            command, cwd=ROOT, env=hub.environment(home), capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr


@needs_chromium
def test_pushed_space_classifies_a_sentence_in_a_browser(tmp_path):
    from playwright.sync_api import expect
    from space_page import chromium, picture_of, running_app

    model = SpikeBertForSequenceClassification.from_pretrained(CHECKPOINT).eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)

    def expected(text: str, num_time_steps: int) -> tuple[str, str, str]:
        """Class, its probability and the energy, as the page should show them."""
        inputs = tokenizer(text, return_tensors="pt")
        model.config.num_time_steps = num_time_steps
        score, index = model(**inputs).logits.softmax(-1)[0].max(0)
        energy = estimate_energy(model, inputs).energy_with_memory_mj
        return model.config.id2label[int(index)], f"{100 * score:.1f} %", f"{energy:.2f} mJ"

    with LocalHub() as hub:
        push(hub, tmp_path / "home")
        for name, content in hub.commits("user/spikebert")[-1].files.items():
            file = tmp_path / "space" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        environment = hub.environment(tmp_path / "home") | {"SPIKEBERT_MODEL": "user/spikebert-6x384-sst2"}
        with running_app(tmp_path / "space", environment) as address, chromium() as page:
            requests, errors = [], []
            page.on("request", lambda request: requests.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(address)

            def shows(text: str, num_time_steps: int) -> None:
                steps = "1 time step" if num_time_steps == 1 else f"{num_time_steps} time steps"
                label, score, energy = expected(text, num_time_steps)
                bars = page.locator(".energy .bars").filter(has_text=f"SpikeBERT, {steps}{energy}")
                # Each part of the page changes in its own time.
                expect(bars).to_be_visible()
                expect(page.locator(".class h2")).to_have_text(label)
                expect(page.locator(".class .bars b").nth(0)).to_have_text(label)
                expect(page.locator(".class .bars b").nth(1)).to_have_text(score)

            shows("A wonderful film, funny and moving.", 1)  # that it opens with
            picture = picture_of(page)
            first = picture.get_attribute("src")
            assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 1000

            box, button = page.get_by_role("textbox", name="Sentence"), page.get_by_role("button", name="Classify")
            sentence = "It is <b>dull</b>, and so loud that I left early."
            box.fill(sentence)
            box.press("Enter")
            shows(sentence, 1)
            page.get_by_role("slider").fill("4")
            shows(sentence, 4)
            expect(picture).not_to_have_attribute("src", first)
            page.get_by_role("button", name="The plot is thin").click()
            shows("The plot is thin and the jokes are old.", 4)

            box.fill(" ")
            button.click()
            page.get_by_text("There is no word in ' '. Write at least one.").wait_for()

            assert errors == []
            assert {url for url in requests if not url.startswith((address, "data:", "blob:"))} == set()
