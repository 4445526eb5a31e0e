# SPDX-License-Identifier: Apache-2.0
"""Train for many steps, with checkpoints and without: bits, memory and time of a step at the end as at the beginning.

    python benchmarks/soak.py --steps 10000 --optimizer adamw
    python benchmarks/soak.py --out benchmarks/results/soak     # the figures that the documentation has

Each optimizer makes the training of long_training.py twice, each time in a new process. One run never stops. The other
saves after every --every steps, and goes on with a model and an optimizer made anew from the file. Both take the
SHA-256 of everything that a checkpoint holds, as often. Writes a JSON file for each run and soak.md into --out; a run
whose file is there is not made again. The exit status is 1 where bits differ, or where a run takes 32 MiB more at its
end than after a tenth of its steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

# An installed csgd_cuda comes first; without one, the package next to this directory.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.long_training import OPTIMIZERS, Training, digest, resumed
from benchmarks.step_bench import page, progress
from tools import machine
from tools.program import UserError, exit_status

# Each run has a process of its own, with the memory of that run alone.
processes = multiprocessing.get_context("spawn")
# Of resident memory, after a tenth of the steps. Allocators and caches take some MiB in the first thousands of steps.
_GROWTH_MIB = 32
_KINDS = {"without checkpoints": False, "with checkpoints": True}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="default: both")
    p.add_argument("--steps", type=int, default=100_000, help="of each run (default: %(default)s)")
    p.add_argument("--every", type=int, default=1000, help="steps from checkpoint to checkpoint (default: %(default)s)")
    p.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    p.add_argument("--out", type=Path, default=Path("out/soak"), help="default: %(default)s")
    return p


# A run


def measure(settings: dict[str, Any], about: dict[str, str], path: Path) -> None:
    """Makes a run and writes what it has measured.

    Args:
        settings: optimizer, checkpoints (bool), steps, every, threads, as of settings_of().
        about: of the machine, kept with the figures.
        path: of the JSON file.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the program, which ends this process
    torch.set_num_threads(settings["threads"])
    steps, every = settings["steps"], settings["every"]
    training = Training(settings["optimizer"])
    # Of optimizer.step(): of the clock, and of the CPU in this thread, which other programs disturb less.
    wall_ns, cpu_ns = array("q", [0]) * steps, array("q", [0]) * steps
    readings: dict[str, list] = {name: [] for name in ("step", "digest", "resident_kib", "tensors", "objects")}
    begin = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        progress.bar(steps // every, f"{path.stem}, {steps} steps") as bar,
    ):
        checkpoint = Path(folder, "checkpoint.pt")
        for k in range(steps):
            training.prepare()
            wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
            training.optimizer.step()
            cpu_ns[k], wall_ns[k] = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
            training.finish()
            if training.batch % every == 0:
                read(training, readings)
                if settings["checkpoints"]:
                    training.save(checkpoint)
                    training = resumed(settings["optimizer"], checkpoint)
                bar.update()
    result = {
        "settings": settings,
        "about": about,
        "minutes": (time.monotonic() - begin) / 60,
        "finite": all(bool(param.isfinite().all()) for param in training.networks.parameters()),
        "wall_us": medians(wall_ns),
        "cpu_us": medians(cpu_ns),
        "readings": readings,
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def read(training: Training, readings: dict[str, list]) -> None:
    """Appends what there is in this process now."""
    readings["step"].append(training.batch)
    readings["digest"].append(digest(training.state_dict()))
    readings["resident_kib"].append(resident_kib())
    gc.collect()
    objects = gc.get_objects()
    readings["objects"].append(len(objects))
    readings["tensors"].append(sum(issubclass(type(thing), torch.Tensor) for thing in objects))


def resident_kib() -> int:
    """Memory of this process, in KiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])


def medians(of_steps: array) -> dict[str, float]:
    """Of the first and the last tenth of the steps, without the very first one; ns to µs."""
    tenth = len(of_steps) // 10
    return {"first": statistics.median(of_steps[1:tenth]) / 1e3, "last": statistics.median(of_steps[-tenth:]) / 1e3}


# The report


def settings_of(args: argparse.Namespace, optimizer: str, checkpoints: bool) -> dict[str, Any]:
    """What determines a run."""
    return {
        "optimizer": optimizer, "checkpoints": checkpoints, "steps": args.steps, "every": args.every,
        "threads": args.threads,
    }  # fmt: skip


def run_of(settings: dict[str, Any], about: dict[str, str], path: Path) -> dict[str, Any]:
    """The result of a run, which is made where its file is not there."""
    try:
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); delete it.") from None
    if not isinstance(result, dict) or result.get("settings") != settings:
        process = processes.Process(target=measure, args=(settings, about, path), daemon=True)
        process.start()
        process.join()
        if process.exitcode != 0:
            raise UserError(f"the run {path.stem} ended with status {process.exitcode}; start the program again.")
        result = json.loads(path.read_text(encoding="utf-8"))
    return result


def first_difference(runs: list[dict[str, Any]]) -> int | None:
    """The first step after which the digests of runs differ."""
    digests = [run["readings"]["digest"] for run in runs]
    for step, *of_runs in zip(runs[0]["readings"]["step"], *digests, strict=True):
        if len(set(of_runs)) > 1:
            return step
    return None


def memory_of(run: dict[str, Any]) -> tuple[float, float, float]:
    """MiB after a tenth of the steps, at the end, and the most."""
    memory = [kib / 1024 for kib in run["readings"]["resident_kib"]]
    return memory[max(1, len(memory) // 10) - 1], memory[-1], max(memory)


def grew(run: dict[str, Any]) -> bool:
    """Whether the run took more and more memory."""
    tenth, end, _ = memory_of(run)
    return end - tenth > _GROWTH_MIB


def row_of(name: str, run: dict[str, Any]) -> str:
    """A line of the table."""
    cells = [name, f"{run['minutes']:.0f}", *(f"{mib:.1f}" for mib in memory_of(run))]
    for what in ("tensors", "objects"):
        values = run["readings"][what]
        halves = values[: len(values) // 2], values[len(values) // 2 :]
        cells.append(", ".join(f"{min(half):,} ... {max(half):,}" for half in halves if half))
    for what in ("wall_us", "cpu_us"):
        first, last = run[what]["first"], run[what]["last"]
        cells.append(f"{first:.0f}, {last:.0f} ({last / first:.2f})")
    return f"| {' | '.join([*cells, 'yes' if run['finite'] else 'NO'])} |"


def page_of(args: argparse.Namespace, runs: dict[str, dict[str, dict]]) -> page.Page:
    """``runs``: by optimizer and kind."""
    lines = []
    for optimizer, kinds in runs.items():
        differs = first_difference(list(kinds.values()))
        times = args.steps // args.every
        equal = f"equal at all {times} comparisons" if differs is None else f"DIFFERENT after step {differs}"
        lines.append(f"- {OPTIMIZERS[optimizer].__name__}: bits with checkpoints and without are {equal}.")
        lines += [f"- {OPTIMIZERS[optimizer].__name__}, {kind}: MEMORY GREW." for kind in kinds if grew(kinds[kind])]
    lines += [
        "",
        "MiB: resident memory after a tenth of the steps, at the end, and the largest reading. Tensors, objects: those",
        "that Python tracks, least and most in the first and in the second half. µs: medians of `optimizer.step()` in",
        "the first and in the last tenth of the steps, and their ratio; CPU: time of the calling thread.",
        "",
        "| run | minutes | MiB at 1/10 | at the end | largest | tensors | objects | µs | µs CPU | finite |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [
        row_of(f"{OPTIMIZERS[optimizer].__name__}, {kind}", run)
        for optimizer, kinds in runs.items()
        for kind, run in kinds.items()
    ]
    facts = [f"{args.steps} steps a run, compared and saved after each {args.every}, {args.threads} threads"]
    return page.Page("Soak: many steps, with checkpoints and without", facts, lines)


def soak(args: argparse.Namespace, command: list[str]) -> bool:
    """Makes the runs, writes the page and prints it. Returns whether all bits were equal and no memory grew."""
    if args.every < 1 or args.threads < 1 or args.steps < max(20, args.every) or args.steps % args.every:
        raise UserError("--steps must be 20 or more and a multiple of --every; --every and --threads 1 or more.")
    torch.set_num_threads(args.threads)  # before the page says how many there are
    about = machine.describe(torch.device("cpu"), command)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror or error}).") from None
    print(
        f"Training {args.steps} steps, twice with each optimizer. The page goes to {args.out / 'soak.md'}.", flush=True
    )
    runs: dict[str, dict[str, dict]] = {}
    for optimizer in args.optimizer:
        runs[optimizer] = {}
        for kind, saves in _KINDS.items():
            path = args.out / f"{optimizer}-{kind.replace(' ', '-')}.json"
            runs[optimizer][kind] = run_of(settings_of(args, optimizer, saves), about, path)
    first = runs[args.optimizer[0]]["without checkpoints"]  # which an earlier call may have made
    text = page_of(args, runs).markdown(first["about"], others=None)
    (args.out / "soak.md").write_text(text, encoding="utf-8")
    print(text)
    equal = all(first_difference(list(kinds.values())) is None for kinds in runs.values())
    return equal and not any(grew(run) for kinds in runs.values() for run in kinds.values())


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 where bits differ or memory grows; 2 where an option is wrong."""
    arguments = sys.argv[1:] if argv is None else argv
    command = ["python", "benchmarks/soak.py", *machine.without_out(arguments)]
    return exit_status(
        "soak.py",
        "finished runs are kept; the same command goes on.",
        lambda: soak(parser().parse_args(arguments), command),
    )


if __name__ == "__main__":
    sys.exit(main())
