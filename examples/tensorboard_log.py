# SPDX-License-Identifier: Apache-2.0
"""Train a small CNN on the handwritten digits of scikit-learn with Calibrated SGD; log what it does for TensorBoard.

    python examples/tensorboard_log.py --out out/tensorboard
    tensorboard --logdir out/tensorboard

Logged are the loss and the learning rate of every step, and every tenth step, for each parameter, the density (share of
coordinates that moved) and the Lipschitz bound (on the direction of SGD, in the unit of the gradient).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# An installed csgd_cuda comes first; without one, the package next to this directory.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from training import data, model
from training.errors import UserError, exit_status

from csgd_cuda import CSGD

READ_EVERY = 10  # steps: reading density and bounds makes the CPU wait for a GPU
BATCH_SIZE = 64


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", metavar="DIR", default="out/tensorboard", help="for the log (default: %(default)s)")
    p.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    p.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default: %(default)s)")
    p.add_argument("--width", type=int, default=32, help="first channels (default: %(default)s)")
    p.add_argument("--lr", type=float, default=0.05, help="at the start; it falls to 0 (default: %(default)s)")
    return p


def log(writer, optimizer: CSGD, step: int, loss: float) -> None:
    """Write the figures of one step (counted from 0), after optimizer.step()."""
    writer.add_scalar("loss", loss, step)
    writer.add_scalar("lr", optimizer.param_groups[0]["lr"], step)
    if step % READ_EVERY == 0:
        writer.add_scalar("density", optimizer.overall_density(), step)
        for kind, figures in (("density", optimizer.density()), ("lipschitz_bound", optimizer.lipschitz_bounds())):
            for name, figure in figures.items():
                writer.add_scalar(f"{kind}/{name}", figure, step)


def train(args: argparse.Namespace) -> None:
    """Train and log."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name!r} is missing; pip install tensorboard.") from None
    if min(args.threads, args.epochs, args.width) < 1:
        raise UserError("--threads, --epochs and --width must be 1 or more.")
    torch.set_num_threads(args.threads)
    digits = data.load(None, None)
    network = model.build(digits.classes, args.width, 0, torch.float32, torch.device("cpu"))
    optimizer = CSGD(network.named_parameters(), lr=args.lr, momentum=0.9)  # with names, for log()
    generator = torch.Generator().manual_seed(0)
    count = len(digits.train_labels)
    steps = args.epochs * -(-count // BATCH_SIZE)
    parameters = sum(p.numel() for p in network.parameters())
    print(
        f"Training a CNN with {parameters:,} parameters: CSGD, {steps} steps in {args.epochs} epochs, seed 0, "
        f"threads: {args.threads}. The log goes to {args.out}.",
        flush=True,
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    step = 0
    with SummaryWriter(args.out) as writer:
        for _ in range(args.epochs):
            for batch in torch.randperm(count, generator=generator).split(BATCH_SIZE):
                optimizer.zero_grad()
                logits = network(digits.inputs(digits.train_images[batch], torch.float32))
                loss = F.cross_entropy(logits, digits.train_labels[batch])
                loss.backward()
                optimizer.step()
                log(writer, optimizer, step, loss.item())
                scheduler.step()
                step += 1
    print(f"{step} steps, last loss {loss.item():.3g}. Look at them with: tensorboard --logdir {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 for something the user can put right, with one sentence on stderr; 130 for Ctrl-C."""
    return exit_status("tensorboard_log.py", "what was logged is in --out.", lambda: train(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
