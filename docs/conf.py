"""How Sphinx makes the site: `make docs` builds it into build/docs/html, `make links` checks its external links.

Building needs no network, and reading the site needs none: names of other projects are found in docs/inventories,
MathJax comes from a package, and furo loads nothing from elsewhere.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from jupyter_cache import get_cache  # noqa: E402

import lorafair  # noqa: E402 - from this checkout

# Pages run the commands of this environment and the code of this checkout, in processes of their own, too.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two pages are made at a time
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
logging.getLogger("traitlets").setLevel(logging.WARNING)  # else a line for every notebook

project = "lorafair"
author = "the lorafair contributors"
project_copyright = author
release = version = lorafair.__version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "whole_streams",
    "lorafair_reference",
    "results_tables",
]
exclude_patterns = ["data"]  # its README is read on GitHub
nitpicky = True
nitpick_ignore = [("py:exc", "DataError"), ("py:class", "ImageTransform")]  # a LorafairError; a callable
nitpick_ignore_regex = [(r"py:class", r"lorafair\..*\.(T|Method|Kind)")]  # type variables

# Markdown and notebooks. A page whose header names a kernel is run; its output is kept in build/ alone.
source_suffix = {".md": "myst-nb"}
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_timeout = 240
nb_execution_show_tb = True
nb_merge_streams = True


def _digest_of_sources() -> str:
    """Of the code and configurations that pages run: output of other code is not taken from the cache."""
    found = sorted(
        path for folder in ("lorafair", "conf", "examples", "docs/_ext") for path in (ROOT / folder).rglob("*.*")
    )
    digest = hashlib.sha256()
    for path in found:
        if path.suffix in {".py", ".yaml"}:
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


nb_execution_cache_path = str(ROOT / "build" / "docs" / f"executed-{_digest_of_sources()}")

# The Python API.
default_role = "code"  # docstrings are Markdown in this
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# The names that the pages link to, as text files ("inventory version 1"): the same site with and without network.
intersphinx_mapping = {
    "numpy": ("https://numpy.org/doc/stable/", "inventories/numpy.inv"),
    "python": ("https://docs.python.org/3/", "inventories/python.inv"),
    "torch": ("https://docs.pytorch.org/docs/stable/", "inventories/torch.inv"),
    "lightning": ("https://lightning.ai/docs/fabric/stable/", "inventories/lightning.inv"),
    "torchmetrics": ("https://lightning.ai/docs/torchmetrics/stable/", "inventories/torchmetrics.inv"),
    "timm": ("https://huggingface.co/docs/timm/", "inventories/timm.inv"),
}

linkcheck_anchors = False  # many sites make theirs with scripts
linkcheck_timeout = 20
linkcheck_ignore = [r"http://localhost.*"]

# Formulas: one file without fonts of its own, so that every browser draws them offline and from file://. The package is
# not used as an extension, because it does not say that pages may be read side by side.
_mathjax = Path(str(files("sphinx-mathjax-offline")), "static", "mathjax", "tex-svg.js")
mathjax_path = "tex-svg.js"

html_theme = "furo"
html_title = f"lorafair {version}"
html_static_path = ["_static", str(_mathjax)]
html_css_files = ["site.css"]
html_show_sphinx = False
html_theme_options = {
    "source_repository": "https://github.com/lorafair/lorafair/",
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True


def _spread_tutorials(app: Any, env: Any, docnames: list[str]) -> None:
    """Sphinx gives each process a stretch of the list; the pages that take long must not be in one stretch."""
    slow = [name for name in docnames if name.startswith("tutorials/")]
    rest = [name for name in docnames if name not in slow]
    every = max(1, len(rest) // max(1, len(slow)))
    docnames[:] = [name for at in range(len(slow)) for name in (slow[at], *rest[at * every : (at + 1) * every])]
    docnames += rest[len(slow) * every :]


def _keep_colons(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon in the docstring of an attribute, or below Returns, for its type."""
    first = 0 if what in ("attribute", "property") else lines.index("Returns:") + 1 if "Returns:" in lines else None
    if lines and first is not None:
        indent = " " * (len(lines[first]) - len(lines[first].lstrip()))
        lines[first : first + 1] = lines[first].replace(": ", f":\n{indent}", 1).split("\n")


def setup(app: Any) -> None:
    """Sphinx calls it."""
    get_cache(nb_execution_cache_path).db.dispose()  # made here, and not by two processes at once
    app.connect("env-before-read-docs", _spread_tutorials)
    app.connect("autodoc-process-docstring", _keep_colons, priority=100)  # before napoleon
