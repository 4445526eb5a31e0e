# SPDX-License-Identifier: Apache-2.0
"""A tiny regression to train, and the plain loop that every integration is compared with, bit for bit."""

import importlib
import os

import pytest
import torch

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import assert_same_snapshots, snapshot

OPTIONS = {
    CSGD: {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3},
    CalibratedAdamW: {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 1e-3},
}


def make_model(dtype=torch.float32, seed=0):
    """Two layers; the same weights each time."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)).to(dtype)


def make_data(batches=12, size=32, dtype=torch.float32, seed=1):
    """[(x, y)], y a smooth function of x."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, size, 8, generator=generator)
    y = torch.stack([x[..., 0] + x[..., 1], x[..., 2:].mean(-1).sin()], dim=-1)
    return list(zip(x.to(dtype), y.to(dtype), strict=True))


def make_optimizer(optimizer_class, params, **options):
    """``params``: parameters, groups of them, or a model."""
    params = params.parameters() if isinstance(params, torch.nn.Module) else params
    return optimizer_class(params, **{**OPTIONS[optimizer_class], **options})


def buffer_dtypes(optimizer):
    return {state[name].dtype for state in optimizer.state.values() for name in optimizer.direction.buffers}


def calibration_figures(optimizer):
    """What the callbacks of docs/logging.md log of an optimizer that is made from named parameters."""
    kinds = {"density": optimizer.density(), "lipschitz_bound": optimizer.lipschitz_bounds()}
    assert all(isinstance(name, str) for figures in kinds.values() for name in figures)
    return {f"{kind}/{name}": figure for kind, figures in kinds.items() for name, figure in figures.items()}


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def train(model, optimizer, data, after_step=lambda: None, accumulate=1, clip=None):
    """The plain loop: a step for every ``accumulate`` batches, its gradient's norm clipped. Returns the losses."""
    losses = []
    for k, (x, y) in enumerate(data):
        if k % accumulate == 0:
            optimizer.zero_grad()
        loss = loss_of(model, x, y)
        (loss / accumulate).backward()
        if (k + 1) % accumulate == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            after_step()
        losses.append(loss.item())
    return losses


def plainly_trained(optimizer_class, data, dtype=torch.float32, **options):
    """(model, optimizer) after the plain loop over the data."""
    model = make_model(dtype)
    optimizer = make_optimizer(optimizer_class, model, **options)
    train(model, optimizer, data)
    return model, optimizer


def assert_same_training(a, b):
    """The parameters and the state of two (model, optimizer), bit for bit."""
    assert_same_snapshots(*(snapshot(list(model.parameters()), optimizer) for model, optimizer in (a, b)))


_torchvision = torch.library.Library("torchvision", "FRAGMENT")


def import_or_skip(name):
    """pytest.importorskip (without a skip in make test-integration), also where torchvision is for another torch.

    The wheels of torchvision hold operators for a CUDA build of torch. Beside a CPU build these do not load, and
    the import fails where it describes them. Nothing here calls them: to declare them is enough.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        for operator in ("nms", "qnms"):
            _torchvision.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    if os.environ.get("CSGD_CUDA_INTEGRATION") == "1":  # make test-integration must not pass for want of a package
        return importlib.import_module(name)
    return pytest.importorskip(name)


def loss_went_down(losses):
    """Of the last quarter against the first, so that one batch does not decide."""
    quarter = max(1, len(losses) // 4)
    return sum(losses[-quarter:]) < 0.8 * sum(losses[:quarter])
