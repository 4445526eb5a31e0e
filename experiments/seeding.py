# SPDX-License-Identifier: Apache-2.0
"""Random numbers that are functions of what they are for, a seed and an epoch."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(purpose: str, seed: int, epoch: int) -> torch.Generator:
    """A CPU generator; other purposes, seeds and epochs give other draws."""
    # torch's CPU generator looks at the low 32 bits of its seed only: everything must be in there.
    return torch.Generator().manual_seed(zlib.crc32(f"{purpose} {seed} {epoch}".encode()))


def order(images: int, seed: int, epoch: int) -> torch.Tensor:
    """The order in which an epoch goes through the training images, int64 [images]."""
    return torch.randperm(images, generator=generator("order", seed, epoch))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's global generator on the CPU starts from ``seed``; outside it stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
