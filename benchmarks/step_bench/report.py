# SPDX-License-Identifier: Apache-2.0
"""The Markdown table and the JSON file of a run. Figures that were not measured are a dash."""

from __future__ import annotations

import json
from pathlib import Path

from . import bars
from .peers import BASELINES, PEERS

_DASH = "-"
_QUIET = 0.05  # share of the CPU that other processes may use


def _text(form: str):
    return lambda value: _DASH if value is None else form.format(value)


def _significant(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return _DASH
    digits = next((d for d, limit in ((4, 0.1), (3, 1), (2, 10), (1, 100)) if value < limit), 0)
    return f"{value:.{digits}f}"


# Heading, key of the row, how the value is written.
COLUMNS = (
    ("ms", "ms", _significant),
    ("ratio", "ratio", _text("{:.2f}")),
    ("quartiles of ratio", "ratio_quartiles", lambda q: _DASH if q is None else f"{q[0]:.2f} ... {q[1]:.2f}"),
    ("GB/s", "gb_s", _significant),
    ("% of copy", "share_of_copy", _text("{:.1%}")),
    ("launches", "launches", _text("{:,}")),
    ("host µs", "host_us", _text("{:,.0f}")),
    ("extra MiB", "extra_mib", _text("{:.1f}")),
    ("density", "density", _text("{:.2%}")),
    ("samples", "samples_ms", lambda samples: str(len(samples))),
)


def markdown(results: dict) -> str:
    """The whole report: what it was measured on, then a table for each list."""
    what = {"sgd": "One optimizer step", "adamw": "One step of AdamW"}[results["optimizer"]]
    lines = [f"# {what}, {results['device']}, {results['dtype']}", ""]
    lines += [f"- {name}: {value}" for name, value in results["machine"].items()]
    lines += [f"- {note}" for note in results["notes"]]
    if reached := bars.table(results):
        lines += ["", *reached]
    baseline = PEERS[BASELINES[results["optimizer"]]].label
    lines += ["", f"ratio: to {baseline} in the same round. The columns: benchmarks/README.md."]
    for entry in results["lists"].values():
        lines += ["", *_list_section(entry)]
    return "\n".join(lines) + "\n"


def _list_section(entry: dict) -> list[str]:
    tensors = f"{entry['tensors']:,} tensor{'s' if entry['tensors'] > 1 else ''}"
    lines = [f"## {entry['label']}: {tensors}, {entry['elements']:,} elements", ""]
    if "copy_gb_s" in entry:
        copy, in_place = (_significant(entry[key]) for key in ("copy_gb_s", "in_place_gb_s"))
        lines += [f"Passes over a large buffer: copy {copy} GB/s, negation in place {in_place} GB/s.", ""]
    if (others := entry.get("other_processes")) is not None:
        noisy = ": NOT QUIET, the figures are of little use" if others > _QUIET else ""
        lines += [f"Other processes used {others:.1%} of the CPU meanwhile{noisy}.", ""]
    measured = {name: row for name, row in entry["rows"].items() if "ms" in row}
    if measured:
        cells = [["optimizer", *(heading for heading, _, _ in COLUMNS)]]
        for name, row in measured.items():
            version = f" {row['version']}" if row["version"] else ""
            cells.append([PEERS[name].label + version, *(write(row[key]) for _, key, write in COLUMNS)])
        lines += _table(cells)
    left_out = [f"{PEERS[n].label}: {row['left_out']}" for n, row in entry["rows"].items() if "left_out" in row]
    for remark in (*entry["notes"], *left_out):
        lines += ["", remark]
    return lines


def _table(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: list[str]) -> str:
        first, *rest = zip(row, widths, strict=True)
        return " | ".join(["| " + first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]) + " |"

    rule = "|".join(["| " + "-" * widths[0] + " ", *(f" {'-' * (width - 1)}: " for width in widths[1:])]) + "|"
    return [line(cells[0]), rule, *map(line, cells[1:])]


def stem(results: dict, out: Path) -> Path:
    """Where the files of a run are, without their suffix."""
    family = "" if results["optimizer"] == "sgd" else f"{results['optimizer']}-"
    return out / f"step-{family}{results['device']}-{results['dtype']}"


def write(results: dict, out: Path) -> list[Path]:
    """Writes the table and the JSON file; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    table, figures = (stem(results, out).with_suffix(suffix) for suffix in (".md", ".json"))
    table.write_text(markdown(results), encoding="utf-8")
    figures.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [table, figures]
