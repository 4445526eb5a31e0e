# SPDX-License-Identifier: Apache-2.0
"""Train a small CNN on the handwritten digits of scikit-learn with both optimizers; log what they do for TensorBoard.

    python examples/tensorboard_log.py --out out/tensorboard
    tensorboard --logdir out/tensorboard

CSGD and CalibratedAdamW train the same network, each with a log of its own: TensorBoard draws them as two curves.
Logged are the loss and the learning rate of every step, and every tenth step, for each parameter, the density (share of
coordinates that moved) and the Lipschitz bound (on the direction of SGD or AdamW).
"""

import argparse
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from csgd_cuda import CSGD, CalibratedAdamW

# Each with the learning rate at the start. It falls to 0.
OPTIMIZERS = {"csgd": (CSGD, {"lr": 0.05, "momentum": 0.9}), "adamw": (CalibratedAdamW, {"lr": 0.003})}
READ_EVERY = 10  # steps: reading density and bounds makes the CPU wait for a GPU
BATCH_SIZE = 64


def build() -> nn.Sequential:
    """Images [B, 1, 8, 8] to logits [B, 10]."""
    layers, channels = OrderedDict(), 1
    for i, outputs in enumerate((32, 64, 128), start=1):
        layers[f"conv{i}"] = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
        layers[f"bn{i}"], layers[f"relu{i}"] = nn.BatchNorm2d(outputs), nn.ReLU()
        channels = outputs
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(channels, 10)}
    return nn.Sequential(OrderedDict(layers))


def log(writer: SummaryWriter, optimizer: CSGD | CalibratedAdamW, step: int, loss: float) -> None:
    """Write the figures of one step (counted from 0), after optimizer.step()."""
    writer.add_scalar("loss", loss, step)
    writer.add_scalar("lr", optimizer.param_groups[0]["lr"], step)
    if step % READ_EVERY == 0:
        writer.add_scalar("density", optimizer.overall_density(), step)
        for kind, figures in (("density", optimizer.density()), ("lipschitz_bound", optimizer.lipschitz_bounds())):
            for name, figure in figures.items():
                writer.add_scalar(f"{kind}/{name}", figure, step)


def train(name: str, images: torch.Tensor, labels: torch.Tensor, epochs: int, writer: SummaryWriter) -> None:
    """Train a new network, of the same weights each time, with an optimizer of OPTIMIZERS."""
    torch.manual_seed(0)
    network = build()
    optimizer_class, options = OPTIMIZERS[name]
    optimizer = optimizer_class(network.named_parameters(), **options)  # with names, for log()
    steps = epochs * -(-len(labels) // BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    step = 0
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            log(writer, optimizer, step, loss.item())
            scheduler.step()
            step += 1
    print(f"{optimizer_class.__name__}: {step} steps, last loss {loss.item():.3g}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", metavar="DIR", type=Path, default="out/tensorboard", help="default: %(default)s")
    p.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    args = p.parse_args()
    if args.epochs < 1:
        p.error(f"--epochs must be 1 or more, got {args.epochs}")
    torch.set_num_threads(1)  # of a network as small as this, more threads mostly wait for each other
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float().unsqueeze(1) / 16, torch.tensor(digits.target)
    for name in OPTIMIZERS:
        with SummaryWriter(args.out / name) as writer:
            train(name, images, labels, args.epochs, writer)
    print(f"Look at them with: tensorboard --logdir {args.out}")


if __name__ == "__main__":
    main()
