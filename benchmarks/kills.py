# SPDX-License-Identifier: Apache-2.0
"""Kill a training by SIGKILL, many times, and go on from its last whole checkpoint: nothing may be lost.

    python benchmarks/kills.py
    python benchmarks/kills.py --kills 20 --optimizer adamw --seed 1

The training is that of long_training.py, in a process that saves after every --every steps. Half of the kills are aimed
into a save, the others come at any time. After each kill the checkpoint must load whole, and be the last one that was
finished. In the end all checkpoints that were gone on from, and the last one, must have the bits of a training that was
never killed. Writes a line for each kill to kills.jsonl, and kills.md, into --out. The exit status is 1 where something
was lost.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

# An installed csgd_cuda comes first; without one, the package next to this directory.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.long_training import DTYPES, OPTIMIZERS, Training, digest, part_of, resumed
from benchmarks.step_bench import page, progress
from tools import machine
from tools.program import UserError, exit_status

PATIENCE = 120  # seconds without a word from the training
# One process imports torch, the trainings are forked from it.
forkserver = multiprocessing.get_context("forkserver")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="default: both")
    p.add_argument("--kills", type=int, default=200, help="of each optimizer (default: %(default)s)")
    p.add_argument("--every", type=int, default=10, help="steps from checkpoint to checkpoint (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the times of the kills (default: %(default)s)")
    p.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    p.add_argument("--out", type=Path, default=Path("out/soak"), help="default: %(default)s")
    return p


# The training in another process


class Work(NamedTuple):
    """What a child does: to go on from the checkpoint, or to begin, and to train until the batch ``until``."""

    optimizer: str
    checkpoint: Path
    every: int
    until: int
    threads: int = 1
    dtypes: Sequence[torch.dtype] = DTYPES


def train(work: Work, connection: Connection) -> None:
    """Sends (word, batch, seconds of a clock): "begun", "saving", "saved", "batch" after each batch, "done". Then it
    waits for the other end to be closed."""
    torch.set_num_threads(work.threads)
    training = resumed(work.optimizer, work.checkpoint, work.dtypes)

    def send(word: str) -> None:
        connection.send((word, training.batch, time.monotonic()))

    send("begun")
    while training.batch < work.until:
        training.run_batch()
        if training.batch % work.every == 0:
            send("saving")
            training.save(work.checkpoint)
            send("saved")
        send("batch")
    send("done")
    connection.poll(None)


class Child:
    """A process that trains; killed at the latest at the end of the ``with``."""

    def __init__(self, work: Work):
        self._connection, of_child = forkserver.Pipe()
        self._process = forkserver.Process(target=train, args=(work, of_child))
        self._process.start()
        of_child.close()
        self.words: dict[str, list[tuple[int, float]]] = {}  # of each, all batches and times

    def last(self, word: str) -> int:
        """The batch of the last such word; -1 where there was none."""
        return self.words.get(word, [(-1, 0.0)])[-1][0]

    def wait_for(self, word: str, batch: int = 0) -> int:
        """Until there is this word of that batch, or of a later one; its batch."""
        while self.last(word) < batch:
            if not self._connection.poll(PATIENCE):
                raise TimeoutError(f"no word from the training in {PATIENCE} seconds")
            self._take()
        return self.last(word)

    def kill(self) -> None:
        """SIGKILL; then all that it has sent before is in ``words``."""
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()
        if self._process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"the training had ended with status {self._process.exitcode} before it was killed")
        try:
            while True:
                self._take()
        except (EOFError, ConnectionResetError):
            pass

    def _take(self) -> None:
        word, batch, seconds = self._connection.recv()
        self.words.setdefault(word, []).append((batch, seconds))

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


# The kills


class Pace:
    """How long a batch and a save take, by what children have sent."""

    def __init__(self) -> None:
        self._batches, self._saves = [0.005], [0.01]

    def learn(self, child: Child) -> None:
        saves = zip(child.words.get("saving", []), child.words.get("saved", []), strict=False)
        self._saves += [end - begin for (_, begin), (_, end) in saves]
        times = [seconds for _, seconds in child.words.get("batch", [])]
        self._batches += [b - a for a, b in pairwise(times)]

    def batch(self) -> float:
        return statistics.median(self._batches)

    def save(self) -> float:
        return statistics.median(self._saves)


def kill_once(work: Work, draw: random.Random, pace: Pace) -> dict[str, Any]:
    """Lets the training go on, kills it at a time that is drawn, and says what is left of it."""
    with Child(work) as child:
        begun = child.wait_for("begun")
        if draw.random() < 0.5:
            aim = "a save"
            child.wait_for("saving", begun + work.every * draw.randint(1, 2))
            time.sleep(draw.random() * pace.save())
        else:
            aim = "any time"
            time.sleep(draw.random() * 3 * work.every * pace.batch())
        child.kill()
        pace.learn(child)
    saving, saved = child.last("saving"), max(child.last("saved"), begun - begun % work.every)
    found = torch.load(work.checkpoint, weights_only=True) if work.checkpoint.exists() else None
    batch = 0 if found is None else found["batch"]
    return {
        "optimizer": work.optimizer, "aim": aim, "begun": begun, "reached": max(child.last("batch"), begun),
        "in_save": saving > saved, "part": state_of_part(work.checkpoint), "batch": batch,
        "digest": None if found is None else digest(found), "lost": is_lost(batch, saving, saved),
    }  # fmt: skip


def is_lost(found: int, saving: int, saved: int) -> bool:
    """Whether the checkpoint is not the last that was finished, by the last words. A save that was killed after the
    file had taken its name has been finished, too."""
    return found != saved and not found == saving > saved


def state_of_part(checkpoint: Path) -> str:
    """Of a save that did not end: "none", "torn", or "whole"; the file is removed."""
    part = part_of(checkpoint)
    if not part.exists():
        return "none"
    try:
        torch.load(part, weights_only=True)
        state = "whole"
    except Exception:  # whatever torch raises for a file that ends too early
        state = "torn"
    part.unlink()
    return state


def differences(rows: list[dict[str, Any]], work: Work) -> list[int]:
    """The batches of checkpoints whose bits are not those of a training that was never killed."""
    training, wrong = Training(work.optimizer, work.dtypes), []
    expected = {0: None}
    for _ in range(max(row["batch"] for row in rows)):
        training.run_batch()
        if training.batch % work.every == 0:
            expected[training.batch] = digest(training.state_dict())
    for row in rows:
        if expected[row["batch"]] != row["digest"]:
            wrong.append(row["batch"])
    return wrong


def kill_often(args: argparse.Namespace, optimizer: str, log: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """A row for each kill, and one for the end; the batches of checkpoints with other bits."""
    draw, pace, rows = random.Random(f"{args.seed} {optimizer}"), Pace(), []
    with tempfile.TemporaryDirectory() as folder, progress.bar(args.kills, f"{optimizer}, kills") as bar:
        work = Work(optimizer, Path(folder, "checkpoint.pt"), args.every, until=sys.maxsize, threads=args.threads)
        for _ in range(args.kills):
            rows.append(kill_once(work, draw, pace))
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            bar.update()
        end = rows[-1]["batch"] + 2 * args.every
        with Child(work._replace(until=end)) as child:
            child.wait_for("done", end)
        final = torch.load(work.checkpoint, weights_only=True)
        ended = [*rows, {"batch": final["batch"], "digest": digest(final)}]
    return rows, differences(ended, work)


# The report


def page_of(args: argparse.Namespace, results: dict[str, tuple[list[dict[str, Any]], list[int]]]) -> page.Page:
    """``results``: by optimizer."""
    lines = [
        "In a save: killed after the save had begun and before it had ended; torn: the new file was found incomplete;",
        "whole: it was complete, but had not taken its name. Lost: checkpoints that were finished and not found.",
        "Steps made again: those after the last checkpoint.",
        "",
        "| optimizer | kills | in a save | torn | whole | lost | other bits | steps kept | steps made again |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for optimizer, (rows, wrong) in results.items():
        again = sum(max(0, row["reached"] - row["batch"]) for row in rows)
        counts = [len(rows), sum(row["in_save"] for row in rows)]
        counts += [sum(row["part"] == state for row in rows) for state in ("torn", "whole")]
        counts += [sum(row["lost"] for row in rows), len(wrong), rows[-1]["batch"], again]
        lines.append(f"| {OPTIMIZERS[optimizer].__name__} | {' | '.join(map(str, counts))} |")
    facts = [f"{args.kills} kills of each optimizer, saved after each {args.every} steps, {args.threads} threads"]
    return page.Page("Trainings killed by SIGKILL", facts, lines)


def run(args: argparse.Namespace, command: list[str]) -> bool:
    """Kills, writes the page and prints it. Returns whether nothing was lost and all bits were equal."""
    if min(args.kills, args.every, args.threads) < 1:
        raise UserError("--kills, --every and --threads must be 1 or more.")
    torch.set_num_threads(args.threads)
    about = machine.describe(torch.device("cpu"), command)
    log = args.out / "kills.jsonl"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        log.write_text("", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror or error}).") from None
    print(f"Killing {args.kills} times with each optimizer. The page goes to {args.out / 'kills.md'}.", flush=True)
    results = {optimizer: kill_often(args, optimizer, log) for optimizer in args.optimizer}
    text = page_of(args, results).markdown(about, others=None)
    (args.out / "kills.md").write_text(text, encoding="utf-8")
    print(text)
    return not any(wrong or any(row["lost"] for row in rows) for rows, wrong in results.values())


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 where something was lost or has other bits; 2 where an option is wrong."""
    arguments = sys.argv[1:] if argv is None else argv
    command = ["python", "benchmarks/kills.py", *machine.without_out(arguments)]
    return exit_status(
        "kills.py", "kills.jsonl has the kills so far.", lambda: run(parser().parse_args(arguments), command)
    )


if __name__ == "__main__":
    # torch imports its compiler with the first optimizer.
    forkserver.set_forkserver_preload(["torch._dynamo", "benchmarks.long_training"])
    sys.exit(main())
