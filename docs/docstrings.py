# SPDX-License-Identifier: Apache-2.0
"""What pages make of docstrings: a table of the "Args:" (name, default, meaning), and links to the pages they name."""

import re

from docutils import nodes
from sphinx import addnodes

from csgd_cuda.pruning.options import PRUNING_OPTIONS


def defaults_of(description: addnodes.desc) -> dict[str, str]:
    """{parameter: default} of the signature, and of the pruning options where the signature takes these as one."""
    defaults = {}
    for parameter in description.findall(addnodes.desc_parameter):
        names = [node.astext() for node in parameter.findall(addnodes.desc_sig_name)]  # none of the * between them
        values = [node.astext() for node in parameter.findall(nodes.inline) if "default_value" in node["classes"]]
        defaults |= dict(zip(names, values, strict=False))
        if names[:1] == ["pruning"]:
            defaults |= {name: repr(option.default) for name, option in PRUNING_OPTIONS.items()}
    return defaults


def cell(*children: nodes.Node) -> nodes.entry:
    return nodes.entry("", *children)


def literals(texts: list[str]) -> nodes.paragraph:
    paragraph = nodes.paragraph()
    for text in texts:
        paragraph += [nodes.Text(", "), nodes.literal("", text)] if len(paragraph) else [nodes.literal("", text)]
    return paragraph


def row_of(entry: nodes.Element, defaults: dict[str, str]) -> nodes.row:
    """A row for an entry of napoleon's list: the names in bold, a dash, and what they mean."""
    bold = next(entry.findall(nodes.strong))
    names = bold.astext().split(", ")
    meaning = bold.parent
    meaning.remove(bold)
    if isinstance(meaning[0], nodes.Text):
        meaning.replace(meaning[0], nodes.Text(meaning[0].astext().lstrip(" -")))
    default = defaults.get(names[0], "") if len(names) == 1 else ""
    paragraphs = [meaning] if entry is meaning else entry.children
    return nodes.row("", cell(literals(names)), cell(literals([default] if default else [])), cell(*paragraphs))


def table_of(field: nodes.field, defaults: dict[str, str]) -> nodes.table:
    body = field[1]
    entries = list(body.findall(nodes.list_item)) or [body[0]]
    titles = [cell(nodes.paragraph("", title)) for title in ("parameter", "default", "meaning")]
    group = nodes.tgroup("", *(nodes.colspec(colwidth=width) for width in (20, 15, 65)), cols=3)
    group += nodes.thead("", nodes.row("", *titles))
    group += nodes.tbody("", *(row_of(entry.deepcopy(), defaults) for entry in entries))
    return nodes.table("", group, classes=["parameters"])


def tabulate(app, domain, objtype, content):
    """Puts a table in the place of the list that napoleon makes of "Args:"."""
    for fields in list(content.findall(nodes.field_list)):
        for field in list(fields):
            if field[0].astext() == "Parameters":
                fields.parent.insert(fields.parent.index(fields), table_of(field, defaults_of(content.parent)))
                fields.remove(field)
        if not len(fields):
            fields.parent.remove(fields)


def shorten_dashes(app, doctree):
    """Sphinx puts " -- " between an error and what it says, for quotation marks and dashes to be made typographic."""
    for text in list(doctree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" \N{EN DASH} "))


def link_pages(app, what, name, documented, options, lines):
    """Puts the title of a page, as a link, in the place of its file."""
    lines[:] = [re.sub(r"\bdocs/([\w-]+)\.md\b", r":doc:`\1`", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", link_pages)
    app.connect("object-description-transform", tabulate)
    app.connect("doctree-read", shorten_dashes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
