# SPDX-License-Identifier: Apache-2.0
"""How Sphinx builds the documentation; `make docs` runs it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import csgd_cuda

project = "csgd_cuda"
release = csgd_cuda.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["requirements.txt"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100
# "momentum, dampening: ..." in a docstring is one entry for both.
napoleon_use_param = False

html_theme = "furo"
html_title = f"csgd_cuda {release}"
html_show_copyright = False
html_copy_source = False
