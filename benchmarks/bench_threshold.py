# SPDX-License-Identifier: Apache-2.0
"""Measure hard thresholding against torch.topk with a mask, and what it adds to a step of CSGD.

    python benchmarks/bench_threshold.py
    python benchmarks/bench_threshold.py --device cuda --sizes 100000 10000000 100000000

hard_threshold_, torch.topk and masking, and steps of CSGD with and without sparsity, in one interleaved run. Writes
threshold-DEVICE.md into --out and prints it. A ratio is to torch.topk, or to the step without sparsity, in the same
round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

# An installed csgd_cuda comes first; without one, the package next to this directory.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.step_bench import page, progress, timing
from csgd_cuda import CSGD, hard_threshold_
from tools.program import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    p.add_argument("--sizes", type=int, nargs="+", default=[10_000, 1_000_000], help="elements (default: %(default)s)")
    p.add_argument("--sparsity", type=float, default=0.9, help="default: %(default)s")
    p.add_argument("--repeat", type=int, default=25, help="rounds (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="default: benchmarks/results")
    return p


def threshold_by_topk(weight: Tensor, keep: int) -> None:
    """What users write: the k largest magnitudes by torch.topk, a mask of them, a product."""
    places = weight.abs().view(-1).topk(keep, sorted=False).indices
    mask = torch.zeros_like(weight).view(-1).scatter_(0, places, 1.0)
    weight.mul_(mask.view_as(weight))


def calls_of(args: argparse.Namespace, size: int) -> dict[str, Callable[[], None]]:
    """What is compared, on a square weight of about ``size`` elements that is the same each time."""
    side = max(1, round(size**0.5))
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn(side, side, generator=generator).to(args.device, DTYPES[args.dtype])
    keep = side * side - round(args.sparsity * side * side)
    weight = fresh.clone()

    def on_copy(threshold: Callable[[Tensor, int], None]) -> Callable[[], None]:
        def call() -> None:
            weight.copy_(fresh)
            threshold(weight, keep)

        return call

    def step(sparsity: float, **options: object) -> Callable[[], None]:
        param = fresh.clone().requires_grad_()
        param.grad = fresh.roll(1, 0) * 1e-3
        optimizer = CSGD([param], lr=0.01, momentum=0.9, calibration=1.0, sparsity=sparsity, **options)
        optimizer.step()
        return optimizer.step

    return {
        "torch.topk and mask": on_copy(threshold_by_topk),
        "hard_threshold_": on_copy(lambda tensor, k: hard_threshold_([tensor], [k])),
        "only the copy before both": lambda: weight.copy_(fresh),
        "step of CSGD": step(0.0),
        "step and threshold": step(args.sparsity),
        "the same, regrow=False": step(args.sparsity, regrow=False),
        "step between thresholds, regrow=False": step(args.sparsity, regrow=False, threshold_every=2**40),
    }


COMPARED_WITH = {
    "torch.topk and mask": "torch.topk and mask",
    "hard_threshold_": "torch.topk and mask",
    "only the copy before both": "torch.topk and mask",
    "step of CSGD": "step of CSGD",
    "step and threshold": "step of CSGD",
    "the same, regrow=False": "step of CSGD",
    "step between thresholds, regrow=False": "step of CSGD",
}


def measure(args: argparse.Namespace) -> list[dict]:
    """A row for each size and call: milliseconds, and the ratios to what it is compared with."""
    timer = timing.make_timer(torch.device(args.device))
    rows = []
    with progress.bar(args.repeat * len(args.sizes), f"hard thresholding, {args.device}") as bar:
        for size in args.sizes:
            calls = {}
            for name, call in calls_of(args, size).items():
                call()  # the first one allocates
                host_ms = timer.prepare(call)
                calls[name] = lambda call=call, host_ms=host_ms: timer.sample(call, host_ms)
            measured = timing.interleave(calls, dict.fromkeys(calls, args.repeat), args.repeat, bar.update)
            for name, samples in measured.items():
                base = measured[COMPARED_WITH[name]]
                ratios = sorted(ms / base[turn] for turn, ms in samples.items())
                ms = statistics.median(samples.values())
                rows.append({"size": size, "name": name, "ms": ms, "base": COMPARED_WITH[name], "ratios": ratios})
    return rows


def page_of(args: argparse.Namespace, rows: list[dict]) -> page.Page:
    """The report."""
    lines = [
        "Medians. ratio: to the call named last, in the same round.",
        "",
        "| elements | call | ms | ratio | quartiles of ratio | to |",
        "| ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        low, high = statistics.quantiles(row["ratios"], n=4)[::2]
        figures = f"{row['ms']:.3f} | {statistics.median(row['ratios']):.3f} | {low:.3f} ... {high:.3f}"
        lines.append(f"| {row['size']:,} | {row['name']} | {figures} | {row['base']} |")
    title = f"Hard thresholding, {args.device}, {args.dtype}, sparsity {args.sparsity}"
    return page.Page(title, [f"{args.repeat} rounds"], lines)


def prepare(args: argparse.Namespace) -> page.Benchmark:
    """Raises UserError where an option is out of its range."""
    if not 0 < args.sparsity < 1 or min(args.sizes) < 1 or args.repeat < 2:
        raise UserError("--sparsity must be between 0 and 1, --sizes at least 1, --repeat at least 2.")
    what = f"hard thresholding of {', '.join(f'{size:,}' for size in args.sizes)} elements"
    return page.Benchmark(what, f"threshold-{args.device}", lambda: page_of(args, measure(args)))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 where an option is wrong or the device is not there."""
    return page.run("bench_threshold", parser(), argv, prepare)


if __name__ == "__main__":
    sys.exit(main())
