# SPDX-License-Identifier: Apache-2.0
"""Measure what a rank computes for an exchange of gradients as codes: each operation, the whole, and its options.

    python benchmarks/bench_exchange.py --threads 1
    python benchmarks/bench_exchange.py --device cuda --numel 100000000

Nothing is sent: the words that other ranks would send are this rank's own. All in one interleaved run; writes
exchange-DEVICE.md into --out and prints it. A ratio is to a copy of the gradient in the same round.
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

from benchmarks.step_bench import page, progress, timing
from csgd_cuda.distributed.clip_and_block import (
    add_mean,
    block_exponents,
    norm_of,
    pack_exponents,
    pack_outliers,
    scale_blocks,
    take_outliers,
    unpack_exponents,
    unpack_outliers,
)
from csgd_cuda.distributed.codes import unit_of
from csgd_cuda.distributed.coding import choose_coding
from tools.program import UserError

CLIP, BLOCK = 4, 32


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    p.add_argument("--numel", type=int, default=10_000_000, help="coordinates (default: %(default)s)")
    p.add_argument("--ranks", type=int, default=4, help="default: %(default)s")
    p.add_argument("--threads", type=int, help="of the CPU (default: as torch has it)")
    p.add_argument("--repeat", type=int, default=15, help="rounds (default: %(default)s)")
    p.add_argument("--reference", action="store_true", help="the pure-PyTorch reference instead of the kernels")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="default: benchmarks/results")
    return p


def operations(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """{what: a call that does it for ``numel`` coordinates}"""
    device = torch.device(args.device)
    coding = choose_coding(device, False if args.reference else None)
    grad = torch.randn(args.numel, generator=torch.Generator().manual_seed(0)).to(device)
    copy, out = torch.empty_like(grad), torch.empty_like(grad)

    def size() -> torch.Tensor:
        low, high = torch.aminmax(grad)
        return torch.maximum(-low, high).abs().unsqueeze(0)

    units = unit_of(size(), args.ranks, grad.dtype)

    def encode() -> torch.Tensor:
        return coding.encode([grad], units * args.ranks, [0], seed=0, step=0)

    codes = encode()
    words = coding.pack(codes, args.ranks)
    sums = coding.add(words).expand(args.ranks, -1).contiguous()

    def whole() -> None:
        unit = unit_of(size(), args.ranks, grad.dtype)
        packed = coding.pack(coding.encode([grad], unit * args.ranks, [0], seed=0, step=0), args.ranks)
        coding.decode(coding.add(packed).expand(args.ranks, -1).contiguous(), unit, [out])

    written, written_sums = coding.write_rows(words, 1), coding.write_rows(sums, args.ranks)

    def clip() -> None:
        bound = norm_of(grad).mul_(CLIP / args.numel**0.5).unsqueeze(0)
        outliers = take_outliers([copy], bound)
        add_mean([copy], [unpack_outliers(pack_outliers(outliers), grad.dtype)])

    def blocks() -> None:
        exponents = block_exponents(grad, BLOCK, size()[0], units[0], args.ranks)
        for sign in (1, -1):
            scale_blocks(grad, BLOCK, unpack_exponents(pack_exponents(exponents, 1))[: len(exponents)], sign)

    return {
        "copy of the gradient": lambda: copy.copy_(grad),
        "largest magnitude": size,
        "encode": encode,
        "pack": lambda: coding.pack(codes, args.ranks),
        "add (unpack, add, pack)": lambda: coding.add(words),
        "decode (unpack, multiply)": lambda: coding.decode(sums, units, [out]),
        "all of it": whole,
        "compact: write codes": lambda: coding.write_rows(words, 1),
        "compact: read codes": lambda: coding.read_rows(written, words.shape[1], 1),
        "compact: write the sums of a shard": lambda: coding.write_rows(sums[:1], args.ranks),
        "compact: read sums": lambda: coding.read_rows(written_sums, sums.shape[1], args.ranks),
        f"clip {CLIP}: norm, outliers taken and given back": clip,
        f"blocks of {BLOCK}: exponents, scaled there and back": blocks,
    }


def measure(args: argparse.Namespace) -> list[dict]:
    """A row for each operation: nanoseconds per coordinate, the ratio to the copy."""
    timer = timing.make_timer(torch.device(args.device))
    calls = {}
    for name, call in operations(args).items():
        host_ms = timer.prepare(call)
        calls[name] = lambda call=call, host_ms=host_ms: timer.sample(call, host_ms)
    with progress.bar(args.repeat, f"{args.numel} coordinates, {args.device}") as bar:
        measured = timing.interleave(calls, dict.fromkeys(calls, args.repeat), args.repeat, bar.update)
    (_, copies), *_ = measured.items()
    rows = []
    for name, samples in measured.items():
        ratios = [ms / copies[turn] for turn, ms in samples.items()]
        ns = [ms * 1e6 / args.numel for ms in samples.values()]
        rows.append({"name": name, "ns": statistics.median(ns), "least": min(ns), "ratio": statistics.median(ratios)})
    return rows


def page_of(args: argparse.Namespace, rows: list[dict]) -> page.Page:
    """The report."""
    which = "pure PyTorch" if args.reference else "kernels"
    what = (
        f"{args.numel:,} coordinates in float32, {args.ranks} ranks, {torch.get_num_threads()} threads, "
        f"{args.repeat} rounds"
    )
    lines = ["| | ns per coordinate | the least | ratio to the copy |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {row['name']} | {row['ns']:.2f} | {row['least']:.2f} | {row['ratio']:.2f} |" for row in rows]
    return page.Page(f"What a rank computes for an exchange of codes, {args.device}, {which}", [what], lines)


def prepare(args: argparse.Namespace) -> page.Benchmark:
    """Raises UserError where an option is out of its range."""
    if min(args.numel, args.ranks, args.repeat, 1 if args.threads is None else args.threads) < 1:
        raise UserError("--numel, --ranks, --threads and --repeat must be 1 or more.")
    stem = f"exchange-{args.device}{'-reference' if args.reference else ''}"
    what = f"an exchange of {args.numel:,} coordinates"
    return page.Benchmark(what, stem, lambda: page_of(args, measure(args)))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 where an option is wrong or the device is not there."""
    return page.run("bench_exchange", parser(), argv, prepare)


if __name__ == "__main__":
    sys.exit(main())
