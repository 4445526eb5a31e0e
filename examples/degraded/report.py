# SPDX-License-Identifier: Apache-2.0
"""The comparison as Markdown and as JSON."""

from __future__ import annotations

import json
import math

from benchmarks.train.report.summary import Spread
from benchmarks.train.report.table import aligned

from .log import Log
from .summary import Summary, Variant
from .trial import REGIMES

OPTIMIZERS = {"csgd": "CSGD", "sgd": "SGD"}
INJECTIONS = {"film": "feature modulation", "plane": "input planes"}


def name(variant: Variant) -> str:
    """For headings: "CSGD, feature modulation"."""
    return f"{OPTIMIZERS[variant[0]]}, {INJECTIONS[variant[1]]}"


def describe(summary: Summary) -> list[str]:
    """What was run, in three lines."""
    data, mixture, recipe = (summary.common[part] for part in ("data", "mixture", "recipe"))
    size = " x ".join(map(str, data["image_size"]))
    worst = mixture["worst"]
    kinds = {
        "jpeg": f"JPEG down to quality {worst['quality']}",
        "noise": f"noise up to sigma = {worst['noise']:g} grey levels",
        "blur": f"blur up to sigma = {worst['blur']:g} pixels",
    }
    each = "one of these for each image" if mixture["how"] == "one" else "all of these for each image"
    degraded = ", ".join(kinds[kind] for kind in mixture["kinds"])
    low, high = mixture["strengths"]
    if (low, high) != (0, 1):
        each += f", at strengths {low:g} to {high:g} of these"
    return [
        f"{data['name']}: {data['train']:,} training and {data['test']:,} test images of {size}",
        f"degraded anew in each epoch: {degraded}" + f"; {each}",
        f"{recipe['epochs']} epochs, batch size {recipe['batch_size']}, learning rate {recipe['lr']:g} falling along a "
        f"cosine, momentum {recipe['momentum']:g}, weight decay {recipe['weight_decay']:g}, CSGD with "
        f"c = {recipe['calibration']:g}, width {recipe['width']}",
    ]


def markdown(summary: Summary) -> str:
    """What was run, all variants, the gains by strength, each variant by condition, where it was run."""
    parts = [
        "  \n".join(describe(summary)),
        "**All conditions**, mean of the test accuracies, %:",
        aligned(_variants(summary)),
        "**Gain over the absent parameter by strength**, mean over the degradations, points:",
        aligned(_strengths(summary)),
    ]
    for variant in summary.trials:
        parts += [f"**{name(variant)}**, test accuracy, %:", aligned(_conditions(summary, variant))]
    return "\n\n".join([*parts, _NOTES, *_environments(summary)]) + "\n"


_NOTES = (
    "Mean ± standard deviation over the seeds, after the last epoch. A gain is the difference to the absent parameter, "
    "paired by seed; its ± is the standard error over the seeds. Training loss: in the last epoch, nats per image. "
    "Strength: share of the strongest degradation. Withheld: the network of the known parameter, given the constant "
    "vector of the absent one. Estimate's error: mean of |estimate - truth| over the elements of the vector, which go "
    "from 0 to 1; probe's error: the same for a linear function of what the last layer of the absent network sees, "
    "fitted on training images."
)


def _everywhere(_: dict) -> bool:
    return True


def _variants(summary: Summary) -> list[list[str]]:
    head = ["optimizer", "parameter injected by", "seeds", *REGIMES, "known, gain", "estimated, gain"]
    head.append("training loss, known - absent")
    rows = [[*head, "weights of the classifier", "of the estimator"]]
    for variant, logs in summary.trials.items():
        row = [OPTIMIZERS[variant[0]], INJECTIONS[variant[1]], str(len(logs))]
        row += [percent(summary.accuracy(variant, regime, _everywhere)) for regime in REGIMES]
        row += [points(summary.gain(variant, regime, _everywhere)) for regime in REGIMES[:2]]
        row.append(points(summary.loss_difference(variant), 4))
        rows.append([*row, f"{logs[0].parameters['known']:,}", f"{logs[0].parameters['estimator']:,}"])
    return rows


def _strengths(summary: Summary) -> list[list[str]]:
    levels = [0.0, *summary.strengths]
    rows = [["variant", "regime", *("clean" if level == 0 else f"{level:g}" for level in levels)]]
    for variant in summary.trials:
        for regime in REGIMES[:2]:
            gains = [
                points(summary.gain(variant, regime, lambda c, level=level: c["strength"] == level)) for level in levels
            ]
            rows.append([name(variant), regime, *gains])
    return rows


def _conditions(summary: Summary, variant: Variant) -> list[list[str]]:
    rows = [["images", *REGIMES, "known, gain", "estimated, gain", "withheld", "estimate's error", "probe's error"]]
    for condition in summary.conditions:

        def chosen(c: dict, text: str = condition["text"]) -> bool:
            return c["text"] == text

        row = [condition["text"], *(percent(summary.accuracy(variant, regime, chosen)) for regime in REGIMES)]
        row += [points(summary.gain(variant, regime, chosen)) for regime in REGIMES[:2]]
        row.append(percent(summary.accuracy(variant, "withheld", chosen)))
        errors = (summary.error(variant, of, chosen) for of in ("estimation_error", "probe_error"))
        rows.append([*row, *(f"{error:.3f}" for error in errors)])
    return rows


def percent(spread: Spread) -> str:
    """Mean ± standard deviation."""
    return f"{spread.mean:.2f}" + (f" ± {spread.std:.2f}" if math.isfinite(spread.std) else "")


def points(gain: tuple[float, float], digits: int = 2) -> str:
    """Difference ± standard error."""
    return f"{gain[0]:+.{digits}f}" + (f" ± {gain[1]:.{digits}f}" if math.isfinite(gain[1]) else "")


def _environments(summary: Summary) -> list[str]:
    """The commands, each once, and what they ran on."""
    logs = [log for trials in summary.trials.values() for log in trials]
    commands = dict.fromkeys(log.environment["command"] for log in logs)
    varying = "command", "date", "load average at the start"
    kept = [{key: value for key, value in log.environment.items() if key not in varying} for log in logs]
    unique = [about for i, about in enumerate(kept) if about not in kept[:i]]
    return ["\n".join(["```sh", *commands, "```"]), *("\n".join(f"- {k}: {v}" for k, v in u.items()) for u in unique)]


def full_json(logs: list[Log]) -> str:
    """Everything, as it was logged."""
    return json.dumps([vars(log) for log in logs], indent=1) + "\n"
