# SPDX-License-Identifier: Apache-2.0
"""What is compared: CSGD in its regimes, torch's SGD, and other packages' SGD where they are installed; and
CalibratedAdamW with torch's AdamW."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from csgd_cuda import CSGD, CalibratedAdamW
from csgd_cuda.reference import step

MOMENTUM = 0.9
LR = 1e-3  # times |d| <= 0.1: the parameters stay finite over any number of steps, also where |d| is raised to T
BASELINES = {"sgd": "sgd_fused", "adamw": "adamw_fused"}  # the peers that the ratios are formed to
ADAMW_LR = 1e-6
TARGET_DENSITY = 0.05
_NO_BOUND = 1e-30  # far below every |d|: each coordinate moves, though all is computed as for any other bound
_LARGEST_REFERENCE = 3 * 10**8  # elements: it makes about 150 kernel launches per 2^15 of them


class NotAvailable(Exception):
    """A peer cannot run here; the message says why, in a few words."""


@dataclass(frozen=True)
class Peer:
    """One column of the comparison.

    make(params, grads) returns an object with step() and, where it can tell, overall_density(); it raises NotAvailable.
    default_on: the device types where it takes part without being asked for. package: the distribution it is from.
    """

    name: str
    label: str
    make: Callable[[list[Tensor], list[Tensor]], object]
    default_on: tuple[str, ...] = ("cpu", "cuda")
    package: str | None = None
    largest: int | None = None  # elements of the largest list it takes part in
    compiles: bool = False  # its first steps are no measure of the later ones
    family: str = "sgd"  # only peers of one family are compared

    def version(self) -> str | None:
        """The version of the package it is from."""
        try:
            return None if self.package is None else importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def mean_direction(grads: list[Tensor]) -> float:
    """mean |d| over all elements in the steady state of momentum, d = g / (1 - mu)."""
    total = sum(grad.abs().sum(dtype=torch.float64).item() for grad in grads)
    return total / sum(grad.numel() for grad in grads) / (1 - MOMENTUM)


def _csgd(**options):
    def make(params, grads):
        given = {"calibration": 1.0, **options}  # as all results up to now
        if given.get("lipschitz") == "five per cent":
            given["lipschitz"] = mean_direction(grads) / TARGET_DENSITY
        try:
            return CSGD(params, lr=LR, momentum=MOMENTUM, **given)
        except RuntimeError as error:  # there is no kernel
            raise NotAvailable(str(error)) from None

    return make


def _sgd(**options):
    return lambda params, grads: torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, **options)


def _calibrated_adamw(density=None, **options):
    """``density``: |d| is 1 where gradients stay the same, so a fixed constant gives the share of what moves."""

    def make(params, grads):
        given = {"calibration": 1.0, **({} if density is None else {"lipschitz": 1 / density}), **options}
        try:
            return CalibratedAdamW(params, lr=ADAMW_LR, **given)
        except RuntimeError as error:  # there is no kernel
            raise NotAvailable(str(error)) from None

    return make


def _adamw(**options):
    return lambda params, grads: torch.optim.AdamW(params, lr=ADAMW_LR, **options)


def _adamw_in_float32(params, grads):
    """torch's fused AdamW on float32 copies, whatever the dtype of the others."""
    if params[0].dtype == torch.float32:
        raise NotAvailable("the same as torch AdamW fused")
    copies = [torch.nn.Parameter(param.detach().float()) for param in params]
    for copy, grad in zip(copies, grads, strict=True):
        copy.grad = grad.float()
    return torch.optim.AdamW(copies, lr=ADAMW_LR, fused=True)


class _Compiled:
    """torch.optim.AdamW's step compiled into one graph."""

    def __init__(self, params: list[Tensor], grads: list[Tensor]):
        self._optimizer = torch.optim.AdamW(params, lr=ADAMW_LR, foreach=True)
        self.step = torch.compile(self._optimizer.step)


def _optimi_adamw(**options):
    def make(params, grads):
        try:
            from optimi import AdamW
        except ImportError:
            raise NotAvailable("not installed") from None
        return AdamW(params, lr=ADAMW_LR, **options)

    return make


def _torchao_adamw(params, grads):
    try:
        from torchao.optim import _AdamW
    except ImportError:
        raise NotAvailable("not installed") from None
    return _AdamW(params, lr=ADAMW_LR, bf16_stochastic_round=params[0].dtype == torch.bfloat16)


def _flash_adamw(params, grads):
    try:
        from flashoptim import FlashAdamW
    except ModuleNotFoundError as error:
        missing = "not installed" if error.name == "flashoptim" else f"installed, but {error.name} is missing"
        raise NotAvailable(missing) from None
    return FlashAdamW(params, lr=ADAMW_LR, master_weight_bits=None if params[0].dtype == torch.float32 else 24)


def _apex(params, grads):
    try:
        from apex.optimizers import FusedSGD
    except ImportError:
        raise NotAvailable("not installed") from None
    return FusedSGD(params, lr=LR, momentum=MOMENTUM)


