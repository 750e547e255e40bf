"""Settings of Sphinx. `python -m tox -e docs` builds the site."""

import os
import pathlib
import sys
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "numpy")  # enough to read docstrings

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import notebooks
import result_tables
from sphinx.util import inspect

import keras_ssattn

project = "keras_ssattn"
author = project_copyright = "The keras_ssattn authors"
version = release = keras_ssattn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_generated", "notebooks"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "keras_ssattn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_style = "tango"

default_role = "literal"  # single backquotes in docstrings are code
add_module_names = False
autodoc_member_order = "groupwise"
autodoc_typehints = "none"  # the sections of a docstring say what an argument may be
autodoc_inherit_docstrings = False  # Keras's own, of `call` and `build`
napoleon_custom_sections = [("Call arguments", "params_style")]
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
nitpicky = True


def skip(app: Any, what: str, name: str, member: Any, skipped: bool, options: Any) -> bool:
    """Leaves out the fields of named tuples, which the class describes."""
    return skipped or (getattr(member, "__doc__", None) or "").startswith("Alias for field")


def sign(app: Any, what: str, name: str, documented: Any, *others: Any) -> tuple | None:
    """The arguments of a class: those of `__init__`. Keras's layers have a `__new__` besides."""
    if what != "class":
        return None
    signature = inspect.signature(documented.__init__, bound_method=True)
    return inspect.stringify_signature(signature, show_annotation=False), None


def setup(app: Any) -> None:
    """Writes the tables, and offers the pages that are notebooks as such."""
    keras_ssattn.ssmax.EdificeSSMax.__name__ = "EdificeSSMax"  # by another it is an alias
    result_tables.write(HERE / "_generated")
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", sign)
    app.connect("source-read", notebooks.offer)
