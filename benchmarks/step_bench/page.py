# SPDX-License-Identifier: Apache-2.0
"""A benchmark that leaves one page of Markdown, with the facts of the machine above what it has measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from tools import machine
from tools.program import UserError, exit_status


class Page(NamedTuple):
    """The program's own part; lines of Markdown."""

    title: str
    facts: list[str]  # listed after those of the machine
    body: list[str]

    def markdown(self, about: dict[str, str], others: float | None) -> str:
        """The whole page. ``about``: of machine.describe; ``others``: share of the CPU, None where it is not known."""
        facts = [*(f"{name}: {value}" for name, value in about.items()), *self.facts]
        if others is not None:
            facts.append(f"other processes used {others:.0%} of the CPU meanwhile")
        return "\n".join([f"# {self.title}", "", *(f"- {fact}" for fact in facts), "", *self.body]) + "\n"


class Benchmark(NamedTuple):
    """What will be measured, in a few words; the page goes to STEM.md."""

    what: str
    stem: str
    measure: Callable[[], Page]


def run(
    program: str,
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    prepare: Callable[[argparse.Namespace], Benchmark],
) -> int:
    """Measures, writes the page into --out, and prints it, even where it cannot be written.

    Args:
        program: the name of its file, without .py.
        parser: has --device, --repeat and --out, and maybe --threads.
        argv: the command line; None for that of the process.
        prepare: makes the benchmark from the options; UserError where one is wrong.

    Returns:
        The exit status, as of exit_status().
    """

    arguments = sys.argv[1:] if argv is None else argv

    def execute() -> None:
        args = parser.parse_args(arguments)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device cuda: torch {torch.__version__} sees no CUDA GPU; use --device cpu.")
        benchmark = prepare(args)
        path = args.out / f"{benchmark.stem}.md"
        if getattr(args, "threads", None):
            torch.set_num_threads(args.threads)  # before the page says how many there are
        print(
            f"Measuring {benchmark.what}, {args.repeat} rounds, on {args.device}, "
            f"threads: {torch.get_num_threads()}. The page goes to {path}.",
            flush=True,
        )
        command = ["python", f"benchmarks/{program}.py", *machine.without_out(arguments)]
        about, others = machine.describe(torch.device(args.device), command), machine.OtherProcesses()
        text = benchmark.measure().markdown(about, others.share())
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written ({error.strerror or error}).") from None
        finally:
            print(text)
        print("Written:", path)

    return exit_status(f"{program}.py", "nothing was written.", execute)
