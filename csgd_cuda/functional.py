# SPDX-License-Identifier: Apache-2.0
"""The step of Calibrated SGD as a function, and the choice between kernel and reference."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import checks, extension, reference
from .options import check_options, signed_seed
from .shards import ShardLayout


@dataclass(frozen=True)
class Backend:
    """One implementation of the step: ``check`` looks at the arguments, ``step`` checks and steps."""

    name: str
    check: Callable[..., None]
    step: Callable[..., None]


_REFERENCE = Backend("reference", checks.check_csgd, reference.csgd_)


def _kernel(name: str) -> Backend:
    def call(operator_name: str, params: list[Tensor], *args: Any, seed: int, **kwargs: Any) -> None:
        # Both call the same operator; torch.compile can trace the one, the other takes less of the host's time.
        operators = torch.ops.csgd_cuda if torch.compiler.is_compiling() else extension._C
        getattr(operators, operator_name)(params, *args, seed=signed_seed(seed), **kwargs)

    return Backend(
        name,
        lambda *args, **kwargs: call("check_csgd", *args, **kwargs),
        lambda *args, **kwargs: call("csgd_", *args, **kwargs),
    )


_KERNELS = {"cpu": _kernel("cpu kernel"), "cuda": _kernel("cuda kernel")}
_warned_of: set[str] = set()  # reasons for the reference, in this process


def _stacklevel_of_user() -> int:
    """For a warning by the caller: how far up the first line is that is neither in this package nor in torch."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in (__package__, "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _warn_of_reference_on_cuda(reason: str) -> None:
    """Once per process: backends are chosen in every step, and for every optimizer."""
    if reason in _warned_of:
        return
    _warned_of.add(reason)
    warnings.warn(
        f"csgd_cuda steps parameters on a GPU with its slow pure-PyTorch reference, since {reason}. Reinstall "
        "csgd_cuda with CSGD_CUDA_BUILD=cuda, which says what is missing, or pass fused=False if the reference is "
        "what you want; csgd_cuda.show_config() shows what is built. This is said once per process.",
        stacklevel=_stacklevel_of_user(),
    )


def choose_backend(device: torch.device, fused: bool | None) -> Backend:
    """The backend for parameters on one device. All support the same dtypes; their checks name any other.

    Warns, once per process, where parameters on a GPU fall back to the reference; not from within torch.compile.

    Args:
        fused: None takes the kernel where there is one, else the reference; True demands the kernel; False takes
            the reference.

    Raises:
        RuntimeError: fused is True and there is no kernel; it says why.
    """
    if fused is not None and not fused:
        return _REFERENCE
    reason = extension.why_no_kernel(device)
    if reason is None:
        return _KERNELS[device.type]
    if fused:
        raise RuntimeError(
            f"fused=True, but {reason}; fused=None falls back to the reference (see csgd_cuda.show_config())"
        )
    if device.type == "cuda" and not torch.compiler.is_compiling():
        _warn_of_reference_on_cuda(reason)
    return _REFERENCE


