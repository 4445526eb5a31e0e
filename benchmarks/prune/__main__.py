# SPDX-License-Identifier: Apache-2.0
"""Accuracy against sparsity of hard thresholding while training, and of one-shot magnitude pruning with fine-tuning.

    python -m benchmarks.prune --out out/prune
    python -m benchmarks.prune --data fashion-mnist --data-dir DIR --limit 10000 --epochs 8 --out out/prune-fashion

A chain of three convolutions is trained by CSGD. When half of the steps are made it is as sparse as it gets, and the
other half is for fine-tuning: hard thresholding takes the sparsity there along a cubic ramp, from a quarter of the
steps on; one-shot pruning (torch.nn.utils.prune) trains a dense network until then and drops its weights at once.
Writes runs.csv (runs that are there already are not made again), table.md and accuracy.png.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import sys
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.step_bench import machine
from benchmarks.train import tasks
from benchmarks.train.run_log import without_places
from examples.training.errors import UserError, exit_status
from examples.training.report import prepare

from .training import METHODS, Run, build_model, train

LABELS = {  # of METHODS, where they are read
    "threshold": "hard thresholding, momentum kept",
    "threshold, momentum cleared": "hard thresholding, momentum cleared",
    "threshold, frozen": "hard thresholding, regrow=False",
    "one-shot": "one-shot, torch.nn.utils.prune",
}
MEASURED = ("accuracy", "zeros", "weights", "exported", "difference")
THREADS = "threads"  # of the training, a further column of runs.csv, which files of earlier versions lack


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.prune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", default="digits", help="as in benchmarks.train (default: %(default)s)")
    p.add_argument("--data-dir", help="where its files lie")
    p.add_argument(
        "--skip-unreadable", action="store_true", help="leave out image files that cannot be read, and name them"
    )
    p.add_argument("--limit", type=int, help="use the first N training images only")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    p.add_argument("--structures", nargs="+", choices=("element", "filter"), default=["element", "filter"])
    p.add_argument(
        "--sparsities", nargs="+", type=float, default=[0, 0.5, 0.8, 0.9, 0.95], help="(default: %(default)s)"
    )
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: %(default)s)")
    p.add_argument("--epochs", type=int, default=20, help="(default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    p.add_argument("--lr", type=float, default=0.05, help="falls along a cosine (default: %(default)s)")
    p.add_argument("--calibration", type=float, default=1.0, help="c, 0: plain SGD (default: %(default)s)")
    p.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of torch on the CPU; on a busy machine several mostly wait for each other. Results depend on the "
        "number only as far as torch's own arithmetic does (default: %(default)s)",
    )
    p.add_argument(
        "--out", type=Path, default=Path("out/prune"), metavar="DIR", help="for runs and report (default: %(default)s)"
    )
    return p


def check(args: argparse.Namespace) -> None:
    """Raises UserError where an option is out of its range."""
    for sparsity in args.sparsities:
        if not 0 <= sparsity < 1:
            raise UserError(f"--sparsities must be in [0, 1), got {sparsity}.")
    for name in ("epochs", "batch_size", "limit", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {value}.")


def grid(args: argparse.Namespace) -> list[Run]:
    """All runs. A dense one, which is the same for every method and structure, is made once for each seed."""
    runs = []
    for method, structure, sparsity, seed in product(args.methods, args.structures, args.sparsities, args.seeds):
        if sparsity == 0:
            method, structure = args.methods[0], args.structures[0]
        data = f"{args.data}:{args.limit}" if args.limit else args.data
        runs.append(
            Run(data, method, structure, sparsity, seed, args.epochs, args.batch_size, args.lr, args.calibration)
        )
    return list(dict.fromkeys(runs))


def read(path: Path) -> dict[Run, dict[str, float]]:
    """The runs that were made."""
    if not path.exists():
        return {}
    kinds = {"int": int, "float": float, "str": str}
    done = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            run = Run(**{f.name: kinds[str(f.type)](row[f.name]) for f in fields(Run)})
            done[run] = {name: float(row[name]) for name in MEASURED}
            if row.get(THREADS):
                done[run][THREADS] = float(row[THREADS])
    return done


def write(path: Path, done: dict[Run, dict[str, float]]) -> None:
    """All of them, in a file that is never half written."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Run)), *MEASURED, THREADS])
        writer.writeheader()
        writer.writerows(asdict(run) | measured for run, measured in done.items())
    part.replace(path)


def collect(done: dict[Run, dict[str, float]], runs: list[Run], name: str) -> dict[tuple[str, str, float], list[float]]:
    """One figure of the runs of all seeds, by structure, method and sparsity."""
    found: dict[tuple[str, str, float], list[float]] = {}
    for run in runs:
        found.setdefault((run.structure, run.method, run.sparsity), []).append(done[run][name])
    return found


def spread(values: list[float], scale: float, digits: int) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values) * scale:.{digits}f} ± {deviation * scale:.{digits}f}"


