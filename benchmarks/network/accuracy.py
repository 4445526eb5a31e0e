# SPDX-License-Identifier: Apache-2.0
"""``accuracy``: the trainings of benchmarks.train, each on several processes with one of the exchanges.

The logs are those of benchmarks.train, which turns them into tables and plots.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm import tqdm

from benchmarks.train import options as train_options
from benchmarks.train import run_log
from benchmarks.train.grid import announcement, create_task, steps
from benchmarks.train.loop import Training, train
from benchmarks.train.methods import DensitySample, Method
from benchmarks.train.options import number
from benchmarks.train.settings import Execution, Run
from examples.training.errors import UserError, lenient_output
from examples.training.report import prepare

from . import options
from .exchanges import PLAIN, Exchange

EXCHANGES = (PLAIN, "powersgd-1", "calibrated", "calibrated-clip2.5", "calibrated-clip4-block32")


@dataclass(frozen=True)
class Exchanged(Method):
    """torch.optim.SGD on several processes. Plain DistributedDataParallel is "sgd", with which all are compared."""

    exchange: str = PLAIN
    world_size: int = 2

    @classmethod
    def of(cls, exchange: str, world_size: int) -> Exchanged:
        """The number of processes is part of the name, except for plain."""
        name = "sgd" if exchange == PLAIN else f"{Exchange.of(exchange).label}, W = {world_size}"
        return cls(name, None, exchange, world_size)

    @property
    def label(self) -> str:
        """For file names."""
        return "sgd" if self.exchange == PLAIN else f"{self.exchange}-w{self.world_size}"

    def density_sample(self, model: nn.Module, optimizer: Optimizer) -> DensitySample:
        """As for any SGD: whose bits have changed."""
        return DensitySample(Method("sgd"), model, optimizer)


class ExchangedTraining(Training):
    """A training in which this process sees every W-th image of each batch, as in one process with batches as large.

    Its rows have a column fewer_bytes, where the hook counts them: how many times the payload of plain
    DistributedDataParallel is that of the exchange, since the start.
    """

    def _build_model(self) -> nn.Module:
        model = DistributedDataParallel(super()._build_model())
        self._state = Exchange.of(self.run.method.exchange).register(model, self.run.seed)
        return model

    def train_epoch(self, after_step: Callable[[], object]) -> None:
        """Train one epoch and append its row."""
        super().train_epoch(after_step)
        counts = self._state is not None and self._state.bytes_sent
        self.rows[-1]["fewer_bytes"] = self._state.bytes_plain / self._state.bytes_sent if counts else None

    def _step(self, inputs: Tensor, targets: Any, sampled: bool) -> tuple[Tensor, float | None]:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        loss, density = super()._step(inputs[rank::world_size], targets[rank::world_size], sampled)
        dist.all_reduce(loss)
        return loss / world_size, density


def add_accuracy_options(p: argparse.ArgumentParser) -> None:
    """What ``accuracy`` understands."""
    grid = p.add_argument_group("the grid: every combination is trained")
    grid.add_argument(
        "--exchanges", nargs="+", type=options.exchange, default=list(EXCHANGES), metavar="NAME",
        help=f"({' '.join(EXCHANGES)})",
    )  # fmt: skip
    grid.add_argument("--lrs", nargs="+", type=number(float, 0), default=[0.05], metavar="LR", help="(0.05)")
    grid.add_argument("--seeds", nargs="+", type=number(int, 0), default=[0, 1, 2], metavar="N", help="(0 1 2)")
    p.add_argument(
        "--world-size", type=number(int, 1), default=2, metavar="W", help="processes, on the loopback device (2)"
    )
    train_options.add_data(p.add_argument_group("data and network"))
    train_options.add_recipe(p.add_argument_group("recipe; --batch-size: of all processes together"))
    p.add_argument("--out", metavar="DIR", required=True, help="for the logs; runs that are finished there are skipped")


def run(args: argparse.Namespace, arguments: list[str]) -> tuple[int, int]:
    """Trains the runs that are not finished. Returns their number and that of all runs."""
    if args.batch_size % args.world_size:
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of --world-size {args.world_size}.")
    compared = [Exchanged.of(name, args.world_size) for name in dict.fromkeys([PLAIN, *args.exchanges])]
    execution = Execution("cpu", "float32", amp=False, channels_last=False, compile=False, deterministic=True)
    runs = train_options.grid(args, compared, execution)
    out = prepare(args.out)
    missing = [run for run in runs if not run_log.is_finished(out, run)]
    if missing:
        print(announcement(missing, len(runs), f"processes: {args.world_size}, threads of each: 1", out), flush=True)
        command = ["python", "-m", "benchmarks.network", *arguments]
        with tempfile.TemporaryDirectory() as folder:
            parts = (args.world_size, f"file://{folder}/store", missing, out, command)
            torch.multiprocessing.spawn(_train_all, parts, nprocs=args.world_size, daemon=True)
    return len(missing), len(runs)


def _train_all(rank: int, world_size: int, store: str, runs: list[Run], out: Any, command: list[str]) -> None:
    """One process: all runs, one after the other; rank 0 writes the logs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the others
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    total, interval = sum(map(steps, runs)), 0.1 if sys.stderr.isatty() else 30
    with lenient_output(), tqdm(total=total, unit="step", disable=rank > 0, mininterval=interval) as bar:

        def after_epoch(training: Training) -> None:
            if rank == 0:
                run_log.write_epochs(out, training.run, training.rows)

        for run in runs:
            training = train(run, create_task(run.task, run.data), bar.update, after_epoch, ExchangedTraining)
            if rank == 0:
                run_log.write_finished(out, run, training.diverged, command)
    dist.barrier()
    dist.destroy_process_group()