def operator_options(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The checked options of a parameter group as the operators take them, for parameters on ``device``.

    ``lr`` becomes a number, and ``lr_tensor`` a tensor or None; the other numbers become floats.
    """
    lr: float | Tensor = options["lr"]
    lr_tensor: Tensor | None = None
    if torch.compiler.is_compiling() and not isinstance(lr, torch.Tensor):
        # An operator's float is a constant of the compiled code: each lr of a scheduler would compile it anew. A
        # factor of a tensor is an input. (Of 1.0, so that the bits are those of the number; not torch.tensor(lr),
        # which torch 2.13 makes a constant, too.)
        lr = torch.ones((), dtype=torch.float64, device=device) * lr
    if isinstance(lr, torch.Tensor):
        lr_tensor, lr = lr, 0.0
        if lr_tensor.dtype not in (torch.float32, torch.float64):
            lr_tensor = lr_tensor.to(torch.float64)
        # A tensor on the CPU is read there; one on a GPU is read on that GPU, or brought to where the parameters are.
        if lr_tensor.device.type not in ("cpu", "meta"):
            lr_tensor = lr_tensor.to(device)
    lipschitz = options["lipschitz"]
    return {
        "lr": float(lr),
        "momentum": float(options["momentum"]),
        "dampening": float(options["dampening"]),
        "weight_decay": float(options["weight_decay"]),
        "nesterov": options["nesterov"],
        "calibration": float(options["calibration"]),
        "lipschitz": None if lipschitz is None else float(lipschitz),
        "bound_decay": float(options["bound_decay"]),
        "rounding": options["rounding"],
        "seed": operator.index(options["seed"]),
        "maximize": options["maximize"],
        "lr_tensor": lr_tensor,
    }


@torch.no_grad()
def csgd_(
    params: Iterable[Tensor],
    grads: Iterable[Tensor],
    momentum_buffers: Iterable[Tensor],
    steps: Iterable[Tensor],
    lipschitz_bounds: Iterable[Tensor],
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    calibration: float = 1.0,
    lipschitz: float | None = None,
    bound_decay: float = 0.99,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    seed: int = 0,
    maximize: bool = False,
    indices: Iterable[int] | None = None,
    shards: Iterable[ShardLayout] | None = None,
    fresh_momentum: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    tallies: Tensor | None = None,
    masks: Iterable[Tensor] = (),
    histograms: Tensor | None = None,
    fused: bool | None = None,
) -> None:
    """One step of Calibrated SGD on lists of tensors of one device, in place. ``CSGD`` is a wrapper of this.

    Args:
        params: dense tensors of any shape, float32, float64, bfloat16 or float16; dtypes may be mixed. Updated.
        grads: the gradients, one for each parameter, of its shape and dtype. Left as they are.
        momentum_buffers: tensors of the parameters' shapes and dtypes, zero at the start; empty when momentum
            is 0. Updated.
        steps: int64 tensors with one element, the steps applied so far. Each grows by 1.
        lipschitz_bounds: tensors with one element, float64 for a float64 parameter, else float32: the estimate
            of the Lipschitz bound, zero at the start; empty when ``lipschitz`` is given. Updated.
        lr: number, or tensor with one element (read on its device, so that a GPU is not waited for).
        momentum, dampening, weight_decay, nesterov, maximize: as in a step of torch.optim.SGD; nesterov has no effect
            without momentum.
        calibration: c >= 0, the strength of the calibration; 0 is plain SGD.
        lipschitz: a fixed Lipschitz constant for all parameters, in the unit of the gradient; None: the estimate in
            ``lipschitz_bounds``.
        bound_decay: beta in [0, 1], how much of the estimate a step keeps.
        rounding: "stochastic" or "nearest", for what is stored in bfloat16 and float16.
        seed: 0 ... 2^64 - 1.
        indices: for each parameter the number that tells its random draws apart; None: its place in the list.
        shards: for each tensor where its elements lie in the whole parameter whose draws it takes (``shards.WHOLE``: it
            is the whole one); None: all are whole.
        fresh_momentum: the momentum buffers take the gradient as it is, whatever ``steps`` says.
        grad_scale: float32 tensor with one element: the gradients are this many times too large.
        found_inf: float32 tensor with one element: where it is not 0, nothing at all is changed.
        tallies: int64 tensor of shape (K, 4), zero at the start: tallies[i - indices[0], 0] becomes the number of
            coordinates that the parameter with index i moved. The rest is scratch space of a GPU.
        masks: bool tensors of the parameters' shapes, of any strides (an expanded one, too); where False the gradient
            counts as 0, whatever it is. Empty: all are True. Not with ``shards``.
        histograms: int64 tensor of shape (number of parameters, 2048), or (1, 2048) for all together: row k grows by
            the counts of the first digits of the magnitudes of the new parameter k, of which ``hard_threshold_`` goes
            on. What is False in ``masks`` is counted as dropped for good. Not with ``shards``; in one row for all,
            all must be float64 or none.
        fused: None takes the kernel where there is one, else the reference; True demands the kernel; False takes
            the reference.

    Raises:
        ValueError, TypeError: something is wrong with an argument; the message names it, and nothing was changed.
        RuntimeError: ``fused=True`` cannot be had; the message says why.

    Source: docs/algorithm.md, which derives the rule.
    """
    params = list(params)
    if not params:
        return
    backend = choose_backend(params[0].device, fused)
    options: dict[str, Any] = {
        "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
        "calibration": calibration, "lipschitz": lipschitz, "bound_decay": bound_decay, "rounding": rounding,
        "seed": seed,
    }  # fmt: skip
    check_options(**options)
    backend.step(
        params,
        list(grads),
        list(momentum_buffers),
        list(steps),
        list(lipschitz_bounds),
        list(range(len(params)) if indices is None else indices),
        [number for layout in shards or () for number in layout],
        **operator_options({**options, "nesterov": nesterov, "maximize": maximize}, params[0].device),
        fresh_momentum=fresh_momentum,
        grad_scale=grad_scale,
        found_inf=found_inf,
        tallies=tallies,
        masks=list(masks),
        histograms=histograms,
    )
