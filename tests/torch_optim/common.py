# SPDX-License-Identifier: Apache-2.0
"""What the files of this folder share: a small model, optimizers that share nothing, equality of nested dicts."""

import copy

import torch

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import assert_same_bits, make_params, set_grads
from .options import class_of, without_class

SHAPES = [(3, 5), (70,), (1000,)]  # below a vector block, a block and a rest, many blocks

# An optimizer that is to load a checkpoint was made for something else; nothing of this may survive.
_OTHER = {
    "lr": 0.5, "weight_decay": 0.75, "calibration": 3.0, "lipschitz": 0.5, "bound_decay": 0.25, "rounding": "nearest",
    "seed": 12345,
}  # fmt: skip
_OTHER_OF_DIRECTION = {
    CSGD: {"momentum": 0.25, "dampening": 0.125},
    CalibratedAdamW: {"optimizer": CalibratedAdamW, "betas": (0.25, 0.375), "eps": 0.5},
}


def other_options(options):
    """Of the same optimizer."""
    return {**_OTHER, **_OTHER_OF_DIRECTION[class_of(options)]}


def optimizer_of(params, options, **more):
    """An optimizer that shares no tensor among its options with another one."""
    options = {**copy.deepcopy(options), **more}
    optimizer_class = class_of(options)
    return optimizer_class(params, **without_class(options))


def trained(options, device, *, steps=2, dtype=torch.float32, shapes=SHAPES, **more):
    """(params, optimizer) after some steps."""
    params = make_params(shapes, dtype, device)
    optimizer = optimizer_of(params, options, **more)
    go_on(params, optimizer, steps=steps)
    return params, optimizer


def go_on(params, optimizer, *, steps=2, seed=0):
    """Steps with gradients that depend on ``seed`` and the step alone."""
    for step in range(steps):
        set_grads(params, seed=100 * seed + step)
        optimizer.step()


def tolerance_of(options):
    """Relative and absolute, of float64 against torch's optimizer. From a float32 learning rate torch.optim.AdamW makes
    factors in float32."""
    is_float = not isinstance(options.get("lr"), torch.Tensor) or class_of(options) is CSGD
    return dict.fromkeys(("rtol", "atol"), 1e-12 if is_float else 1e-6)


def copies_of(params):
    return [param.detach().clone().requires_grad_() for param in params]


def model_of(device, dtype=torch.float32, *, contiguous=True):
    """(weight, bias, closure): a quadratic loss whose minimum is at zero, where weight decay pulls, too."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    weight, bias, inputs = normal(64, 32), normal(64), normal(32)
    if not contiguous:
        weight = torch.stack([weight, weight], dim=-1)[..., 0]
        assert not weight.is_contiguous()
    weight.requires_grad_()
    bias.requires_grad_()

    def loss():
        weight.grad = bias.grad = None
        value = (weight @ inputs + bias).square().mean()
        value.backward()
        return value.detach()

    return weight, bias, loss


def assert_same_tree(a, b, where="state_dict"):
    """Equal keys in equal order, equal types, equal bits."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same_tree(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_tree(x, y, f"{where}[{k}]")
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), where
        assert_same_bits(a, b, where)
    else:
        assert a == b, where
