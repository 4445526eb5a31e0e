# SPDX-License-Identifier: Apache-2.0
"""The direction of a step, which is all that differs between the calibrated optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import extension
from ..pruning.options import PRUNING_OPTIONS
from ..reference import checks, step
from ..reference.sgd import SgdDirection
from ..tensors import Group, StepTensors, Tensors
from .options import SGD_OPTIONS, Option, check_new_sgd_group, check_options, options_of_step, signed_seed


@dataclass(frozen=True)
class Direction:
    """A direction: its options, its state, and its step on the kernels and in pure PyTorch.

    Attributes:
        operator: the name of the step's operator in torch.ops.csgd_cuda.
        options: the table of its options, those of pruning included.
        buffers: the names of its state tensors of a parameter's shape, in the order of the operator's lists.
        needs_buffers: whether a group's options need these.
        check_new_group: what torch's optimizer refuses of a user, beyond the checks of the table.
        reference: its arithmetic in pure PyTorch.
    """

    operator: str
    options: Mapping[str, Option]
    buffers: tuple[str, ...]
    needs_buffers: Callable[[Mapping[str, Any]], bool]
    check_new_group: Callable[[Group], None]
    reference: type[SgdDirection]

    def buffers_for(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of the buffers that a group with these options needs."""
        return self.buffers if self.needs_buffers(options) else ()

    def step(self, tensors: StepTensors, options: dict[str, Any], *, kernel: bool) -> None:
        """Makes a step in place.

        Args:
            options: those of ``step_options``, and the operator's arguments that belong to the whole call:
                fresh_momentum, grad_scale, found_inf, tallies.
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
    operator="csgd_",
    options={**SGD_OPTIONS, **PRUNING_OPTIONS},
    buffers=("momentum_buffer",),
    needs_buffers=lambda options: bool(options["momentum"] != 0),
    check_new_group=check_new_sgd_group,
    reference=SgdDirection,
)


def _fake(
    params: Tensors, grads: Tensors, momentum_buffers: Tensors, steps: Tensors, lipschitz_bounds: Tensors,
    indices: Sequence[int], shards: Sequence[int], *, lr_tensor: Tensor | None, grad_scale: Tensor | None,
    found_inf: Tensor | None, tallies: Tensor | None, **options: Any,
) -> None:  # fmt: skip
    """The operator returns nothing, and what it changes is in the schema: torch.compile needs no more. But a call with
    a single meta tensor among real ones comes here as well, and must not pass silently."""
    tensors = StepTensors(
        list(params), list(grads), {"momentum_buffer": list(momentum_buffers)}, list(steps), list(lipschitz_bounds),
        list(indices), list(shards),
    )  # fmt: skip
    checks.check_devices(tensors)
    if params:
        checks.check_shared_tensors(
            params[0].device, indices, lr_tensor=lr_tensor, grad_scale=grad_scale, found_inf=found_inf, tallies=tallies
        )


if extension.build_info() is not None:
    torch.library.register_fake("csgd_cuda::csgd_", _fake)