def table(args: argparse.Namespace, done: dict[Run, dict[str, float]], runs: list[Run], command: str) -> str:
    """Accuracies and sizes, Markdown."""
    accuracy, zeros, exported = (collect(done, runs, name) for name in ("accuracy", "zeros", "exported"))
    worst = max(done[run]["difference"] for run in runs)
    threads = sorted({f"{done[run][THREADS]:g}" if THREADS in done[run] else "unknown" for run in runs})
    about = machine.describe(torch.device("cpu"), [])
    lines = [
        f"`{command}`, torch {torch.__version__}, {about['CPU']}, threads of a training: {', '.join(threads)}; "
        f"mean ± standard deviation over {len(args.seeds)} seeds.",
        "",
        "| structure | method | sparsity | test accuracy, % | zeros in convolutions, % | parameters exported |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for (structure, method, sparsity), values in accuracy.items():
        key = (structure, method, sparsity)
        names = "dense | dense" if sparsity == 0 else f"{structure} | {LABELS[method]}"
        size = f"{statistics.fmean(exported[key]):,.0f}"
        lines.append(f"| {names} | {sparsity:.0%} | {spread(values, 100, 2)} | {spread(zeros[key], 100, 1)} | {size} |")
    lines += ["", f"Largest difference of an exported model's logits, relative to the largest logit: {worst:.1e}."]
    return "\n".join(lines) + "\n"


def plot(args: argparse.Namespace, done: dict[Run, dict[str, float]], runs: list[Run], path: Path) -> None:
    """Accuracy against sparsity, a panel for each structure."""
    from matplotlib.figure import Figure

    accuracy = collect(done, runs, "accuracy")
    dense = [values for (_, _, sparsity), values in accuracy.items() if sparsity == 0]
    figure = Figure(figsize=(5 * len(args.structures), 4), layout="constrained")
    panels = figure.subplots(1, len(args.structures), sharey=True, squeeze=False)[0]
    for panel, structure in zip(panels, args.structures, strict=True):
        for k, method in enumerate(METHODS):  # of a method the same colour in every picture
            if method not in args.methods:
                continue
            points = {s: values for (st, m, s), values in accuracy.items() if (st, m) == (structure, method) and s > 0}
            if dense:
                points = {0.0: dense[0], **points}
            means = [100 * statistics.fmean(values) for values in points.values()]
            bars = [100 * statistics.stdev(values) if len(values) > 1 else 0 for values in points.values()]
            places = [100 * s + 0.4 * (k - 1.5) for s in points]  # bars side by side
            panel.errorbar(places, means, bars, marker="o", capsize=3, label=LABELS[method], color=f"C{k}")
        panel.set(title=f"structure: {structure}", xlabel="sparsity aimed at, % of weights")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend()
    images = f", {args.limit:,} training images" if args.limit else ""
    figure.suptitle(
        f"{args.data}{images}, {args.epochs} epochs, {len(args.seeds)} seeds, calibration {args.calibration:g}"
    )
    figure.savefig(path, dpi=150)


def run_all(args: argparse.Namespace, command: str) -> None:
    """Makes the runs that are missing, writes table and plot, and prints the table, even where the plot fails."""
    torch.set_num_threads(args.threads)
    options = tasks.DataOptions(args.data, args.data_dir, args.limit, skip_unreadable=args.skip_unreadable)
    task = tasks.create("classification", options)
    runs, path = grid(args), args.out / "runs.csv"
    done = read(path)
    missing = [run for run in runs if run not in done]
    steps = len(task.batches(0, 0, args.batch_size)) * args.epochs
    if missing:
        parameters = sum(p.numel() for p in build_model(task.size[0], task.about()["classes"], 0).parameters())
        print(
            f"Training {len(missing)} of {len(runs)} runs: a chain of three convolutions with {parameters:,} "
            f"parameters on {args.data}, {args.epochs} epochs, {steps} steps each, "
            f"seeds {', '.join(map(str, args.seeds))}, threads: {args.threads}. Results go to {args.out}.",
            flush=True,
        )
    with tqdm(total=len(missing) * steps, unit="step", desc=f"{len(missing)} of {len(runs)} runs") as bar:
        for run in missing:
            done[run] = train(run, task, bar.update) | {THREADS: torch.get_num_threads()}
            write(path, done)
    text = table(args, done, runs, command)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    try:
        plot(args, done, runs, args.out / "accuracy.png")
    finally:
        print(text)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 for something the user can put right, with one sentence on stderr; 130 for Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else argv

    def execute() -> None:
        args = parser().parse_args(arguments)
        check(args)
        prepare(args.out)
        run_all(args, shlex.join(["python", "-m", "benchmarks.prune", *without_places(arguments)]))

    return exit_status("benchmarks.prune", "the same command goes on after the last finished run.", execute)


if __name__ == "__main__":
    sys.exit(main())
