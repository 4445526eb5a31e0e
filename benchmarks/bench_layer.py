# SPDX-License-Identifier: Apache-2.0
"""Measure what calibration layers add to a training step: forward, backward and torch.optim.SGD.

    python benchmarks/bench_layer.py
    python benchmarks/bench_layer.py --device cuda --batch-size 512

The same network, ResNet-20 for CIFAR (He et al., 2016), plain and with layers in each place, in one interleaved run.
Writes layer-DEVICE-resnet20.md into --out and prints it. A ratio is to the plain network in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

# An installed csgd_cuda comes first; without one, the package next to this directory.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.step_bench import page, progress, timing
from csgd_cuda import GCConv2d, GradientCalibration, calibrate, calibrate_filters
from csgd_cuda.layers.branches import FilterBranches
from tools.program import UserError

_MODEL, _CLASSES = "resnet20", 10
LAYERS = (GradientCalibration, FilterBranches, GCConv2d)


def with_base_filters(model: nn.Module) -> nn.Module:
    """The model with a GCConv2d of the same size in place of each convolution."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d:
                size = child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding
                setattr(module, name, GCConv2d(*size, bias=False))
    return model


PLACES = {
    "plain": lambda model: model,
    "weight": partial(calibrate, calibration=1.0, where="weight"),
    "weight, per channel": partial(calibrate, calibration=1.0, where="weight", per_channel=True),
    "output": partial(calibrate, calibration=1.0, where="output"),
    "output, per channel": partial(calibrate, calibration=1.0, where="output", per_channel=True),
    "GCConv2d": with_base_filters,
    "calibrate_filters": calibrate_filters,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    p.add_argument("--size", type=int, default=32, help="of the images, in pixels (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=128, help="default: %(default)s")
    p.add_argument("--channels-last", action="store_true")
    p.add_argument("--repeat", type=int, default=25, help="rounds (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="default: benchmarks/results")
    return p


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut without parameters; channels that come to it are zero there."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.stride, self.added = (1 if inputs == width else 2), width - inputs
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, self.stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, width, H / stride, W / stride]."""
        before = self.added // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


def resnet20() -> nn.Sequential:
    """Images [B, 3, H, W] to logits."""
    torch.manual_seed(0)
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(*pair) for pair in pairwise(widths)]
    stem = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, _CLASSES))


def training_step(
    args: argparse.Namespace, place: Callable[[nn.Module], nn.Module]
) -> tuple[Callable[[], None], torch.nn.Module]:
    """A call that trains one step, always on the same images, and its network; the same weights each time."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = place(resnet20()).to(args.device, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.size, args.size, generator=generator)
    images = images.to(args.device, memory_format=layout)
    labels = torch.randint(_CLASSES, (args.batch_size,), generator=generator).to(args.device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step, model


def measure(args: argparse.Namespace) -> list[dict]:
    """A row for each place: milliseconds, the ratios to the plain network, what was calibrated."""
    timer = timing.make_timer(torch.device(args.device))
    calls, networks = {}, {}
    for name, place in PLACES.items():
        step, networks[name] = training_step(args, place)
        step()  # the first one allocates
        host_ms = timer.prepare(step)
        calls[name] = lambda step=step, host_ms=host_ms: timer.sample(step, host_ms)
    with progress.bar(args.repeat, f"{_MODEL}, {args.device}") as bar:
        measured = timing.interleave(calls, dict.fromkeys(calls, args.repeat), args.repeat, bar.update)
    rows = []
    for name, samples in measured.items():
        ratios = sorted(ms / measured["plain"][turn] for turn, ms in samples.items())
        layers = [m for m in networks[name].modules() if isinstance(m, LAYERS)]
        tallies = [layer.tally for layer in layers if isinstance(layer, GradientCalibration)]
        rows.append(
            {
                "place": name,
                "ms": statistics.median(samples.values()),
                "ratio": statistics.median(ratios),
                "quartiles": statistics.quantiles(ratios, n=4)[::2],
                "layers": len(layers),
                "elements": sum(int(tally[1]) for tally in tallies),
            }
        )
    return rows


def page_of(args: argparse.Namespace, rows: list[dict]) -> page.Page:
    """The report."""
    lines = [
        "A step is forward, backward and `torch.optim.SGD` with momentum. ratio: to plain in the same round.",
        "",
        "| calibrated | ms | ratio | quartiles of ratio | layers | elements of gradients calibrated per step |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        low, high = row["quartiles"]
        figures = f"{row['ms']:.1f} | {row['ratio']:.3f} | {low:.3f} ... {high:.3f}"
        elements = f"{row['elements']:,}" if row["elements"] else "-"
        lines.append(f"| {row['place']} | {figures} | {row['layers']} | {elements} |")
    batch = f"batch: {args.batch_size} images of {args.size} x {args.size}, {args.repeat} rounds"
    return page.Page(f"The layer in a training step of {_MODEL}, {args.device}", [batch], lines)


def prepare(args: argparse.Namespace) -> page.Benchmark:
    """Raises UserError where an option is out of its range."""
    if min(args.size, args.batch_size, args.repeat - 1) < 1:
        raise UserError("--size and --batch-size must be 1 or more, --repeat 2 or more.")
    stem = f"layer-{args.device}-{_MODEL}"
    what = f"training steps of {_MODEL} with {len(PLACES)} placements of the layer"
    return page.Benchmark(what, stem, lambda: page_of(args, measure(args)))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 where an option is wrong or the device is not there."""
    return page.run("bench_layer", parser(), argv, prepare)


if __name__ == "__main__":
    sys.exit(main())
