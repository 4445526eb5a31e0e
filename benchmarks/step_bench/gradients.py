# SPDX-License-Identifier: Apache-2.0
"""Gradients with the heavy tails of a real training; run as a script, it measures them anew.

    python benchmarks/step_bench/gradients.py     # trains a CNN on digits; writes gradient_quantiles.json

What is stored are quantiles of |g| / max |g|, the maximum taken over each tensor in each sampled step, all elements
of all tensors and sampled steps pooled. Gradients are drawn from them by the inverse of the distribution function.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = Path(__file__).resolve().parents[1] / "data" / "gradient_quantiles.json"
LARGEST = 0.01  # of |g| in what is drawn: with momentum 0.9, |d| stays below 0.1
_CHUNK = 2**24  # elements drawn at a time, so that the temporaries stay small beside the gradients
_SKIPPED_STEPS, _SAMPLE_EVERY = 20, 5


def levels() -> list[float]:
    """The probabilities of the stored quantiles, from 0 to 1: evenly spaced, then closer and closer to 1."""
    return [k / 128 for k in range(128)] + [1 - 2.0**-k for k in range(8, 21)] + [1.0]


class Quantiles:
    """The stored distribution of |g| / max |g|."""

    def __init__(self, file: Path = FILE):
        stored = json.loads(file.read_text(encoding="utf-8"))
        self.levels, self.values = (torch.tensor(stored[key], dtype=torch.float32) for key in ("levels", "quantiles"))
        self.origin = stored["origin"]

    def draw(self, numel: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """``numel`` gradients on the generator's device, with random signs, |g| <= LARGEST."""
        levels, values = (t.to(generator.device) for t in (self.levels, self.values))
        gradients = torch.empty(numel, dtype=dtype, device=generator.device)
        for chunk in gradients.split(_CHUNK):
            # One number in (-1, 1) gives the sign and the level.
            uniform = torch.empty(len(chunk), device=generator.device).uniform_(-1, 1, generator=generator)
            level = uniform.abs()
            k = torch.searchsorted(levels, level, right=True).clamp_(1, len(levels) - 1)
            weight = (level - levels[k - 1]) / (levels[k] - levels[k - 1])
            size = torch.lerp(values[k - 1], values[k], weight)
            chunk.copy_(size.copysign_(uniform).mul_(LARGEST))
        return gradients


def measure(epochs: int, lr: float = 0.05, momentum: float = 0.9, batch_size: int = 64) -> dict:
    """Trains a CNN on the digits of scikit-learn with torch.optim.SGD and returns what the JSON file holds."""
    images, labels = _digits()
    torch.manual_seed(0)
    network = _network()
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=momentum)
    generator = torch.Generator().manual_seed(0)
    sampled, zeros, step = [], 0, 0
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(batch_size):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            if step >= _SKIPPED_STEPS and step % _SAMPLE_EVERY == 0:
                for size in (p.grad.abs().flatten() for p in network.parameters()):
                    sampled.append(size / size.max())
                    zeros += int((size == 0).sum())
            step += 1
    pooled = torch.cat(sampled)
    origin = {
        "made_by": "python benchmarks/step_bench/gradients.py",
        "what": "quantiles of |g| / max |g|; maximum over each tensor in each sampled step; all elements pooled",
        "training": f"a CNN (94,186 parameters) on digits (scikit-learn), {epochs} epochs, "
        f"batch size {batch_size}, torch.optim.SGD, lr {lr}, momentum {momentum}, seed 0",
        "sampled": f"every {_SAMPLE_EVERY}th of {step} steps from step {_SKIPPED_STEPS} on: {len(pooled):,} elements",
        "mean": float(f"{pooled.mean().item():.6g}"),
        "share_of_zeros": zeros / len(pooled),
        "torch": torch.__version__,
    }
    return {"origin": origin, "levels": levels(), "quantiles": _quantiles(pooled)}


def _digits() -> tuple[Tensor, Tensor]:
    """1,297 images [N, 1, 8, 8], normalised, and their labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, _, labels, _ = train_test_split(
        digits.images, digits.target, test_size=500, random_state=0, stratify=digits.target
    )
    inputs = (torch.tensor(images).float() - float(images.mean())) / float(images.std())
    return inputs.unsqueeze(1), torch.tensor(labels)


def _network() -> nn.Sequential:
    """Three convolutions with batch normalisation and ReLU, and a linear layer."""
    layers, channels = [], 1
    for width in (32, 64, 128):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.AvgPool2d(2)] if channels == 1 else []
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def _quantiles(pooled: Tensor) -> list[float]:
    ordered = pooled.sort().values  # torch.quantile refuses more than 2^24 elements
    places = [min(len(ordered) - 1, math.floor(level * len(ordered))) for level in levels()]
    return [float(f"{ordered[place].item():.6g}") for place in places]


def main() -> None:
    """Measures and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="of the training (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FILE, help="default: benchmarks/data/gradient_quantiles.json")
    args = parser.parse_args()
    print(f"Training a CNN on the digits: {args.epochs} epochs. Its quantiles go to {args.out}.", flush=True)
    result = measure(args.epochs)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["origin"], indent=1))


if __name__ == "__main__":
    main()
