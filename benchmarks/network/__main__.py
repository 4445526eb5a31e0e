# SPDX-License-Identifier: Apache-2.0
"""Gradient exchanges of DistributedDataParallel compared on slow networks.

    sudo python -m benchmarks.network run                                # hosts are namespaces of this machine
    python -m benchmarks.network accuracy --out out/exchanges            # digits; two processes, no root
    python -m benchmarks.network report benchmarks/results --out out/network

What is measured, and what the columns mean: benchmarks/README.md; the results: docs/exchange-measurements.md.
"""

from __future__ import annotations

import argparse
import sys

from examples.training.errors import UserError, exit_status

from . import accuracy, options, report


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help.")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = _Parser(prog="benchmarks.network", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    run = commands.add_parser("run", help="measure bytes and step times between network namespaces; needs root")
    options.add_run_options(run)
    run.set_defaults(command=_run)
    trainings = commands.add_parser(
        "accuracy", help="train with each exchange; the logs are for benchmarks.train report"
    )
    accuracy.add_accuracy_options(trainings)
    trainings.set_defaults(command=_accuracy)
    make_report = commands.add_parser("report", help="tables of all measurements, and a model checked against them")
    make_report.add_argument("directory", metavar="DIR", help="where run has left network-hosts*.json")
    make_report.add_argument("--out", metavar="DIR", required=True, help="for network-model.md and network-model.png")
    make_report.set_defaults(command=_report)
    return p


def _run(args: argparse.Namespace, arguments: list[str]) -> None:
    from .run import run

    print(f"Written: {', '.join(map(str, run(args, arguments)))}")


def _accuracy(args: argparse.Namespace, arguments: list[str]) -> None:
    trained, total = accuracy.run(args, arguments)
    print(f"{trained} runs trained, {total - trained} were finished before; logs in {args.out}")


def _report(args: argparse.Namespace, _: list[str]) -> None:
    print(f"Written: {', '.join(map(str, report.write(args.directory, args.out)))}")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 2 for something the user can put right, with one sentence on stderr; 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def execute() -> None:
        args = parser().parse_args(arguments)
        args.command(args, arguments)

    return exit_status("benchmarks.network", "the network is taken down.", execute)


if __name__ == "__main__":
    sys.exit(main())