def _optimi(params, grads):
    try:
        from optimi import SGD
    except ImportError:
        raise NotAvailable("not installed") from None
    return SGD(params, lr=LR, momentum=MOMENTUM)


def _flashoptim(params, grads):
    try:
        from flashoptim import FlashSGD
    except ModuleNotFoundError as error:
        missing = "not installed" if error.name == "flashoptim" else f"installed, but {error.name} is missing"
        raise NotAvailable(missing) from None
    # Its default, 24 bits, is refused for float32 parameters, which have all their bits.
    bits = None if params[0].dtype == torch.float32 else 24
    try:
        return FlashSGD(params, lr=LR, momentum=MOMENTUM, master_weight_bits=bits)
    except NotImplementedError as error:
        raise NotAvailable(str(error)) from None


class _CompiledReference:
    """CSGD's reference with the arithmetic of each tensor compiled into one graph.

    The reference cuts tensors into blocks for a CPU's cache. A compiler needs no blocks, and unrolled they would be
    a graph of thousands of nodes; so while this peer steps there is one block to a tensor.
    """

    def __init__(self, params: list[Tensor], grads: list[Tensor]):
        # dynamic: else each length is a graph of its own, and beyond a limit torch falls back without a word.
        self._step_columns = torch.compile(step._StackStep._step_columns, dynamic=True)
        self._optimizer = CSGD(params, lr=LR, momentum=MOMENTUM, calibration=1.0, fused=False)

    def step(self) -> None:
        before = step.block_elements, step._StackStep._step_columns
        step.block_elements, step._StackStep._step_columns = lambda device: 2**56, self._step_columns
        try:
            self._optimizer.step()
        finally:
            step.block_elements, step._StackStep._step_columns = before

    def overall_density(self) -> float:
        return self._optimizer.overall_density()


_CPU, _CUDA = ("cpu",), ("cuda",)
_of_adamw = functools.partial(Peer, family="adamw")
PEERS = {
    peer.name: peer
    for peer in (
        Peer("sgd_fused", "torch SGD fused", _sgd(fused=True)),
        Peer("sgd_foreach", "torch SGD foreach", _sgd(foreach=True)),
        Peer("sgd_forloop", "torch SGD for-loop", _sgd(foreach=False), _CPU),
        Peer("csgd", "CSGD, realistic", _csgd(fused=True)),
        Peer("csgd_5", "CSGD, 5 %", _csgd(fused=True, lipschitz="five per cent")),
        Peer("csgd_dense", "CSGD, dense", _csgd(fused=True, lipschitz=_NO_BOUND)),
        Peer("csgd_off", "CSGD, c = 0", _csgd(fused=True, calibration=0.0)),
        Peer("reference", "CSGD reference", _csgd(fused=False), largest=_LARGEST_REFERENCE),
        Peer("compiled", "CSGD reference, torch.compile", _CompiledReference, _CUDA, compiles=True),
        Peer("apex", "apex FusedSGD", _apex, _CUDA, "apex"),
        Peer("optimi", "torch-optimi SGD", _optimi, package="torch-optimi"),
        Peer("flashoptim", "flashoptim FlashSGD (8-bit momentum)", _flashoptim, _CUDA, "flashoptim"),
        _of_adamw("adamw_fused", "torch AdamW fused", _adamw(fused=True)),
        _of_adamw("adamw_foreach", "torch AdamW foreach", _adamw(foreach=True)),
        _of_adamw("adamw_compiled", "torch AdamW compiled", _Compiled, _CUDA, compiles=True),
        _of_adamw("adamw_float32", "torch AdamW fused, float32", _adamw_in_float32),
        _of_adamw("adamw_optimi", "torch-optimi AdamW", _optimi_adamw(), package="torch-optimi"),
        _of_adamw("adamw_kahan", "torch-optimi AdamW, Kahan", _optimi_adamw(kahan_sum=True), package="torch-optimi"),
        _of_adamw("adamw_torchao", "torchao AdamW, stochastic rounding", _torchao_adamw, _CUDA, package="torchao"),
        _of_adamw("adamw_flash", "flashoptim FlashAdamW", _flash_adamw, _CUDA, "flashoptim"),
        _of_adamw("adamw_25", "CalibratedAdamW, 25 %", _calibrated_adamw(0.25, fused=True)),
        _of_adamw("adamw_5", "CalibratedAdamW, 5 %", _calibrated_adamw(0.05, fused=True)),
        _of_adamw("adamw_dense", "CalibratedAdamW, dense", _calibrated_adamw(fused=True, lipschitz=_NO_BOUND)),
        _of_adamw("adamw_off", "CalibratedAdamW, c = 0", _calibrated_adamw(fused=True, calibration=0.0)),
        _of_adamw(
            "adamw_reference",
            "CalibratedAdamW reference",
            _calibrated_adamw(0.25, fused=False),
            largest=_LARGEST_REFERENCE,
        ),
    )
}
