# SPDX-License-Identifier: Apache-2.0
"""The direction of a step, which is all that differs between the calibrated optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import extension
from ..pruning.options import PRUNING_OPTIONS
from ..reference import checks, step
from ..reference.adamw import AdamWDirection
from ..reference.sgd import SgdDirection
from ..tensors import Group, StepTensors, Tensors
from .options import (
    ADAMW_OPTIONS,
    SGD_OPTIONS,
    Option,
    check_loaded_adamw_group,
    check_loaded_sgd_group,
    check_new_adamw_group,
    check_new_sgd_group,
    check_options,
    options_of_step,
    signed_seed,
)


@dataclass(frozen=True)
class Direction:
    """A direction: its options, its state, and its step on the kernels and in pure PyTorch.

    Attributes:
        optimizer: the name of its class.
        operator: the name of the step's operator in torch.ops.csgd_cuda.
        options: the table of its options, those of pruning included.
        buffers: the names of its state tensors of a parameter's shape, in the order of the operator's lists.
        needs_buffers: whether a group's options need these.
        buffers_may_come_later: whether buffers may be made after a parameter's first steps. Then the operator takes
            ``fresh_momentum``, which says so; else a state without them is an error.
        check_new_group: what torch's optimizer refuses of a user, beyond the checks of the table.
        check_loaded_group: what cannot be gone on with of a checkpoint's group.
        reference: its arithmetic in pure PyTorch.
    """

    optimizer: str
    operator: str
    options: Mapping[str, Option]
    buffers: tuple[str, ...]
    needs_buffers: Callable[[Mapping[str, Any]], bool]
    buffers_may_come_later: bool
    check_new_group: Callable[[Group], None]
    check_loaded_group: Callable[[Group], None]
    reference: type[step.StepDirection]

    def buffers_for(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of the buffers that a group with these options needs."""
        return self.buffers if self.needs_buffers(options) else ()

    def is_fresh(self, options: Mapping[str, Any], own: Mapping[str, Any], index: int) -> bool:
        """Whether parameter ``index``, whose state is ``own``, has made steps without the buffers that it now needs.

        Raises:
            ValueError: some of its count and buffers are there, but not all, and this direction needs them together.
        """
        if self.buffers_may_come_later:
            return len(own) > 0 and any(own.get(name) is None for name in self.buffers_for(options))
        self.check_state(own, index)
        return False

    def check_state(self, own: Mapping[str, Any], index: int) -> None:
        """Raises ValueError for a state of parameter ``index`` with which this direction cannot go on."""
        together = () if self.buffers_may_come_later else ("step", *self.buffers)
        there = [name for name in together if own.get(name) is not None]
        if there and len(there) < len(together):
            missing = ", ".join(name for name in together if name not in there)
            raise ValueError(
                f"parameter {index}: its state has {', '.join(there)}, but no {missing}; all of them must be there, or "
                "none, to begin anew"
            )

    def fresh_argument(self, fresh: bool) -> dict[str, bool]:
        """What the operator takes of ``is_fresh``."""
        return {"fresh_momentum": fresh} if self.buffers_may_come_later else {}

    def step(self, tensors: StepTensors, options: dict[str, Any], *, kernel: bool) -> None:
        """Makes a step in place.

        Args:
            options: those of ``step_options``, and the operator's arguments that belong to the whole call:
                grad_scale, found_inf, tallies, and that of ``fresh_argument``.
            kernel: whether the kernel makes it, else pure PyTorch: the same bits.

        Raises:
            ValueError, TypeError: something is wrong with an argument; the message names it, and nothing was changed.
        """
        if kernel:
            self._call(tensors, options, check_only=False)
        else:
            self._check_reference(tensors, options)
            device = tensors.params[0].device if tensors.params else torch.device("cpu")
            step.make_step_on(device)(self.reference, tensors, options)

    def check(self, tensors: StepTensors, options: dict[str, Any], *, kernel: bool) -> None:
        """Raises what ``step`` would raise; changes nothing."""
        if kernel:
            self._call(tensors, options, check_only=True)
        else:
            self._check_reference(tensors, options)

    def _call(self, tensors: StepTensors, options: dict[str, Any], *, check_only: bool) -> None:
        params, grads, buffers, *others = tensors
        # Both are the same operator: one that torch.compile can trace, and one that takes less of the host's time.
        if torch.compiler.is_compiling():
            call = getattr(torch.ops.csgd_cuda, self.operator)
            options = {**options, "seed": signed_seed(options["seed"])}
        else:
            call = getattr(extension._C, self.operator)
        call(params, grads, *buffers.values(), *others, check_only=check_only, **options)

    def _check_reference(self, tensors: StepTensors, options: dict[str, Any]) -> None:
        lr = options["lr"] if options["lr_tensor"] is None else options["lr_tensor"]
        check_options(options_of_step(self.options), {**options, "lr": lr})
        checks.check_step(tensors, options, uses_buffers=self.needs_buffers(options))


SGD = Direction(
    optimizer="CSGD",
    operator="csgd_",
    options={**SGD_OPTIONS, **PRUNING_OPTIONS},
    buffers=("momentum_buffer",),
    needs_buffers=lambda options: bool(options["momentum"] != 0),
    buffers_may_come_later=True,
    check_new_group=check_new_sgd_group,
    check_loaded_group=check_loaded_sgd_group,
    reference=SgdDirection,
)

ADAMW = Direction(
    optimizer="CalibratedAdamW",
    operator="calibrated_adamw_",
    options={**ADAMW_OPTIONS, **PRUNING_OPTIONS},
    buffers=("exp_avg", "exp_avg_sq"),
    needs_buffers=lambda options: True,
    buffers_may_come_later=False,
    check_new_group=check_new_adamw_group,
    check_loaded_group=check_loaded_adamw_group,
    reference=AdamWDirection,
)


def _register_fake(direction: Direction) -> None:
    """The operator returns nothing, and what it changes is in the schema: torch.compile needs no more. But a call with
    a single meta tensor among real ones comes here as well, and must not pass silently."""

    def fake(
        params: Tensors, grads: Tensors, *buffers_and_others: Any, lr_tensor: Tensor | None, grad_scale: Tensor | None,
        found_inf: Tensor | None, tallies: Tensor | None, **options: Any,
    ) -> None:  # fmt: skip
        *buffers, steps, lipschitz_bounds, indices, shards = map(list, buffers_and_others)
        named = dict(zip(direction.buffers, buffers, strict=True))
        checks.check_devices(StepTensors(list(params), list(grads), named, steps, lipschitz_bounds, indices, shards))
        if params:
            checks.check_shared_tensors(
                params[0].device, indices, lr_tensor=lr_tensor, grad_scale=grad_scale, found_inf=found_inf,
                tallies=tallies,
            )  # fmt: skip

    torch.library.register_fake(f"csgd_cuda::{direction.operator}", fake)


if extension.build_info() is not None:
    for _direction in (SGD, ADAMW):
        _register_fake(_direction)
