# SPDX-License-Identifier: Apache-2.0
"""Classification with each exchange of gradients, on several processes of this machine: no root, no namespaces.

    python -m experiments exchanges --model lenet --lrs 0.02 0.05 0.1 --epochs 10 --out out/exchanges

Trains by torch.optim.SGD; "SGD" in the report is plain DistributedDataParallel, with which all are compared.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments import cli, report, run_log
from experiments.grid import Plan, Progress, announcement, create_task, progress_bar, show, train_one
from experiments.loop import Training, train
from experiments.methods import Method
from experiments.run import finish
from experiments.settings import Execution, Run
from tools.program import UserError, lenient_output

from .exchanges import PLAIN, Exchange, argument
from .model import Workload, payload

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


class ExchangedTraining(Training):
    """A training in which this process sees every W-th image of each batch, as in one process with batches as large.

    Its rows have a column fewer_bytes: how many times the payload of plain DistributedDataParallel is that of the
    exchange; since the start where the hook counts it, else by the formulas, for all parameters in one bucket.
    """

    def _build_model(self) -> nn.Module:
        model = DistributedDataParallel(super()._build_model())
        self._state = Exchange.of(self.run.method.exchange).register(model, self.run.seed)
        return model

    def train_epoch(self, after_step: Callable[[], object]) -> None:
        """Train one epoch and append its row."""
        super().train_epoch(after_step)
        self.rows[-1]["fewer_bytes"] = self._fewer_bytes()

    def _fewer_bytes(self) -> float | None:
        if self._state is not None:
            return self._state.bytes_plain / self._state.bytes_sent if self._state.bytes_sent else None
        shapes = [list(param.shape) for param in self.model.parameters()]
        workload, hosts = Workload(shapes, [list(range(len(shapes)))]), dist.get_world_size()
        sent = payload(Exchange.of(self.run.method.exchange), workload, hosts)
        return payload(Exchange.of(PLAIN), workload, hosts) / sent if sent else None

    def _step(self, inputs: Tensor, targets: Any, sampled: bool) -> tuple[dict[str, Tensor], float | None]:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        losses, density = super()._step(inputs[rank::world_size], targets[rank::world_size], sampled)
        for loss in losses.values():
            dist.all_reduce(loss)
        return {name: loss / world_size for name, loss in losses.items()}, density


def add_options(p: argparse.ArgumentParser) -> None:
    """The command line."""
    grid = p.add_argument_group("the grid: every combination is trained")
    grid.add_argument(
        "--exchanges", nargs="+", type=argument, default=list(EXCHANGES), metavar="NAME",
        help=f"({' '.join(EXCHANGES)})",
    )  # fmt: skip
    cli.add_lrs_and_seeds(grid)
    p.add_argument(
        "--world-size", type=cli.number(int, 1), default=2, metavar="W", help="processes, on the loopback device (2)"
    )
    cli.add_data(p.add_argument_group("data and network"))
    cli.add_recipe(p.add_argument_group("recipe; --batch-size: of all processes together"))
    cli.add_out(p)


def run(args: argparse.Namespace, command: list[str]) -> None:
    """Trains the runs that are not finished, and reports."""
    if args.batch_size % args.world_size:
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of --world-size {args.world_size}.")
    compared = [Exchanged.of(name, args.world_size) for name in dict.fromkeys([PLAIN, *args.exchanges])]
    runs = cli.grid(args, compared, Execution())
    out = run_log.prepare(args.out)
    report.check_alike(out, runs)
    missing = [run for run in runs if not run_log.is_finished(out, run)]
    if missing:
        print(announcement(missing, len(runs), f"processes: {args.world_size}, threads of each: 1", out), flush=True)
        plan = Plan(out, 1, command)
        with tempfile.TemporaryDirectory() as folder:
            parts = (args.world_size, f"file://{folder}/store", missing, len(runs), plan)
            torch.multiprocessing.spawn(_train_all, parts, nprocs=args.world_size, daemon=True)
    finish(len(missing), len(runs), out)


def _train_all(rank: int, world_size: int, store: str, runs: list[Run], total: int, plan: Plan) -> None:
    """One process: all runs, one after the other; rank 0 writes the logs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the others
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    with lenient_output(), progress_bar(runs, total, shown=rank == 0) as bar:
        for run in runs:
            progress = Progress(lambda report: show(bar, report))
            if rank == 0:
                train_one(run, plan, progress, ExchangedTraining)
            else:
                train(run, create_task(run.task, run.data), progress.step, lambda _: None, ExchangedTraining)
    dist.barrier()
    dist.destroy_process_group()
