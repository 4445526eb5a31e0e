# SPDX-License-Identifier: Apache-2.0
"""The options of a parameter group: one table for each direction, from which all else that concerns them follows.

The table gives an option's default, its check, how the step's operator takes it, and what users read of it. A new
option of the rule is a line here, a keyword of the optimizer and of its function, and its use in the rule.
"""

from __future__ import annotations

import math
import operator
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..kinds import FLAG, FUSED, INTEGER, NUMBER, TEXT, Kind, is_number_tensor
from ..tensors import Group

_T = TypeVar("_T")


@dataclass(frozen=True)
class Option:
    """One option of a parameter group.

    Attributes:
        default: where the user gives none.
        kind: what it takes.
        check: of (name, value), for a value of this kind: raises ValueError, which names the option.
        operator: from the group's value to what the operator takes; None: the operator does not take it.
        doc: for the docstrings of the optimizer and its function.
    """

    default: Any
    kind: Kind
    check: Callable[[str, Any], None]
    operator: Callable[[Any], Any] | None
    doc: str


def check_any(name: str, value: Any) -> None:
    """Every value is allowed."""


def _number(name: str, value: float | Tensor) -> float:
    """A number, or the one of a tensor with one element."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor with one element, got {value.numel()} elements")
    return value.item()


def check_finite(name: str, value: float | Tensor) -> None:
    value = _number(name, value)
    # Not math.isfinite, at which torch.compile breaks the graph for a changing lr.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number, got {value}")


def check_lr(name: str, value: float | Tensor) -> None:
    number = value_of(value)
    if number is not None:
        check_finite(name, number)


def check_not_negative(name: str, value: float | Tensor) -> None:
    value = _number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def check_lipschitz(name: str, value: float | Tensor | None) -> None:
    if value is not None:
        check_not_negative(name, value)


def check_share(name: str, value: float | Tensor) -> None:
    value = _number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_betas(name: str, value: Sequence[float | Tensor]) -> None:
    for number in (_number(name, beta) for beta in value):
        if not 0 <= number < 1:
            raise ValueError(f"{name} must be two numbers in [0, 1), got {number} among them")


def check_rounding(name: str, value: str) -> None:
    if value not in ("stochastic", "nearest"):
        raise ValueError(f"{name} must be 'stochastic' or 'nearest', got {value!r}")


def check_seed(name: str, value: int) -> None:
    """Raises ValueError for an integer outside 0 ... 2^64-1."""
    if not 0 <= operator.index(value) < 2**64:
        raise ValueError(f"{name} must be in 0 ... 2^64-1, got {value}")


def check_first_index(name: str, value: int | None) -> None:
    if value is not None and not 0 <= operator.index(value) < 2**32:
        raise ValueError(f"{name} must be None or in 0 ... 2^32-1, got {value}")


def check_amsgrad(name: str, value: bool) -> None:
    if value:
        raise ValueError(f"{name}=True is not supported: the maximum of exp_avg_sq over all steps is not kept")


def check_differentiable(name: str, value: bool) -> None:
    if value:
        raise ValueError(f"{name}=True is not supported: the step is made in place, outside autograd")


def _is_pair_of_numbers(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(NUMBER.accepts, value))


def _floats(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values]


def _float_or_none(value: float | None) -> float | None:
    return None if value is None else float(value)


# The options of the calibration alone: those of a gradient's calibration, too (layers/functional.py).
CALIBRATION_OPTIONS: dict[str, Option] = {
    "calibration": Option(
        0.25, NUMBER, check_not_negative, float,
        "c >= 0, the strength. 0 makes every step that of the plain optimizer; with larger c fewer coordinates move, "
        "with a larger variance.",
    ),
    "lipschitz": Option(
        None, NUMBER.or_none(), check_lipschitz, _float_or_none,
        "the Lipschitz constant, if it is known, in the unit of the gradient; None estimates it from the directions "
        "seen.",
    ),
    "bound_decay": Option(
        0.99, NUMBER, check_share, float, "beta in [0, 1]: each step the estimate l becomes ``max(beta * l, max |d|)``."
    ),
    "rounding": Option(
        "stochastic", TEXT.described("'stochastic' or 'nearest'"), check_rounding, str,
        '"stochastic" (unbiased) or "nearest", of what is stored in bfloat16 and float16.',
    ),
    "seed": Option(
        0, INTEGER, check_seed, operator.index,
        "0 ... 2^64 - 1. Equal seeds and gradients give equal bits, on any backend and number of threads.",
    ),
}  # fmt: skip

FIRST_INDEX = INTEGER.or_none()

# What every optimizer of torch has, and the place of the parameters in the random draws.
_COMMON_OPTIONS: dict[str, Option] = {
    "maximize": Option(False, FLAG, check_any, bool, "whether to ascend instead of descend."),
    "foreach": Option(None, FUSED, check_any, None, "accepted for compatibility; there is one implementation."),
    "differentiable": Option(False, FLAG, check_differentiable, None, "must be False."),
    "fused": Option(
        None, FUSED, check_any, None,
        "None takes the C++/CUDA kernel where there is one, else pure PyTorch, with a warning (once per process) where "
        "the parameters are on a GPU; True demands the kernel, and lets torch.amp.GradScaler leave unscaling and "
        "skipping to it, as torch's fused optimizers do; False takes pure PyTorch.",
    ),
    "capturable": Option(
        False, FLAG, check_any, None, "accepted for compatibility; the state is always on the parameter's device."
    ),
    "first_index": Option(
        None, FIRST_INDEX, check_first_index, None,
        "the number of the first parameter in the random draws; those after it count on. In a group: of its first "
        "parameter. None: 0. Set it so that several optimizers draw as one would, or so that optimizers with equal "
        "seeds draw different numbers.",
    ),
}  # fmt: skip

# It reaches the operator as a number or as a tensor: step_options().
_LR = Option(
    1e-3, NUMBER.described("a number or a tensor with one element"), check_lr, None,
    "the learning rate, a number or a tensor with one element, read on its device.",
)  # fmt: skip

SGD_OPTIONS: dict[str, Option] = {
    "lr": _LR,
    "momentum": Option(0, NUMBER, check_finite, float, "as in torch.optim.SGD."),
    "dampening": Option(0, NUMBER, check_finite, float, "as in torch.optim.SGD."),
    "weight_decay": Option(0, NUMBER, check_finite, float, "as in torch.optim.SGD; a tensor becomes a number."),
    "nesterov": Option(False, FLAG, check_any, bool, "as in torch.optim.SGD; it has no effect without momentum."),
    **CALIBRATION_OPTIONS,
    **_COMMON_OPTIONS,
}

ADAMW_OPTIONS: dict[str, Option] = {
    "lr": _LR,
    "betas": Option(
        (0.9, 0.999), Kind("two numbers", _is_pair_of_numbers), check_betas, _floats,
        "two numbers in [0, 1): what each step keeps of the means of the gradients and of their squares; tensors "
        "become numbers.",
    ),
    "eps": Option(1e-8, NUMBER, check_not_negative, float, "what is added to the root of the mean square."),
    "weight_decay": Option(
        1e-2, NUMBER, check_finite, float, "decoupled from the gradient, as in torch.optim.AdamW; a tensor becomes a "
        "number.",
    ),
    "amsgrad": Option(False, FLAG, check_amsgrad, None, "must be False."),
    **CALIBRATION_OPTIONS,
    **_COMMON_OPTIONS,
}  # fmt: skip


def _is_readable(lr: Tensor) -> bool:
    return lr.device.type == "cpu" and lr.layout is torch.strided and not torch.compiler.is_compiling()


def value_of(lr: float | Tensor) -> float | None:
    """A learning rate as a number; None for a tensor whose value cannot be read without waiting for a GPU.

    Raises:
        ValueError: it is a tensor with more than one element.
    """
    # Compiled code cannot read a tensor, either; the operator does.
    if isinstance(lr, torch.Tensor) and lr.numel() == 1 and not _is_readable(lr):
        return None
    return _number("lr", lr)


def check_options(table: Mapping[str, Option], values: Mapping[str, Any]) -> None:
    """Checks every option of a table: TypeError for a value of another kind, ValueError for one out of range.

    What torch.optim.SGD refuses in its constructor alone is not refused here: schedulers take lr a rounding error below
    0, and the momentum to 0 under nesterov.
    """
    for name, option in table.items():
        option.kind.check(name, values[name])
        option.check(name, values[name])


def check_group(table: Mapping[str, Option], group: Group) -> None:
    """Checks the options of a group; turns numbers given as tensors into numbers, lr aside. torch allows them for the
    weight decay."""
    check_options(table, group)
    for name in table:
        value = group[name]
        if name != "lr" and is_number_tensor(value):
            group[name] = value.item()
        # A list could change in place, which would not be seen.
        elif isinstance(value, list) or (isinstance(value, tuple) and any(map(is_number_tensor, value))):
            group[name] = tuple(_number(name, entry) for entry in value)
    if group["fused"] and group["foreach"]:
        raise ValueError("fused and foreach cannot both be True")


def _refuse_negative(group: Group, *names: str) -> None:
    for name in names:
        value = value_of(group[name]) if name == "lr" else group[name]
        if value is not None and value < 0:
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def check_new_sgd_group(group: Group) -> None:
    """What torch.optim.SGD refuses of a user, but not of a scheduler."""
    _refuse_negative(group, "lr", "momentum", "weight_decay")
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("nesterov needs momentum > 0 and dampening = 0")


def check_new_adamw_group(group: Group) -> None:
    """What torch.optim.AdamW refuses of a user, but not of a scheduler."""
    _refuse_negative(group, "lr", "weight_decay")
    _check_decoupled(group)


def check_loaded_sgd_group(group: Group) -> None:
    """Raises ValueError for a checkpoint's group that is not of torch.optim.SGD, nor of CSGD."""
    _check_of_this_direction(group, ("momentum",), "torch.optim.SGD or CSGD")


