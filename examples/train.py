# SPDX-License-Identifier: Apache-2.0
"""Train a small CNN with Calibrated SGD and, for comparison, with torch.optim.SGD at the same settings.

    python examples/train.py                              # handwritten digits of scikit-learn, 3 seeds
    python examples/train.py --data DIR --epochs 6        # MNIST or Fashion-MNIST: the four IDX files in DIR

Both optimizers start from the same weights and see the same batches, in --seeds trainings each. --lr falls to a tenth
after every --lr-step epochs; --calibration is the strength of CSGD. Writes table.md and curves.png into --out.
"""

import argparse
import gzip
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from csgd_cuda import CSGD

LABEL = {"csgd": "CSGD", "sgd": "torch.optim.SGD"}
COLUMNS = {  # of the table: (title, factor, digits, over the epochs)
    "accuracy": ("test accuracy, %", 100, 2, lambda values: values[-1]),
    "test_loss": ("test loss", 1, 4, lambda values: values[-1]),
    "loss": ("training loss", 1, 4, lambda values: values[-1]),
    "density": ("density, %", 100, 1, statistics.fmean),
}


def load(directory: str | None) -> list[torch.Tensor]:
    """Training images [N, 1, H, W], normalised, and labels; test images and labels."""
    if directory is None:
        digits = load_digits()
        images, test_images, labels, test_labels = train_test_split(
            digits.images, digits.target, test_size=500, random_state=0, stratify=digits.target
        )
    else:
        names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        images, labels, test_images, test_labels = (read_idx(Path(directory), f"{name}-ubyte") for name in names)
    mean, std = float(images.mean()), float(images.std())
    images, test_images = ((torch.tensor(x).float().unsqueeze(1) - mean) / std for x in (images, test_images))
    return [images, torch.tensor(labels).long(), test_images, torch.tensor(test_labels).long()]


def read_idx(directory: Path, name: str) -> np.ndarray:
    """https://yann.lecun.com/exdb/mnist, section "File formats"; plain or .gz."""
    path = directory / name
    content = path.read_bytes() if path.exists() else gzip.decompress((directory / f"{name}.gz").read_bytes())
    start = 4 + 4 * content[3]
    return np.frombuffer(content, np.uint8, offset=start).reshape(np.frombuffer(content[4:start], ">u4"))


def build(side: int, classes: int, seed: int) -> nn.Sequential:
    """Three times convolution, batch normalisation and ReLU; 28 x 28 pixels are halved twice, 8 x 8 once."""
    torch.manual_seed(seed)
    layers = []
    for channels, outputs in (1, 32), (32, 64), (64, 128):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        if outputs < 128 and side >= outputs / 4:
            layers.append(nn.AvgPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def train(name: str, seed: int, args: argparse.Namespace, data: list[torch.Tensor]) -> list[dict[str, float]]:
    """The figures of each epoch; density: share of coordinates that a step moved, from every tenth step."""
    images, labels, test_images, test_labels = data
    model = build(images.shape[2], int(labels.max()) + 1, seed).to(images.dtype)
    if name == "csgd":
        optimizer = CSGD(model.parameters(), lr=args.lr, momentum=0.9, calibration=args.calibration, seed=seed)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_step)
    epochs = []
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        batches, total, shares = order.split(64), 0.0, []
        for i, batch in enumerate(batches):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]).float(), labels[batch])
            loss.backward()
            total += loss.item() * len(batch)
            before = nn.utils.parameters_to_vector(model.parameters()).detach()
            optimizer.step()
            if i % 10 == 9 or i == len(batches) - 1:
                shares.append((nn.utils.parameters_to_vector(model.parameters()) != before).float().mean().item())
        scheduler.step()
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(part).float() for part in test_images.split(1000)])
        accuracy = (logits.argmax(1) == test_labels).double().mean().item()
        figures = accuracy, F.cross_entropy(logits, test_labels).item(), total / len(labels), statistics.fmean(shares)
        epochs.append(dict(zip(COLUMNS, figures, strict=True)))
    print(f"{LABEL[name]}, seed {seed}: test accuracy {accuracy:.2%}", file=sys.stderr)
    return epochs


def table(results: dict[str, list[list[dict[str, float]]]]) -> str:
    """Markdown; mean ± standard deviation over the seeds."""
    rows = [["optimizer", *(title for title, *_ in COLUMNS.values())], ["---"] * 5]
    for name, runs in results.items():
        rows.append([LABEL[name]])
        for key, (_, factor, digits, pick) in COLUMNS.items():
            values = [factor * pick([epoch[key] for epoch in run]) for run in runs]
            deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            rows[-1].append(f"{statistics.fmean(values):.{digits}f}{deviation}")
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plot(results: dict[str, list[list[dict[str, float]]]], args: argparse.Namespace) -> None:
    """A picture of the means over the seeds."""
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    figure.suptitle(f"{args.data or 'digits'}, {args.dtype}, lr {args.lr:g}, c = {args.calibration:g}")
    for axes, key in zip(figure.subplots(1, 3), ("accuracy", "loss", "density"), strict=True):
        label, factor, *_ = COLUMNS[key]
        for name, runs in results.items():
            means = [factor * statistics.fmean(epoch[key] for epoch in epochs) for epochs in zip(*runs, strict=True)]
            axes.plot(range(1, len(means) + 1), means, marker=".", label=LABEL[name])
        axes.set(xlabel="epoch", ylabel=label)
        axes.legend()
    figure.savefig(args.out / "curves.png")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", metavar="DIR", help="IDX data set (default: the digits of scikit-learn)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all tensors (%(default)s)")
    for name, default in {"epochs": 15, "seeds": 3, "lr": 0.05, "lr-step": 10, "calibration": 0.25}.items():
        p.add_argument(f"--{name}", type=type(default), default=default, metavar="N", help="(%(default)s)")
    p.add_argument("--out", type=Path, default=Path("out/train"), help="(%(default)s)")
    args = p.parse_args()
    if min(args.epochs, args.seeds, args.lr_step) < 1:
        p.error("--epochs, --seeds and --lr-step must be 1 or more")
    torch.set_num_threads(1)  # of a network as small as this, more threads mostly wait for each other
    args.out.mkdir(parents=True, exist_ok=True)
    data = [x.to(getattr(torch, args.dtype)) if x.is_floating_point() else x for x in load(args.data)]
    results = {name: [train(name, seed, args, data) for seed in range(args.seeds)] for name in LABEL}
    (args.out / "table.md").write_text(table(results), encoding="utf-8")
    plot(results, args)
    print(table(results))


if __name__ == "__main__":
    main()
