# SPDX-License-Identifier: Apache-2.0
"""One operator call of an optimizer step: the tensors in the operator's lists, and the group's options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from operator import is_, is_not
from typing import Any

import torch
from torch import Tensor

from .aliases import Group, SharedArguments, State
from .checks import check_plain, opmath_dtype
from .functional import choose_backend, operator_options
from .options import check_group
from .shards import WHOLE, is_dtensor, local_gradient, local_tensor, shard_layout
from .sparsity import element_mask, mask_shape, new_histograms, new_mask, steps_pruned
from .state import new_momentum_buffer


def same(new: Sequence[object], old: Sequence[object]) -> bool:
    """Whether two lists hold the very same objects; what looks at each of a model's parameters has to be fast."""
    return len(new) == len(old) and all(map(is_, new, old))


def _none_is_none(tensors: Sequence[Tensor | None]) -> bool:
    return all(map(is_not, tensors, repeat(None)))


class StepCall:
    """Parameters of one group on one device, and what of it holds from one step to the next.

    Neither gradients nor state are held between steps: whoever frees or replaces them must find them freed.
    """

    def __init__(
        self, group: Group, device: torch.device, fresh_momentum: bool, pruned: bool, position: int
    ) -> None:  # fmt: skip
        """``pruned``: what steps_pruned() says of its parameters; ``position`` over all groups of the first one."""
        self._group, self._device, self._fresh_momentum = group, device, fresh_momentum
        self._pruned, self._position = pruned, position
        self._params: list[Tensor] = []
        self._indices: list[int] = []
        self._shards: list[int] = []  # the numbers of each parameter's ShardLayout
        self._has_dtensors = False
        self._new_state: list[tuple[Tensor, dict[str, Tensor]]] = []  # (param, what is to be added to its state)
        self._take_options()
        self._forget()

    def _take_options(self) -> None:
        check_group(self._group)  # schedulers, users and checkpoints change the options after the constructor
        self._backend = choose_backend(self._device, self._group["fused"])
        self._options = operator_options(self._group, self._device)
        self.keep_option_values()
        self._has_momentum = self._group["momentum"] != 0
        self._has_bound = self._group["lipschitz"] is None
        self._has_masks = self._pruned and not self._group["regrow"]

    def keep_option_values(self) -> None:
        """The group's values are those that it was made for; the optimizer itself has changed what it counts there."""
        self._option_values = list(self._group.values())

    def _forget(self) -> None:
        self._grads: list[Tensor | None] = []
        self._momentum_buffers: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._lipschitz_bounds: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._histograms: Tensor | None = None  # what the step has counted
        self._local: tuple[list[Tensor], ...] | None = None  # the lists, of what this process holds of DTensors

    def add(self, param: Tensor, index: int, state: dict[str, Any]) -> None:
        """Adds a parameter with a gradient; ``index`` tells its draws apart. What its state lacks is made here, but not
        yet kept."""
        check_plain(param, index)  # the constructor does not look at frozen ones
        new: dict[str, Tensor] = {}

        def get(name: str, make: Callable[[], Tensor]) -> Tensor:
            tensor: Tensor | None = state.get(name)
            if tensor is None:
                tensor = new[name] = make()
            return tensor

        self._params.append(param)
        self._grads.append(param.grad)
        self._indices.append(index)
        self._has_dtensors = self._has_dtensors or is_dtensor(param)
        self._shards += shard_layout(param, index) if is_dtensor(param) else WHOLE
        self._steps.append(get("step", lambda: torch.zeros((), dtype=torch.int64, device=self._device)))
        if self._has_momentum:
            self._momentum_buffers.append(get("momentum_buffer", lambda: new_momentum_buffer(param)))
        if self._has_bound:
            dtype = opmath_dtype(param.dtype)
            bound = get("lipschitz_bound", lambda: torch.zeros((), dtype=dtype, device=self._device))
            self._lipschitz_bounds.append(bound)
        if self._has_masks:
            self._masks.append(get("mask", lambda: new_mask(param, mask_shape(param, self._group))))
        if new:
            self._new_state.append((param, new))

    def makes_state(self) -> bool:
        """Whether it makes state that its parameters lack."""
        return bool(self._new_state)

    def renew(self, state: State) -> bool:
        """Takes the gradients, state and options of another step, in which the same parameters have gradients.

        Args:
            state: the optimizer's state.

        Returns:
            False where a gradient or an entry of the state is missing, or the parameters are on another device, or
            pruned otherwise.
        """
        if self._params[0].device != self._device:
            return False
        # A tensor's value can change in place, and the operator may be given a copy of it.
        if isinstance(self._group["lr"], torch.Tensor) or not same(list(self._group.values()), self._option_values):
            self._take_options()
        if (self._pruned or self._group["sparsity"]) and any(
            steps_pruned(param, self._group) != self._pruned for param in self._params
        ):
            return False
        states: list[Any] = list(map(state.get, self._params))
        self._grads = [param.grad for param in self._params]
        try:
            self._steps = [s["step"] for s in states]
            self._momentum_buffers = [s["momentum_buffer"] for s in states] if self._has_momentum else []
            self._lipschitz_bounds = [s["lipschitz_bound"] for s in states] if self._has_bound else []
            self._masks = [s["mask"] for s in states] if self._has_masks else []
        except (KeyError, TypeError):  # TypeError: no state at all
            return False
        kept: list[Sequence[Tensor | None]] = [
            self._steps, self._momentum_buffers, self._lipschitz_bounds, self._masks,
        ]  # fmt: skip
        return _none_is_none(self._grads) and all(map(_none_is_none, kept))

    def _tensors(self) -> tuple[list[Any], ...]:
        if not self._has_dtensors:
            return self._params, self._grads, self._momentum_buffers, self._steps, self._lipschitz_bounds
        if self._local is None:  # once for the check and the step: gradients may have to be communicated
            grads = [local_gradient(*pair) for pair in zip(self._params, self._indices, strict=True)]
            others = (self._params, self._momentum_buffers, self._steps, self._lipschitz_bounds)
            params, *state = ([local_tensor(tensor) for tensor in tensors] for tensors in others)
            self._local = (params, grads, *state)
        return self._local

    def _arguments(self, shared: SharedArguments) -> tuple[tuple[list[Any], ...], dict[str, Any]]:
        lists = (*self._tensors(), self._indices, self._shards if self._has_dtensors else [])
        options = {**self._options, "fresh_momentum": self._fresh_momentum, **shared(self._device, self._position)}
        options["masks"] = [element_mask(*pair) for pair in zip(self._params, self._masks, strict=False)]
        options["histograms"] = None
        return lists, options

    def take_histograms(self, group: Group) -> dict[torch.device, Tensor]:
        """What the step has counted of the parameters of a group, if they are these; it is not kept."""
        if group is not self._group or self._histograms is None:
            return {}
        histograms, self._histograms = self._histograms, None
        return {self._device: histograms}

    def check(self, shared: SharedArguments) -> None:
        """Raises what run() would raise; changes nothing. ``shared``: see StepPlan.run."""
        lists, options = self._arguments(shared)
        self._backend.check(*lists, **options)

    def run(self, shared: SharedArguments) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Makes the step.

        Returns:
            [(param, what its state now has in addition)]
        """
        lists, options = self._arguments(shared)
        if self._pruned and self._backend.name != "reference":  # which sorts
            options["histograms"] = new_histograms(self._params, self._group)
        self._backend.step(*lists, **options)
        self._forget()
        self._histograms = options["histograms"]
        found_inf = options["found_inf"]
        # A momentum buffer made after the first step counts from its first applied step on, and only found_inf
        # knows whether this one was. Rare enough to wait for the answer.
        if self._fresh_momentum and found_inf is not None and bool(found_inf):
            for _, new in self._new_state:
                new.pop("momentum_buffer", None)
        return self._new_state