def check_loaded_adamw_group(group: Group) -> None:
    """Raises ValueError for a checkpoint's group with which torch.optim.AdamW would go on otherwise.

    torch.optim.Adam without weight decay makes the same steps.
    """
    _check_of_this_direction(group, ("betas", "amsgrad"), "torch.optim.AdamW or CalibratedAdamW")
    check_amsgrad("amsgrad", group.get("amsgrad", False))
    _check_decoupled(group)
    group.pop("decoupled_weight_decay", None)


def _check_of_this_direction(group: Group, names: tuple[str, ...], expected: str) -> None:
    for name in names:
        if name not in group:
            raise ValueError(f"the checkpoint is not one of {expected}: a parameter group of it has no {name}")


def _check_decoupled(group: Group) -> None:
    """torch.optim.Adam and AdamW say with an entry of their groups where the weight decay goes."""
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"] != 0:
        raise ValueError(
            f"decoupled_weight_decay=False with weight_decay={group['weight_decay']} is the decay of torch.optim.Adam, "
            "which goes through the means of the gradient, and is not supported: set weight_decay to 0 in the group"
        )


def complete_group(group: Group, own: Group) -> None:
    """Adds to a loaded group the options that it lacks, from ``own``."""
    if "calibration" not in group:  # a checkpoint of torch's optimizer: this one keeps its own way of running
        group.update({name: own[name] for name in ("fused", "foreach", "differentiable")})
    for name, value in own.items():
        if name != "params":
            group.setdefault(name, value)


