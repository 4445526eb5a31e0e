# SPDX-License-Identifier: Apache-2.0
"""The gradient calibration layer: identity forward, an unbiased calibration of the gradient backward."""

from __future__ import annotations

import itertools
import operator
from typing import Any, Literal

import torch
from torch import Tensor

from ..distributed.shards import is_dtensor
from ..kinds import FUSED, INTEGER
from ..optim.options import CALIBRATION_OPTIONS, check_options
from ..tensors import lasting_tensors
from .functional import CALIBRATION_TALLY_WORDS, calibrate_grad
from .numbered import MOST_LAYERS, NumberedLayer, rank

# From the far end, since calibrate() numbers the layers of a model from 0 on.
_next_index = itertools.count(MOST_LAYERS - 1, -1)


class GradientCalibration(NumberedLayer):
    """Passes its input on; its gradient g comes back as an unbiased random estimate: sparse, and g in the mean.

    A coordinate of g comes back as g / p with probability ``p = min(1, |g| / (c * l))``, rounded up to a multiple of
    2^-16, and as 0 otherwise. l bounds ``|g|``: a running maximum, or a fixed number. It can stand anywhere in a
    network (``nn.Sequential``), for any number of elements in any shape; ``calibrate(model)`` puts it everywhere.
    In eval mode, without gradients, and in the forward pass it costs nothing.

    Args:
        calibration: c >= 0. 0 gives the gradient as it is; with larger c fewer coordinates are left, with a larger
            variance.
        lipschitz: a fixed bound on ``|g|``, if it is known, in the unit of the gradient; None estimates it.
        bound_decay: beta in [0, 1]: each time the estimate l becomes ``max(beta * l, max |g|)``.
        seed: 0 ... 2^64 - 1. Equal seeds and gradients give equal bits, on any backend and number of threads.
        channels: None keeps one bound for the whole gradient; a number keeps one for each of so many channels.
        channel_dim: the dimension that counts the channels, 1 for images.
        rounding: "stochastic" (unbiased) or "nearest", of a gradient in bfloat16 and float16.
        index: 0 ... 2^16 - 1, which makes this layer's draws differ from those of others. It must not be that of
            another layer of the model, or gradients are biased: ``number_layers(model)`` numbers them, and so does
            ``calibrate(model)``.
            None takes a number that this process has not given out yet, from 65535 downwards; copies share theirs.
        fused: None takes the C++/CUDA kernel where there is one, else pure PyTorch; True demands the kernel; False
            takes pure PyTorch.

    Buffers, which are saved, loaded and copied with the module: ``index`` and ``step`` (int64, the gradients calibrated
    so far), ``lipschitz_bound`` (float64 whatever the module is cast to, shape () or (channels,); not with a fixed
    one). In a job of several processes (torch.distributed) each draws numbers of its own, since each has a gradient
    of its own.

    The output shares its memory with the input. It may be changed in place (nn.ReLU(inplace=True), ``+=``); an input
    that is itself used again after that has changed, too, and autograd does not detect it.

    Raises:
        ValueError, TypeError: an option is out of range; in the backward pass, where channels do not fit the gradient.
        RuntimeError: ``fused=True`` cannot be had; or the calibrated gradient is differentiated again.

    Source: the layer of Zhuo et al., AAAI 2019; the formulation is ours (docs/algorithm.md).
    """

    lipschitz_bound: Tensor | None
    tally: Tensor

    def __init__(
        self,
        calibration: float = 0.05,
        lipschitz: float | None = None,
        bound_decay: float = 0.99,
        seed: int = 0,
        *,
        channels: int | None = None,
        channel_dim: int = 1,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        index: int | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        options = {
            "calibration": calibration, "lipschitz": lipschitz, "bound_decay": bound_decay, "rounding": rounding,
            "seed": seed,
        }  # fmt: skip
        check_options(CALIBRATION_OPTIONS, options)
        INTEGER.or_none().check("channels", channels)
        INTEGER.check("channel_dim", channel_dim)
        FUSED.check("fused", fused)
        _check_channels(channels, lipschitz)
        self.calibration, self.lipschitz, self.bound_decay = calibration, lipschitz, bound_decay
        self.seed, self.channels, self.channel_dim = operator.index(seed), channels, operator.index(channel_dim)
        self.rounding, self.fused = rounding, fused
        with lasting_tensors():
            self._make_buffers()
        self.number(next(_next_index) % MOST_LAYERS if index is None else index)

    def _make_buffers(self) -> None:
        self._make_counters()
        shape = () if self.channels is None else (self.channels,)
        bound = torch.zeros(shape, dtype=torch.float64, device="cpu") if self.lipschitz is None else None
        self.register_buffer("lipschitz_bound", bound)
        self.register_buffer("tally", self._new_tally(torch.device("cpu")), persistent=False)

    def _new_tally(self, device: torch.device) -> Tensor:
        words = CALIBRATION_TALLY_WORDS + (self.channels or 1)
        with lasting_tensors():
            return torch.zeros(words, dtype=torch.int64, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` itself, of any shape; its gradient, of any floating dtype, will be calibrated."""
        if not isinstance(input, torch.Tensor):
            raise TypeError(f"GradientCalibration takes a tensor, got {type(input).__name__}")
        if not (self.training and torch.is_grad_enabled() and input.requires_grad):
            return input
        if is_dtensor(input):
            raise TypeError(
                "GradientCalibration takes a plain tensor, got a DTensor, of which each process has a part (tensor "
                "parallel); leave the module out of calibrate(types=...). With fully_shard alone tensors are plain here"
            )
        # torch.func and torch.compile need a Function with setup_context, which makes each call much slower.
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        identity: Any = _Identity if traced else _EagerIdentity
        out: Tensor = identity.apply(
            input, self.index, self.step, self.lipschitz_bound, self.tally, self.calibration, self.lipschitz,
            self.bound_decay, self.rounding, self.seed, self.channel_dim, self.fused,
        )  # fmt: skip
        return out

    def density(self) -> float | None:
        """The share of coordinates that the last backward pass let through; None before the first. Waits for a GPU."""
        moved, numel = self.tally[:2].tolist()
        return moved / numel if numel else None

    def extra_repr(self) -> str:
        """The options, for ``print(module)``."""
        text = f"calibration={self.calibration}, bound_decay={self.bound_decay}, seed={self.seed}"
        text = text if self.lipschitz is None else f"{text}, lipschitz={self.lipschitz}"
        return text if self.channels is None else f"{text}, channels={self.channels}, channel_dim={self.channel_dim}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.tally.device != self.step.device:  # which assign=True may have brought to another
            self.tally = self._new_tally(self.step.device)


def _check_channels(channels: int | None, lipschitz: float | None) -> None:
    if channels is not None and lipschitz is not None:
        raise ValueError("channels and a fixed lipschitz exclude each other: a fixed bound is one for all channels")
    if channels is not None and operator.index(channels) < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")


class _Identity(torch.autograd.Function):
    """Identity; backward calibrates. The buffers are not saved for backward: each backward pass changes them."""

    @staticmethod
    def forward(input: Tensor, *state_and_options: Any) -> Tensor:
        return input.detach()  # not a view of the input, which may not be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.state_and_options = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Only with create_graph=True can there be a gradient of this one. torch.compile, which cannot trace a Function
        # within the backward of another, has no such thing.
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        function = _Calibrate.apply if again else _calibrate
        return function(grad, *ctx.state_and_options), *(None,) * len(ctx.state_and_options)


class _EagerIdentity(torch.autograd.Function):
    """The same in the older form."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, *state_and_options: Any) -> Tensor:
        ctx.state_and_options = state_and_options
        return input.detach()

    backward = _Identity.backward


def _calibrate(
    grad: Tensor, index: Tensor, step: Tensor, lipschitz_bound: Tensor | None, tally: Tensor, calibration: float,
    lipschitz: float | None, bound_decay: float, rounding: Literal["stochastic", "nearest"], seed: int,
    channel_dim: int, fused: bool | None,
) -> Tensor:  # fmt: skip
    return calibrate_grad(
        grad, index=index, step=step, lipschitz_bound=lipschitz_bound, tally=tally, calibration=calibration,
        lipschitz=lipschitz, bound_decay=bound_decay, rounding=rounding, seed=seed, channel_dim=channel_dim,
        rank=rank(), fused=fused,
    )  # fmt: skip


class _Calibrate(torch.autograd.Function):
    """The calibration of a gradient, of which there is no gradient again."""

    @staticmethod
    def forward(grad: Tensor, *state_and_options: Any) -> Tensor:
        return _calibrate(grad, *state_and_options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError(
            "a gradient calibrated by GradientCalibration cannot be differentiated again: its draws depend on it. "
            "For a penalty on gradients put the layer into eval mode, or csgd_cuda.uncalibrate(model), for that pass"
        )
