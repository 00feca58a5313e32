"""The documentation as a site: `sphinx-build -c docs . site`, and then `site/index.html`.

The pages are Markdown that a forge shows as well, so the folder that Sphinx reads is the whole repository: links and
pictures are the same in both, and the README is the first page. Nothing is loaded from a network.
"""

import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

import modeling_spikebert

project = "SpikeBERT"
author = "The SpikeBERT package's contributors"
release = version = modeling_spikebert.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "examples/*/README.md", "examples/checkpoints/*/README.md"]
exclude_patterns = [".*", "build", "data", "dist", "examples/browser/[!R]*", "runs", "shared", "site"]

# Behind the README, which a forge shows without them.
CONTENTS = """

```{toctree}
:hidden:
:caption: Guides

Getting started <self>
docs/training
docs/data
docs/long_trainings
docs/deploy
```

```{toctree}
:hidden:
:caption: How it works

docs/how_it_works
docs/energy
docs/neuromorphic
```

```{toctree}
:hidden:
:caption: Results

docs/results
docs/performance
docs/notebook
docs/notebook_speed
```

```{toctree}
:hidden:
:caption: Reference

docs/options
docs/api
docs/distillation
docs/energy_rules
docs/architecture
```

```{toctree}
:hidden:
:caption: Project
:glob:

CONTRIBUTING
CHANGELOG
RELEASE
SECURITY
examples/checkpoints/*/README
examples/*/README
```
"""

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # named as on a forge
suppress_warnings = ["myst.header"]

default_role = "code"  # docstrings are written with single backticks, as in Markdown
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "SpikeBERT"
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"


def setup(app: Any) -> None:
    app.connect("source-read", add_contents)
    app.connect("build-finished", copy_first_page)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))


def add_contents(app: Any, name: str, source: list[str]) -> None:
    if name == root_doc:
        source[0] += CONTENTS


def copy_first_page(app: Any, exception: Exception | None) -> None:
    if exception is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.math_block) -> None:
    equation = convert(node.astext(), display="block")
    translator.body.append(f'<div style="overflow: auto hidden; padding: 0.5em 0">{equation}</div>')
    raise nodes.SkipNode
