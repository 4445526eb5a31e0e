# SPDX-License-Identifier: Apache-2.0
"""A page of Markdown on what a benchmark has measured: with the machine's facts above, printed and written."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch

from examples.training.errors import UserError, exit_status

from . import machine


class Page(NamedTuple):
    """What the program itself says; lines of Markdown."""

    title: str
    facts: list[str]  # that go with those of the machine
    body: list[str]

    def markdown(self, about: dict[str, str], others: float | None) -> str:
        """The whole of it. ``about``: of machine.describe; ``others``: share of the CPU, None where it is not known."""
        facts = [*(f"{name}: {value}" for name, value in about.items()), *self.facts]
        if others is not None:
            facts.append(f"other processes used {others:.0%} of the CPU meanwhile")
        return "\n".join([f"# {self.title}", "", *(f"- {fact}" for fact in facts), "", *self.body]) + "\n"


def run(
    program: str, args: argparse.Namespace, arguments: list[str], stem: str, measure: Callable[[], Page]
) -> int:  # fmt: skip
    """Measures, prints the page, and writes it to STEM.md in ``args.out``.

    Args:
        program: the name of its file, without .py.
        args: with ``device`` and ``out``.
        arguments: what ``args`` was parsed from.
        measure: may raise UserError.

    Returns:
        The exit status: 0; 2 for something the user can put right, with one sentence on stderr; 130 for Ctrl-C.
    """

    def execute() -> None:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device cuda: torch {torch.__version__} sees no CUDA GPU; use --device cpu.")
        command = ["python", f"benchmarks/{program}.py", *machine.without_out(arguments)]
        about, others = machine.describe(torch.device(args.device), command), machine.OtherProcesses()
        text = measure().markdown(about, others.share())
        print(text)
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"{stem}.md"
        path.write_text(text, encoding="utf-8")
        print("Written:", path)

    return exit_status(f"{program}.py", "nothing was written.", execute)
