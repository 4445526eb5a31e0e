# SPDX-License-Identifier: Apache-2.0
"""Measure one optimizer step: CSGD beside torch.optim.SGD and other packages, or CalibratedAdamW beside
torch.optim.AdamW, in one interleaved run.

    python benchmarks/bench_step.py --device cuda
    python benchmarks/bench_step.py --device cpu --lists resnet50 --peers sgd_fused,csgd --repeat 31

    python benchmarks/bench_step.py --device cpu --optimizer adamw

Writes step-DEVICE-DTYPE.md, of AdamW step-adamw-DEVICE-DTYPE.md, with .json and .png into --out, and prints the table.
The columns: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# An installed csgd_cuda comes first; without one, the package next to this directory.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from step_bench import report
from step_bench.gradients import Quantiles
from step_bench.lists import LISTS, scaled
from step_bench.peers import BASELINES, PEERS, Peer
from step_bench.run import ListRun, Settings

from csgd_cuda import extension
from tools import machine
from tools.program import UserError, exit_status

_COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}  # of each of two buffers; far more than a cache holds
_SMALLEST_COPY = 2**20


def _names(known: dict):
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return [name for name in known if name in names]  # in their own order, each once

    return parse


def _positive(kind: type):
    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse's message names it
    return parse


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    p.add_argument("--optimizer", choices=tuple(BASELINES), default="sgd", help="default: %(default)s")
    p.add_argument("--lists", type=_names(LISTS), metavar="A,B", help=f"of {', '.join(LISTS)} (default: the device's)")
    p.add_argument("--peers", type=_names(PEERS), metavar="A,B", help=f"of {', '.join(PEERS)} (default: the device's)")
    p.add_argument(
        "--repeat",
        type=_positive(int),
        default=25,
        help="rounds; ten times as many where a step is short (%(default)s)",
    )
    p.add_argument(
        "--cpu-isa",
        choices=("avx512", "avx2", "baseline"),
        help="instruction set of the kernels here, not of torch's (default: the newest that the processor has)",
    )
    p.add_argument("--scale", type=_positive(float), default=1.0, help="of the tensors' sizes (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="default: benchmarks/results")
    return p


def _notes(args: argparse.Namespace) -> list[str]:
    notes = [f"gradients: {Quantiles().origin['what']}; {Quantiles().origin['training']}"]
    if args.scale != 1:
        notes.append(f"SCALED: tensors have {args.scale:g} times their size; not the figures of the real lists")
    if args.device == "cpu" and args.dtype != "float32" and args.optimizer == "sgd":
        notes.append(
            "torch SGD fused is no fair baseline here: with torch 2.13 it skips most of a low-precision parameter on a "
            "CPU (pytorch#191763), so its time is that of a step left undone"
        )
    return notes


def chosen_peers(args: argparse.Namespace) -> list[Peer]:
    """Those of --peers, or of the device, and the baseline ahead of them. UserError for one of another family."""
    if foreign := [name for name in args.peers or () if PEERS[name].family != args.optimizer]:
        raise UserError(f"--peers {','.join(foreign)}: compared with --optimizer {PEERS[foreign[0]].family} only.")
    family = [peer for peer in PEERS.values() if peer.family == args.optimizer]
    peers = [p for p in family if (p.name in args.peers if args.peers else args.device in p.default_on)]
    baseline = PEERS[BASELINES[args.optimizer]]  # the ratios are formed to it
    return peers if baseline in peers else [baseline, *peers]


def run(args: argparse.Namespace, arguments: list[str]) -> dict:
    """Measures all lists and writes the report after each, in case a later one fails. Returns the report as a dict."""
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)
    copy_bytes = max(_SMALLEST_COPY, int(_COPY_BYTES[args.device] * min(1, args.scale)))
    settings = Settings(device, getattr(torch, args.dtype), args.repeat, copy_bytes)
    peers = chosen_peers(args)
    command = ["python", "benchmarks/bench_step.py", *machine.without_out(arguments)]
    results = {
        "device": args.device,
        "dtype": args.dtype,
        "optimizer": args.optimizer,
        "machine": machine.describe(device, command),
        "settings": {"repeat": args.repeat, "scale": args.scale, "copy_bytes": copy_bytes},
        "notes": _notes(args),
        "lists": {},
    }
    lists = [e for e in LISTS.values() if (e.name in args.lists if args.lists else args.device in e.default_on)]
    print(
        f"Measuring steps of {len(peers)} optimizers on {', '.join(entry.label for entry in lists)}, "
        f"{args.repeat} rounds, {args.dtype} on {args.device}, threads: {torch.get_num_threads()}. "
        f"Results go to {args.out}.",
        flush=True,
    )
    for entry in lists:
        shapes = scaled(entry.shapes(args.device), args.scale)
        measured = ListRun(entry.label, shapes, peers, settings, entry.one_each).run()
        results["lists"][entry.name] = {"label": entry.label, **measured}
        report.write(results, args.out)
    return results


def _picture(results: dict, out: Path) -> list[Path]:
    try:
        from step_bench import figure
    except ModuleNotFoundError as error:
        print(f"No picture: {error.name} is not installed.")
        return []
    path = report.stem(results, out).with_suffix(".png")
    return [path] if figure.draw(results, path) else []


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 where the command line is wrong or the device is not there; 130 for Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else argv

    def execute() -> None:
        args = parser().parse_args(arguments)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device cuda: torch {torch.__version__} sees no CUDA GPU; use --device cpu.")
        if args.cpu_isa and not (extension._C and extension._C.set_cpu_isa(args.cpu_isa)):
            raise UserError(f"--cpu-isa {args.cpu_isa}: this processor, or the extension, does not have it.")
        results = run(args, arguments)
        written = [*report.write(results, args.out), *_picture(results, args.out)]
        print(report.markdown(results))
        print("Written:", ", ".join(map(str, written)))

    return exit_status("bench_step.py", "the lists measured so far are in --out.", execute)


if __name__ == "__main__":
    sys.exit(main())
