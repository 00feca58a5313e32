"""What all pictures share: colours, fonts, words that fit, and files that are the same each time."""

import logging
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from textwrap import fill

from matplotlib import font_manager, ft2font, rc_context
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Okabe and Ito, "Color universal design" (2008): told apart by colour-blind eyes. Black and yellow are left out.
BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"
GREY, PALE, INK = "#6B6B6B", "#EFEFEF", "#222222"

# matplotlib's own font has no Chinese, Japanese, Korean or emoji. What it lacks comes from the first of these that is
# installed and has it.
FALLBACK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "SimHei",
    "Microsoft YaHei",
    "PingFang SC",
    "Arial Unicode MS",
    "Noto Emoji",
    "Symbola",
)
NO_GLYPH = "□"
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a fallback font has no bold: it is drawn without
FORMATS = ("png", "svg")
DPI = 150


@cache
def fonts() -> tuple[str, ...]:
    """Those that are drawn with, the first one first."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed))


@cache
def _characters() -> frozenset[int]:
    """What these fonts can draw."""
    return frozenset(code for name in fonts() for code in ft2font.FT2Font(font_manager.findfont(name)).get_charmap())


def not_drawable(text: str) -> set[str]:
    """The characters that no installed font of ours has."""
    return {character for character in text if ord(character) not in _characters() or not character.isprintable()}


def drawable(text: str) -> str:
    """The text with a box for each character that no font has; marks without a picture of their own are left out."""
    boxes = {
        ord(character): "" if unicodedata.category(character) in ("Mn", "Cf", "Cc") else NO_GLYPH
        for character in not_drawable(text)
    }
    return text.translate(boxes)


def shortened(text: str, most: int) -> str:
    """At most so many characters, all of which can be drawn."""
    text = drawable(" ".join(text.split()))
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


@contextmanager
def style() -> Iterator[None]:
    """For everything that is drawn."""
    with rc_context(
        {
            "font.family": list(fonts()),
            "font.size": 10,
            "text.parse_math": False,  # a "$" in a sentence is a dollar
            "text.color": INK,
            "axes.edgecolor": GREY,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "xtick.color": INK,
            "ytick.color": INK,
            "legend.frameon": False,
            "figure.facecolor": "white",
            "axes.facecolor": "white",
        }
    ):
        yield


def new_figure(title: str, caption: str, height: float = 4.5) -> Figure:
    """A figure 8 inches wide, with its title above and a caption below."""
    figure = Figure(figsize=(8, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
    figure.supxlabel(fill(caption, 120), x=0.012, ha="left", fontsize=9, color=GREY)
    return figure


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Writes `folder/name.png`, `folder/name.svg`; the same picture gives the same bytes."""
    files = [folder / f"{name}.{kind}" for kind in formats]
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        for file in files:
            figure.savefig(file, dpi=DPI, metadata={"Date": None} if file.suffix == ".svg" else {"Software": None})
    return files
