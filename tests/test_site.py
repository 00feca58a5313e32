"""The documentation as a site: Sphinx builds it without a warning, and every link inside it leads somewhere."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from runpy import run_path
from urllib.parse import unquote, urlsplit

import pytest
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

ROOT = Path(__file__).parent.parent
LINKS = {"a": "href", "img": "src", "script": "src", "link": "href"}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")


class Page(HTMLParser):
    """Anchors and links of a page: name of the tag, and address."""

    def __init__(self, file: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, str]] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.anchors.add(values.get("id") or "")
        if (address := values.get(LINKS.get(tag, ""))) is not None:
            self.links.append((tag, address))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder, warnings = tmp_path_factory.mktemp("site"), StringIO()
    with patch_docutils(ROOT / "docs"), docutils_namespace():
        app = Sphinx(ROOT, ROOT / "docs", folder, folder / ".doctrees", "html", status=None, warning=warnings)
        app.build()
    assert warnings.getvalue() == ""
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {file: Page(file) for file in sorted(site.rglob("*.html"))}


def links_of(pages: dict[Path, Page], inside: bool) -> Iterator[tuple[Path, str, str]]:
    for file, page in pages.items():
        for tag, address in page.links:
            if inside != bool(urlsplit(address).scheme or urlsplit(address).netloc):
                yield file, tag, address


def test_every_page_is_there(pages, site):
    names = {str(file.relative_to(site)) for file in pages}
    wanted = {f"docs/{page.stem}.html" for page in (ROOT / "docs").glob("*.md")}
    assert wanted | {"index.html", "README.html", "CONTRIBUTING.html", "CHANGELOG.html"} <= names


def test_links_inside_lead_somewhere(pages):
    found = 0
    for file, _, address in links_of(pages, inside=True):
        path = (file.parent / unquote(urlsplit(address).path)).resolve() if urlsplit(address).path else file
        assert path.exists(), (file.name, address)
        if path in pages and (anchor := unquote(urlsplit(address).fragment)):
            assert anchor in pages[path].anchors, (file.name, address)
            found += 1
    assert found > 100


def test_nothing_is_loaded_from_elsewhere(pages):
    """Links may lead to other sites, by https; scripts, styles, fonts and pictures may not come from there."""
    outside = list(links_of(pages, inside=False))
    assert len(outside) > 3
    for file, tag, address in outside:
        assert tag == "a", (file.name, address)
        assert urlsplit(address).scheme == "https", (file.name, address)
        assert "." in urlsplit(address).netloc, (file.name, address)


def test_docstrings_are_rendered(site):
    """Parts of a docstring become lists, and code in single backticks stays code."""
    html = (site / "docs" / "api.html").read_text(encoding="utf-8")
    for heading in ("Parameters", "Returns", "Raises"):
        assert f">{heading}<" in html
    assert "`" not in html


def test_equations_need_no_script(site):
    html = (site / "docs" / "distillation.html").read_text(encoding="utf-8")
    assert html.count("<math") > 20
    assert "\\" not in "".join(part.split("</math>")[0] for part in html.split("<math")[1:])


def test_diagrams_are_those_of_the_script(tmp_path):
    def shapes(folder: Path) -> list[str]:
        """Without names of elements, some of which matplotlib draws anew."""
        files = [(folder / name).read_text(encoding="utf-8") for name in script["FILES"]]
        return [re.sub(r'(?<=id=")\w+|(?<=#)\w+', "", file) for file in files]

    script = run_path(str(ROOT / "docs" / "diagrams.py"))
    script["main"](tmp_path)
    assert shapes(tmp_path) == shapes(ROOT / "docs" / "pictures")
