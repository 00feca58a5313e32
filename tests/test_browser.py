"""The page of examples/browser: what it loads, and that it computes what Python does, in headless Chromium."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tiny_onnx import LABELS, write_folder
from tiny_training import tiny_tokenizer

BROWSER = Path(__file__).parent.parent / "examples" / "browser"
CHROMIUM = shutil.which("chromium")
MISSING = [name for name in ("node", "chromium") if shutil.which(name) is None]
MISSING += [] if (BROWSER / "node_modules").is_dir() else ["examples/browser/node_modules (npm ci makes it)"]
needs_chromium = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

# Known and unknown words, capitals, accents, punctuation, other scripts, and more tokens than the model takes.
TEXTS = [
    *(" ".join(f"word{(7 * i + j) % 59}" for j in range(1 + i % 9)) for i in range(12)),
    "WORD1, Word2! (word3)",
    "naïve wörd1 ward2",
    "word1\u00a0word2\tword3\nword4",
    "电影 word5 好看",
    "word6 😀 word7",
    "…",
    " ".join(["word8"] * 40),
    "word9word10 word-11",
]


def test_package_lock_names_versions_and_no_host():
    lock = json.loads((BROWSER / "package-lock.json").read_text(encoding="utf-8"))
    package = json.loads((BROWSER / "package.json").read_text(encoding="utf-8"))
    assert all("resolved" not in entry for entry in lock["packages"].values())
    pinned = package["dependencies"] | package["devDependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in pinned.values())
    for name, version in pinned.items():
        assert lock["packages"][f"node_modules/{name}"]["version"] == version


def test_the_page_names_no_other_host():
    for file in ("index.html", "app.js", "sw.js", "style.css"):
        hosts = set(re.findall(r"https?://[\w.-]+", (BROWSER / file).read_text(encoding="utf-8")))
        assert hosts <= {"http://www.w3.org"}, file  # the name of SVG


@dataclass
class Page:
    """The page in a browser; `server` is what it was loaded from."""

    server: subprocess.Popen
    driver: subprocess.Popen
    url: str

    def tell(self, **command: Any) -> dict[str, Any]:
        self.driver.stdin.write(json.dumps(command) + "\n")
        self.driver.stdin.flush()
        line = self.driver.stdout.readline()
        if not line:
            pytest.fail(self.driver.communicate()[1])
        return json.loads(line)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory) -> Iterator[Page]:
    copy = tmp_path_factory.mktemp("browser")
    for file in BROWSER.iterdir():
        if file.name != "site":
            (copy / file.name).symlink_to(file)
    # A script that is a link counts as the file that it points to, and would write there.
    for script in ("copy.mjs", "check.mjs"):
        (copy / script).unlink()
        shutil.copy(BROWSER / script, copy)
    copied = subprocess.run(["node", "copy.mjs", str(folder)], cwd=copy, capture_output=True, text=True, timeout=60)
    assert copied.returncode == 0, copied.stderr
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(copy / "site")]
    with subprocess.Popen(command, **pipes | {"stderr": subprocess.DEVNULL}) as server:
        url = re.search(r"http://[\d.:]+/", server.stdout.readline()).group()
        environment = os.environ | {"HOME": str(copy)}
        with subprocess.Popen(["node", "check.mjs", CHROMIUM, url], cwd=copy, env=environment, **pipes) as driver:
            yield Page(server, driver, url)
            driver.stdin.close()
            driver.wait(timeout=30)
        server.terminate()


def python_outputs(folder: Path, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Token ids, logits [C] and logits of each time step [T, C]."""
    inputs = tiny_tokenizer()([text], truncation=True, return_tensors="np")
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    feeds = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logits, per_step = session.run(["logits", "logits_per_step"], feeds)
    return inputs["input_ids"][0].tolist(), logits[0], per_step[:, 0]


def check(results: list[dict[str, Any]], folder: Path) -> None:
    for text, result in zip(TEXTS, results, strict=True):
        ids, logits, per_step = python_outputs(folder, text)
        assert result["ids"] == ids, text
        np.testing.assert_allclose(result["logits"], logits, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result["steps"], per_step, rtol=1e-5, atol=1e-6)
        probabilities = np.exp(logits) / np.exp(logits).sum()
        assert result["classes"][0]["label"] == LABELS[logits.argmax()]
        assert [each["label"] for each in result["classes"]] == [LABELS[i] for i in np.argsort(-logits)]
        np.testing.assert_allclose([each["score"] for each in result["classes"]], sorted(probabilities)[::-1], 1e-5)


@needs_chromium
def test_the_page_computes_what_python_does_with_and_without_a_network(page, folder):
    answer = page.tell(texts=TEXTS)
    check(answer["results"], folder)
    assert answer["errors"] == []
    assert {url for url in answer["requests"] if not url.startswith(page.url)} <= {"data:,"}

    typed = page.tell(type="word1 word2")
    _, logits, _ = python_outputs(folder, "word1 word2")
    probability = np.exp(logits).max() / np.exp(logits).sum()
    assert typed["shown"][0].split() == [LABELS[logits.argmax()], f"{100 * probability:.1f}", "%"]
    assert re.fullmatch(r"\d+\.\d ms for 4 tokens; median of \d+: \d+\.\d ms", typed["status"])
    assert typed["lines"] == len(LABELS)  # a line for each class over the time steps

    page.server.kill()
    page.server.wait()
    answer = page.tell(texts=TEXTS)  # opens the page again
    check(answer["results"], folder)
    assert answer["errors"] == []


@pytest.mark.skipif(shutil.which("node") is None, reason="not installed: node")
def test_copy_says_what_is_missing(tmp_path):
    def message(*arguments: str) -> str:
        result = subprocess.run(
            ["node", "copy.mjs", *arguments], cwd=BROWSER, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 1
        return result.stderr

    assert message() == "copy: name a folder: npm run copy -- FOLDER [FILE]\n"
    assert f"{tmp_path}/onnx has no model_int8.onnx and no model.onnx; `spikebert export" in message(str(tmp_path))
