"""The documents site: `sphinx-build -W docs docs/_build/html`, which runs the notebooks."""

from __future__ import annotations

import inspect
import io
import re
import tokenize
from typing import Any

import advtransfer

project = "advtransfer"
author = "the authors of advtransfer"
release = advtransfer.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "notebooks/runs"]

html_theme = "sphinx_book_theme"
html_title = f"advtransfer {release}"
html_theme_options = {"show_toc_level": 2, "navbar_persistent": []}  # one search field, in the sidebar
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# A notebook is run again when it has changed, or when docs/_build is new.
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars

default_role = "code"  # single backticks in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings give shapes, units and dtypes
autodoc_default_options = {"exclude-members": "__init__, __new__"}
add_module_names = False


def field_comments(cls: type) -> dict[str, str]:
    """The comments behind the fields of a NamedTuple or a dataclass, which say what they are."""
    found, line_of = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline):
        if token.type == tokenize.COMMENT and (field := re.match(r"    (\w+): ", token.line)):
            found[field[1]] = token.string.lstrip("# ")
            line_of[token.start[0]] = field[1]
        elif token.type == tokenize.COMMENT and (field := line_of.get(token.start[0] - 1)):
            found[field] += " " + token.string.lstrip("# ")  # goes on in the next line
            line_of[token.start[0]] = field
    return found


def document_fields(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what == "class" and not any(
        line.startswith((".. attribute", ":ivar", "Attributes")) for line in lines
    ):
        comments = field_comments(obj) if getattr(obj, "__annotations__", None) else {}
        for field, comment in comments.items():
            lines += ["", f".. attribute:: {field}", "   :no-index:", "", f"   {comment}"]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", document_fields, priority=900)  # after napoleon
