# SPDX-License-Identifier: Apache-2.0
"""tools/check_pages.py finds what is wrong with pages; docs/ draws formulas and makes tables of arguments."""

import ast
import html
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import check_pages

from csgd_cuda import CSGD

from .helpers import DOCS

needs_chromium = pytest.mark.skipif(check_pages.CHROMIUM is None, reason="Chromium not found")


def site_of(folder, **pages):
    """A folder with pages of these bodies, the first of which is index."""
    for name, body in {"index": "", **pages}.items():
        page = f"<!doctype html><meta charset=utf-8><title>{name}</title><body>{body}</body>"
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return folder


GOOD = (
    '<p id="here">A <code>\\frac{a}{b}</code> of $5 or $6</p><a href="other.html#there">there</a><a href="#here"></a>'
)


def test_a_good_site_has_no_faults(tmp_path):
    site = site_of(tmp_path, index=GOOD, other='<h2 id="there">There</h2><a href="https://example.org/a">elsewhere</a>')
    assert check_pages.faults_of_files(site) == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<a href="none.html">', "none.html leads to no file"),
        ('<a href="index.html#none">', "index.html#none leads to no heading"),
        ('<a href="#none">', "#none leads to no heading"),
        ('<img src="none.png">', "none.png leads to no file"),
        ('<script src="https://example.org/a.js"></script>', "loads https://example.org/a.js from a server"),
        ('<link rel="stylesheet" href="//example.org/a.css">', "loads //example.org/a.css from a server"),
        ("<p>let $\\frac12$ be</p>", "shows its source: '$\\\\frac12$'"),
        ("<p>let $x_{i\n\n1}$ be</p>", "shows its source: '$x_{i\\n\\n1}$'"),
        ("<p>let \\(x\\) be</p>", "shows its source: '\\\\('"),
        ("<p>\n| a | b |\n</p>", "shows its source: '| a | b |'"),
    ],
)
def test_fault_of_a_file_is_named(body, fault, tmp_path):
    faults = check_pages.faults_of_files(site_of(tmp_path, other=body))
    assert f"other.html: {fault}" in faults


@needs_chromium
def test_chromium_finds_no_fault_in_a_good_site(tmp_path):
    found = '<div id="search-results"><li><a href="index.html"></a></li></div>'
    assert check_pages.faults_in_browser(site_of(tmp_path, index=GOOD, search=found)) == []


@needs_chromium
def test_chromium_finds_faults(tmp_path):
    site = site_of(
        tmp_path,
        console="<script>setTimeout(() => { throw new Error('broken script'); })</script>",
        elsewhere="<script>new Image().src = 'https://example.org/a.png'</script>",
        missing="<script>new Image().src = 'none.png'</script>",
        search="nothing is ever found",
        wide='<div style="width: 1000px">wide</div>',
    )
    faults = "\n".join(check_pages.faults_in_browser(site))
    assert "broken script" in faults
    assert "https://example.org/a.png" in faults
    assert "a page loads /none.png, which is not there" in faults
    assert "search.html: finds nothing for density" in faults
    assert "wide.html: 1008 pixels wide in a window of 420" in faults
    assert "in a window of 1400" not in faults


def test_without_chromium_files_are_checked_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_pages, "CHROMIUM", None)
    monkeypatch.setattr(sys, "argv", ["check_pages.py", str(site_of(tmp_path, other='<a href="none.html">'))])
    assert check_pages.main() == 1
    output = capsys.readouterr().out
    assert "Chromium not found" in output
    assert "none.html leads to no file" in output


@pytest.fixture
def formulas(monkeypatch):
    pytest.importorskip("sphinx")
    pytest.importorskip("ziamath")
    monkeypatch.syspath_prepend(str(DOCS))
    import formulas

    return formulas


def test_a_formula_is_a_drawing_by_itself(formulas):
    drawing = formulas.drawing_of(r"\frac{a}{b}", inline=True)
    assert drawing.startswith("<svg")
    assert "<path" in drawing
    assert 'aria-label="\\frac{a}{b}"' in drawing
    assert not any(word in drawing for word in ("<text", "<use", "href=", "url(", "id="))


@pytest.mark.parametrize("tex", [r"\nosuchcommand{a}", r"\frac{a}"])
def test_a_formula_that_cannot_be_drawn_is_an_error_that_names_it(tex, formulas):
    with pytest.raises(formulas.ExtensionError, match="formula") as caught:
        formulas.drawing_of(tex, inline=True)
    assert repr(tex) in str(caught.value)


def test_docstring_becomes_a_table_of_arguments_with_defaults_and_links(tmp_path):
    """On one page, built as make docs builds all."""
    for package in ("sphinx", "myst_parser", "furo", "ziamath"):
        pytest.importorskip(package)
    from sphinx.application import Sphinx

    (tmp_path / "index.md").write_text("# API\n```{eval-rst}\n.. autoclass:: csgd_cuda.CSGD\n```\n", encoding="utf-8")
    (tmp_path / "algorithm.md").write_text("---\norphan: true\n---\n# The rule\n", encoding="utf-8")
    out = tmp_path / "out"
    Sphinx(tmp_path, DOCS, out, tmp_path / "trees", "html", status=None, warningiserror=True).build()
    text = (out / "index.html").read_text(encoding="utf-8")
    rows = [re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in re.findall(r"<tr .*?</tr>", text, re.DOTALL)]
    defaults = {}
    for row in filter(None, rows):
        name, default, meaning = (html.unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in row)
        assert not meaning.startswith(("-", "\N{EN DASH}")), name
        defaults[name] = default
    assert '<span class="doc">The rule</span>' in text, "a file of docs/ in the docstring is no link"
    assert defaults.pop("params") == ""
    optimizer = CSGD([torch.zeros(1)])
    expected = {name: value for name, value in optimizer.defaults.items() if name != "threshold_step"}
    assert {name: ast.literal_eval(default) for name, default in defaults.items()} == expected
