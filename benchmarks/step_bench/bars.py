# SPDX-License-Identifier: Apache-2.0
"""What a step has to reach, and whether a run has: a short table ahead of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .lists import LISTS, numel
from .peers import PEERS


class Bar(NamedTuple):
    """One bar: ``measured(rows)`` is compared with ``bound``; a KeyError or TypeError there: it was not measured."""

    dtype: str
    list_name: str
    text: str
    measured: Callable[[dict], float]
    at_least: bool
    bound: float
    form: str = "{:.1%}"
    device: str = "cuda"
    optimizer: str = "sgd"

    def met(self, value: float) -> bool:
        """Whether ``value`` reaches the bound."""
        return value >= self.bound if self.at_least else value <= self.bound


def _copy_share(rows: dict) -> float:
    return rows["csgd_dense"]["share_of_copy"]


# Both ratios are to the same baseline in the same rounds, so that their quotient has no drift of the clock in it.
def _calibration_adds(rows: dict) -> float:
    return rows["csgd_dense"]["ratio"] / rows["csgd_off"]["ratio"] - 1


def _small(list_name: str, bound: float) -> Bar:
    """On a CPU the step of small tensors is nearly all fixed cost."""
    text = "time of a step, share of that of torch SGD fused"
    return Bar("float32", list_name, text, lambda rows: rows["csgd"]["ratio"], False, bound, "{:.2f}", "cpu")


def _of_adamw(list_name: str, peer: str, bound: float) -> Bar:
    text = f"{PEERS[peer].label}: time of a step, share of that of torch AdamW fused"
    return Bar("float32", list_name, text, lambda rows: rows[peer]["ratio"], False, bound, "{:.2f}", "cpu", "adamw")


BARS = (
    Bar("float32", "flat", "dense: share of the copy's GB/s, at 20 bytes per parameter", _copy_share, True, 0.90),
    Bar("float32", "flat", "5 % of the coordinates move: times as fast as torch SGD fused",
        lambda rows: 1 / rows["csgd_5"]["ratio"], True, 1.25, "{:.2f}"),
    Bar("float32", "flat", "dense: what calibration adds to c = 0", _calibration_adds, False, 0.05),
    Bar("float32", "resnet50", "kernel launches of a step", lambda rows: 1.0 * rows["csgd"]["launches"], False, 1,
        "{:.0f}"),
    Bar("float32", "resnet50", "host time of a step, share of that of torch SGD fused",
        lambda rows: rows["csgd"]["host_us"] / rows["sgd_fused"]["host_us"], False, 0.50),
    Bar("bfloat16", "flat", "dense: share of the copy's GB/s, at 10 bytes per parameter", _copy_share, True, 0.80),
    _of_adamw("flat", "adamw_25", 1.0), _of_adamw("resnet50", "adamw_25", 1.0), _of_adamw("small_gpt", "adamw_25", 1.0),
    _of_adamw("tiny161", "adamw_25", 0.5), _of_adamw("flat", "adamw_reference", 20.0),
    Bar("bfloat16", "flat", "25 % of the coordinates move: time, share of torch AdamW fused in float32",
        lambda rows: rows["adamw_25"]["ratio"] / rows["adamw_float32"]["ratio"], False, 1.0, "{:.2f}", "cpu", "adamw"),
    _small("tiny1", 1.0), _small("tiny10", 0.8), _small("tiny161", 0.4), _small("each161", 1.0),
)  # fmt: skip


def table(results: dict) -> list[str]:
    """Lines of Markdown; none without a bar. Lists that were scaled count as not measured."""
    of_run = (results["dtype"], results["device"], results["optimizer"])
    bars = [bar for bar in BARS if (bar.dtype, bar.device, bar.optimizer) == of_run]
    if not bars:
        return []
    lines = ["| list | bar | needed | measured | outcome |", "| --- | --- | ---: | ---: | --- |"]
    for bar in bars:
        needed = f"{'≥' if bar.at_least else '≤'} {bar.form.format(bar.bound)}"
        value = _value(bar, results["lists"])
        outcome = "- | not measured" if value is None else f"{bar.form.format(value)} | {_outcome(bar, value)}"
        lines.append(f"| {LISTS[bar.list_name].label} | {bar.text} | {needed} | {outcome} |")
    return lines


def _outcome(bar: Bar, value: float) -> str:
    return "met" if bar.met(value) else "MISSED"


def _value(bar: Bar, lists: dict) -> float | None:
    entry = lists.get(bar.list_name)
    if entry is None or entry["elements"] != numel(LISTS[bar.list_name].shapes(bar.device)):
        return None
    try:
        return bar.measured(entry["rows"])
    except (KeyError, TypeError):  # a peer was left out, or a figure is None
        return None
