# SPDX-License-Identifier: Apache-2.0
"""Formulas of the pages, drawn as SVG when the pages are built: to show them, a browser needs no script and no font."""

import functools
import xml.etree.ElementTree as ET

import ziamath
from docutils import nodes
from sphinx.errors import ExtensionError

UNITS = 20  # of the drawing in one em of the formula
SCALE = 1.1  # em of the text in one em of the formula: lower-case letters of both are then about as tall

ziamath.config.svg2 = False  # with True, an id would stand for each letter, in every formula again
ziamath.config.precision = 2


@functools.cache
def drawing_of(tex: str, inline: bool) -> str:
    """The SVG element of a formula, in the colour and on the base line of the text around it.

    Raises:
        ExtensionError: ziamath cannot draw the formula.
    """
    try:
        formula = ziamath.Latex(tex, size=UNITS, color="currentColor", inline=inline)
    except Exception as error:
        raise ExtensionError(f"ziamath cannot read the formula {tex!r}: {error!r}") from error
    if "\\" in formula.mathmlstr():
        raise ExtensionError(f"ziamath does not know a command of the formula {tex!r}")
    svg = formula.svgxml()
    top, width, height = map(float, svg.get("viewBox").split()[1:])
    for name, units in (("width", width), ("height", height)):
        svg.set(name, f"{units * SCALE / UNITS:.3f}em")
    svg.set("style", f"vertical-align: {-(top + height) * SCALE / UNITS:.3f}em")
    svg.set("role", "img")
    svg.set("aria-label", " ".join(tex.split()))
    return ET.tostring(svg, encoding="unicode")


def draw_inline(translator, node):
    translator.body.append(f'<span class="math">{drawing_of(node.astext(), inline=True)}</span>')
    raise nodes.SkipNode


def draw_display(translator, node):
    """What \\qquad separates may stand below each other in a narrow window."""
    drawings = " ".join(drawing_of(part, inline=False) for part in node.astext().split("\\qquad"))
    translator.body.append(f'<div class="math">{drawings}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("svg", inline_renderers=(draw_inline, None), block_renderers=(draw_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
