# SPDX-License-Identifier: Apache-2.0
"""The report: accuracies by degradation, level and regime."""

from __future__ import annotations

import math
from pathlib import Path

from experiments import run_log
from experiments.report.logs import Experiment
from experiments.report.table import aligned, csv_of, schedule, text

from .summary import Summary, Variant
from .task import REGIMES

METHODS = {"csgd": "CSGD", "sgd": "SGD"}
INJECTIONS = {
    "film": "feature modulation",
    "plane": "input planes",
    "film-vgg": "feature modulation of six convolutions",
}
VARIED = ("method", "calibration", "model", "seed")


def table(experiment: Experiment) -> str:
    """As Markdown."""
    return markdown(Summary(experiment))


def write(experiment: Experiment, out: Path) -> list[str]:
    """A line for each run and condition, plots and pictures; the names of the files."""
    from . import figures  # here, since it needs matplotlib, which the table does not

    summary, written = Summary(experiment), ["summary.csv"]
    lines = [
        {"method": run.method, "calibration": run.calibration, "model": run.settings["model"], "seed": run.seed}
        | {"images": condition["text"], "strength": condition["strength"], **condition["accuracy"]}
        for run in experiment.runs
        for condition in run.results["conditions"]
    ]
    run_log.write_atomically(out / "summary.csv", csv_of(lines))
    for variant in summary.runs:
        plot, picture = (f"{kind}-{'-'.join(variant)}.png" for kind in ("accuracy", "samples"))
        figures.draw_accuracy(summary, variant, out / plot)
        figures.draw_samples(summary, variant, out / picture)
        written += [plot, picture]
    return written


def name(variant: Variant) -> str:
    """For headings: "CSGD, feature modulation"."""
    return f"{METHODS[variant[0]]}, {INJECTIONS[variant[1]]}"


def describe(summary: Summary) -> list[str]:
    """What was run, in three lines."""
    data, about, recipe = (summary.common[part] for part in ("data", "about", "recipe"))
    mixture, images = data["mixture"], about["images"]
    size = " x ".join(map(str, about["image_size"]))
    worst = mixture["worst"]
    runs = [run for of_variant in summary.runs.values() for run in of_variant]
    first, strengths = runs[0], dict.fromkeys(f"{run.calibration:g}" for run in runs if run.calibration is not None)
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
        f"{data['data']}: {images['train']:,} training and {images['test']:,} test images of {size}",
        f"degraded anew in each epoch: {degraded}" + f"; {each}",
        f"{recipe['epochs']} epochs, batch size {recipe['batch_size']}, {schedule(recipe)} learning rate from "
        f"{first.lr:g}, momentum {recipe['momentum']:g}, weight decay {recipe['weight_decay']:g}, CSGD with "
        f"c = {' and '.join(strengths) or 'none'}, width {data['width']}",
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
    for variant in summary.runs:
        parts += [f"**{name(variant)}**, test accuracy, %:", aligned(_conditions(summary, variant))]
    return "\n\n".join([*parts, _NOTES, summary.environment]) + "\n"


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
    for variant, runs in summary.runs.items():
        row = [METHODS[variant[0]], INJECTIONS[variant[1]], str(len(runs))]
        row += [text(summary.accuracy(variant, regime, _everywhere), 2) for regime in REGIMES]
        row += [points(summary.gain(variant, regime, _everywhere)) for regime in REGIMES[:2]]
        row.append(points(summary.loss_difference(variant), 4))
        rows.append([*row, *(f"{runs[0].results['parameters'][of]:,}" for of in ("known", "estimator"))])
    return rows


def _strengths(summary: Summary) -> list[list[str]]:
    levels = [0.0, *summary.strengths]
    rows = [["variant", "regime", *("clean" if level == 0 else f"{level:g}" for level in levels)]]
    for variant in summary.runs:
        for regime in REGIMES[:2]:
            gains = [
                points(summary.gain(variant, regime, lambda c, level=level: c["strength"] == level)) for level in levels
            ]
            rows.append([name(variant), regime, *gains])
    return rows


def _conditions(summary: Summary, variant: Variant) -> list[list[str]]:
    rows = [["images", *REGIMES, "known, gain", "estimated, gain", "withheld", "estimate's error", "probe's error"]]
    for condition in summary.conditions:

        def chosen(c: dict, words: str = condition["text"]) -> bool:
            return c["text"] == words

        row = [condition["text"], *(text(summary.accuracy(variant, regime, chosen), 2) for regime in REGIMES)]
        row += [points(summary.gain(variant, regime, chosen)) for regime in REGIMES[:2]]
        row.append(text(summary.accuracy(variant, "withheld", chosen), 2))
        errors = (summary.error(variant, of, chosen) for of in ("estimation_error", "probe_error"))
        rows.append([*row, *(f"{error:.3f}" for error in errors)])
    return rows


def points(gain: tuple[float, float], digits: int = 2) -> str:
    """Difference ± standard error."""
    return f"{gain[0]:+.{digits}f}" + (f" ± {gain[1]:.{digits}f}" if math.isfinite(gain[1]) else "")
