# SPDX-License-Identifier: Apache-2.0
"""How Sphinx builds the documentation; `make docs` runs it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for the extensions beside this file
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from docutils import nodes

import csgd_cuda

project = "csgd_cuda"
release = csgd_cuda.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "formulas", "docstrings"]
exclude_patterns = ["requirements.txt"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100
# "momentum, dampening: ..." in a docstring is one entry for both.
napoleon_use_param = False
smartquotes = False  # they would make one dash of the two of an option

toc_object_entries_show_parents = "hide"

html_math_renderer = "svg"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_theme = "furo"
html_title = f"csgd_cuda {release}"
html_show_copyright = False
html_copy_source = False


def widen_pictures(app, doctree):
    """Every picture is as wide as the text; Sphinx then links it to the file, where small letters can be read."""
    for picture in doctree.findall(nodes.image):
        picture["width"] = "100%"


def keep_figures_together(app, doctree):
    """In a table, no line break stands between a figure and its deviation."""
    for table in doctree.findall(nodes.table):
        for text in list(table.findall(nodes.Text)):
            text.parent.replace(text, nodes.Text(text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")))


def setup(app):
    app.connect("doctree-read", widen_pictures)
    app.connect("doctree-read", keep_figures_together)
