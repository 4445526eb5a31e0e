# SPDX-License-Identifier: Apache-2.0
"""Train networks with SGD, CSGD and the calibration layer, and turn the logs into tables and plots.

    python -m benchmarks.train run --data digits --seeds 0 1 2 --lrs 0.02 0.05 --out out/digits
    python -m benchmarks.train run --data fashion-mnist --data-dir DIR --holdout 5000 --workers 2 \\
        --methods sgd csgd --calibrations 0 0.05 0.25 1 --lrs 0.01 0.02 0.05 --out out/fashion
    python -m benchmarks.train report out/fashion --out out/fashion-report
    python -m benchmarks.train run --task detection --model fcos --data digits --epochs 6 --schedule cosine \\
        --batch-size 16 --lrs 0.02 --out out/scenes
    python -m benchmarks.train scenes --data digits --epochs 6 --out scenes.png

All methods start from the same weights and see the same batches. What the columns mean: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys

from examples.training.errors import UserError, exit_status
from examples.training.report import prepare

from . import grid, options, report, scenes


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help.")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = _Parser(prog="benchmarks.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    run = commands.add_parser("run", help="train a grid of settings")
    options.add_run_options(run)
    run.set_defaults(command=_run)
    make_report = commands.add_parser("report", help="tables and plots from the logs")
    make_report.add_argument("directories", nargs="+", metavar="DIR", help="what run was given as --out")
    make_report.add_argument(
        "--out", metavar="DIR", required=True, help="for table.md, summary.csv, curves.png, lr.png"
    )
    make_report.add_argument(
        "--methods", nargs="+", metavar="NAME", help="only these, and SGD (e.g. csgd layer-weight)"
    )
    make_report.add_argument("--dtypes", nargs="+", metavar="NAME", help="only these, and SGD in float32")
    make_report.set_defaults(command=_report)
    picture = commands.add_parser("scenes", help="a picture of the scenes of --task detection")
    scenes.add_options(picture)
    picture.set_defaults(command=_scenes)
    return p


def _run(args: argparse.Namespace, arguments: list[str]) -> None:
    runs = options.runs(args)
    command = ["python", "-m", "benchmarks.train", *arguments]
    plan = grid.Plan(prepare(args.out), options.threads(args), command)
    trained = grid.run_all(runs, plan, args.workers)
    print(f"{trained} runs trained, {len(runs) - trained} were finished before; logs in {args.out}")


def _report(args: argparse.Namespace, _: list[str]) -> None:
    print(report.write(args.directories, args.out, args.methods, args.dtypes))
    print(f"Written to {args.out}: table.md, summary.csv, curves.png, lr.png")


def _scenes(args: argparse.Namespace, _: list[str]) -> None:
    scenes.run(args)
    print(f"Written to {args.out}")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 2 for something the user can put right, with one sentence on stderr; 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def execute() -> None:
        args = parser().parse_args(arguments)
        args.command(args, arguments)

    return exit_status("benchmarks.train", "the same command goes on after the last finished run.", execute)


if __name__ == "__main__":
    sys.exit(main())
