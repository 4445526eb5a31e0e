# SPDX-License-Identifier: Apache-2.0
"""Trainings with CSGD beside torch.optim.SGD, and what else was measured by training.

    python -m experiments NAME --help

Each experiment trains what is not finished in --out, leaves its logs there, and a report in --out/report. After an
interruption the same command goes on. All methods start from the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from tools.program import exit_status

from .cli import Parser

# Name: (module with add_options(parser) and run(args, command), and its docstring for --help; what it does)
PROGRAMS = {
    "classification": ("experiments.classification.program", "images: SGD, CSGD and the calibration layer"),
    "detection": ("experiments.detection.program", "objects in scenes: SGD, CSGD and the calibration layer"),
    "degraded": ("experiments.degraded.program", "classification of degraded images, by CSGD and SGD"),
    "pruning": ("experiments.pruning.program", "accuracy against sparsity"),
    "gclayer": ("experiments.gclayer.program", "the paper's layer beside plain convolutions"),
    "exchanges": ("experiments.network.accuracy", "accuracy with each exchange of gradients, on several processes"),
    "network": ("experiments.network.run", "bytes and times of each exchange on slow links; needs root"),
    "network-model": ("experiments.network.report", "tables of what network has measured, and a model of it"),
    "report": ("experiments.report.program", "tables and plots from logs, of several directories together"),
    "scenes": ("experiments.detection.scenes", "a picture of the scenes of detection"),
}
# What the user should know after Ctrl-C.
_INTERRUPTED = {"network": "the network is taken down.", "scenes": "nothing was written."}


def parser(arguments: list[str]) -> argparse.ArgumentParser:
    """The command line; only the module of the program that ``arguments`` name is imported."""
    names = "\n".join(f"    {name:<16}{what}" for name, (_, what) in PROGRAMS.items())
    p = Parser(
        prog="python -m experiments",
        usage="python -m experiments NAME [options]",
        description=f"{__doc__}\nNAME is one of\n\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(prog=p.prog, required=True, metavar="NAME", help=argparse.SUPPRESS, parser_class=Parser)
    for name, (module, _) in PROGRAMS.items():
        program = importlib.import_module(module) if name in arguments[:1] else None
        command = commands.add_parser(
            name,
            description=program and program.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if program is not None:
            program.add_options(command)
            command.set_defaults(run=program.run)
    return p


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 2 for something the user can put right, with one sentence on stderr; 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def execute() -> None:
        args = parser(arguments).parse_args(arguments)
        args.run(args, ["python", "-m", "experiments", *arguments])

    goes_on = "the same command goes on after the last finished run."
    return exit_status("experiments", _INTERRUPTED.get(next(iter(arguments), ""), goes_on), execute)


if __name__ == "__main__":
    sys.exit(main())