def options_of_step(table: Mapping[str, Option]) -> dict[str, Option]:
    """The part of a table that the step itself takes: the operator's options, and ``lr``."""
    return {name: option for name, option in table.items() if name == "lr" or option.operator is not None}


def operator_options(table: Mapping[str, Option], options: Mapping[str, Any]) -> dict[str, Any]:
    """The checked options as the operators take them, without ``lr``."""
    return {name: option.operator(options[name]) for name, option in table.items() if option.operator is not None}


def step_options(table: Mapping[str, Option], options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The checked options as the step's operator takes them, for parameters on ``device``."""
    return operator_options(table, options) | _lr_arguments(options["lr"], device)


def _lr_arguments(lr: float | Tensor, device: torch.device) -> dict[str, Any]:
    """The learning rate as the step's operator takes it, for parameters on ``device``: a number, a tensor or None."""
    if torch.compiler.is_compiling() and not isinstance(lr, torch.Tensor):
        # An operator's float is a constant of the compiled code: each lr of a scheduler would compile it anew. A
        # factor of a tensor is an input. (Of 1.0, so that the bits are those of the number; not torch.tensor(lr),
        # which torch 2.13 makes a constant, too.)
        lr = torch.ones((), dtype=torch.float64, device=device) * lr
    if not isinstance(lr, torch.Tensor):
        return {"lr": float(lr), "lr_tensor": None}
    if lr.dtype not in (torch.float32, torch.float64):
        lr = lr.to(torch.float64)
    # A tensor on the CPU is read there; one on a GPU is read on that GPU, or copied to where the parameters are.
    return {"lr": 0.0, "lr_tensor": lr if lr.device.type in ("cpu", "meta") else lr.to(device)}


def signed_seed(seed: int) -> int:
    """The seed as the operators take it, whose integers are signed: the number of the same bits."""
    return seed - 2**64 if seed >= 2**63 else seed


def index_ranges(param_groups: list[Group]) -> list[range]:
    """The indices that tell the parameters' random draws apart, as a range for each group.

    Raises:
        ValueError: two parameters would draw the same, or an index is 2^32 or more.
    """
    ranges, position = [], 0
    for group in param_groups:
        size = len(group["params"])
        FIRST_INDEX.check("first_index", group["first_index"])
        first = position if group["first_index"] is None else group["first_index"]
        ranges.append(range(first, first + size))
        position += size
        if ranges[-1].stop > 2**32:
            raise ValueError(f"first_index must leave the last parameter an index below 2^32, got {first} for {size}")
    ascending = sorted((r for r in ranges if r), key=lambda r: r.start)
    for before, after in pairwise(ascending):
        if after.start < before.stop:
            raise ValueError(
                f"first_index: two groups have parameters of index {after.start}, which would draw the same random "
                "numbers; let the ranges first_index ... first_index + number of parameters be apart"
            )
    return ranges


OPTIONS_LINE = "options: by name, those of the table in csgd_cuda/optim/options.py."


def documented(table: Mapping[str, Option]) -> Callable[[_T], _T]:
    """A decorator that puts a table's options in place of OPTIONS_LINE among the "Args:" of a docstring."""

    def with_options(documented_object: _T) -> _T:
        doc = documented_object.__doc__
        if doc is not None:  # python -OO has none
            indent = next(line for line in doc.splitlines() if line.strip() == OPTIONS_LINE).removesuffix(OPTIONS_LINE)
            entries = [
                textwrap.fill(f"{name}: {option.doc}", 118, initial_indent=indent, subsequent_indent=f"{indent}    ")
                for name, option in table.items()
            ]
            documented_object.__doc__ = doc.replace(indent + OPTIONS_LINE, "\n".join(entries))
        return documented_object

    return with_options
