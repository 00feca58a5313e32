"""The app of examples/space as a process, and its page in headless Chromium.

As a script it takes the picture of the documentation:

    python tests/space_page.py docs/pictures/space.png
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

SPACE = Path(__file__).parent.parent / "examples" / "space"
FLAGS = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run"]
FLAGS += ["disable-background-networking", "disable-component-update", "disable-sync"]
SIZE = {"width": 1280, "height": 765}  # of the window, with all of the page
WAIT = 120_000  # ms: a busy machine is slow


@contextmanager
def running_app(folder: Path, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Starts `folder/app.py`, which chooses a free port, and yields the address of its page."""
    environment = {**environment, "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    command = [sys.executable, "-u", str(folder / "app.py")]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as app,
    ):
        try:
            for line in app.stdout:
                if address := re.search(r"http://[\d.:]+", line):
                    yield address.group() + "/"
                    break
            else:
                errors.seek(0)
                raise RuntimeError(errors.read())
        finally:
            app.terminate()


@contextmanager
def chromium() -> Iterator[Page]:
    """An empty page in a browser with a profile of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=[f"--{flag}" for flag in FLAGS]
        )
        page = browser.new_page(viewport=SIZE)
        page.set_default_timeout(WAIT)
        expect.set_options(timeout=WAIT)
        yield page
        browser.close()


def picture_of(page: Page) -> Locator:
    """The raster. It appears after the class and the energy, and the page has other images: those of its footer."""
    return page.get_by_alt_text("plot visualising")


def take_picture(file: Path) -> None:
    """Of the first sentence, in 256 colours: less than half of the bytes."""
    with running_app(SPACE) as address, chromium() as page:
        page.goto(address)
        page.get_by_text("SpikeBERT, 1 time step").wait_for()
        picture_of(page).wait_for()
        page.wait_for_load_state("networkidle")
        picture = Image.open(BytesIO(page.screenshot()))
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]))
