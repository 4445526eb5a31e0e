# SPDX-License-Identifier: Apache-2.0
"""Tables and plots from the logs of one experiment, which may lie in several directories.

python -m experiments report out/fashion out/fashion-bfloat16 --out out/fashion-report
"""

from __future__ import annotations

import argparse

from experiments import report


def add_options(p: argparse.ArgumentParser) -> None:
    """The command line."""
    p.add_argument("directories", nargs="+", metavar="DIR", help="what an experiment was given as --out")
    p.add_argument("--out", metavar="DIR", required=True, help="for tables and plots")
    p.add_argument("--methods", nargs="+", metavar="NAME", help="only these, and SGD (e.g. csgd layer-weight)")
    p.add_argument("--dtypes", nargs="+", metavar="NAME", help="only these, and SGD in float32")


def run(args: argparse.Namespace, _: list[str]) -> None:
    """Reads and writes."""
    report.write(args.directories, args.out, args.methods, args.dtypes)
