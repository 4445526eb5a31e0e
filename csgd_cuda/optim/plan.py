# SPDX-License-Identifier: Apache-2.0
"""The operator calls of an optimizer step, kept for the next step as long as they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from operator import is_, is_not
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import extension
from ..distributed.shards import (
    WHOLE,
    check_not_pieces,
    check_plain,
    is_dtensor,
    local_gradient,
    local_tensor,
    shard_layout,
)
from ..tensors import Group, State, StepTensors, lasting_tensors, opmath_dtype
from .direction import Direction
from .options import check_group, index_ranges, step_options
from .state import new_buffer

# For a device and the place of a call's first parameter over all groups, the operator's arguments that belong to the
# whole optimizer: grad_scale, found_inf, tallies.
SharedArguments: TypeAlias = Callable[[torch.device, int], dict[str, Tensor | None]]


def _same(new: Sequence[object], old: Sequence[object]) -> bool:
    """Whether two lists hold the very same objects. Fast, since it compares lists of all of a model's parameters."""
    return len(new) == len(old) and all(map(is_, new, old))


def _none_is_none(tensors: Sequence[Tensor | None]) -> bool:
    return all(map(is_not, tensors, repeat(None)))


class StepCall:
    """Parameters of one group on one device, and the part of their operator call that stays valid between steps.

    Neither gradients nor state are held between steps, so that callers can free or replace them.
    """

    def __init__(
        self, direction: Direction, group: Group, device: torch.device, fresh: bool, idle: bool, position: int
    ) -> None:
        """
        Args:
            fresh: the parameters have made steps without the buffers.
            idle: no step is made, the parameters only get their state.
            position: of the first parameter over all groups.
        """
        self._direction, self._group, self._device = direction, group, device
        self._fresh, self._idle, self._position = fresh, idle, position
        self._params: list[Tensor] = []
        self._indices: list[int] = []
        self._shards: list[int] = []  # the numbers of each parameter's ShardLayout
        self._has_dtensors = False
        self._new_state: list[tuple[Tensor, dict[str, Tensor]]] = []  # (param, what is to be added to its state)
        self._take_options()
        self._forget()

    def _values(self) -> list[Any]:
        return [self._group[name] for name in self._direction.options]

    def _take_options(self) -> None:
        table = self._direction.options
        check_group(table, self._group)  # schedulers, users and checkpoints change the options after the constructor
        self._kernel = extension.takes_kernel(self._device, self._group["fused"])
        self._options = step_options(table, self._group, self._device)
        self._option_values = self._values()
        self._buffer_names = self._direction.buffers_for(self._group)
        self._has_bound = self._group["lipschitz"] is None

    def _forget(self) -> None:
        self._grads: list[Tensor | None] = []
        self._buffers: dict[str, list[Tensor]] = {name: [] for name in self._direction.buffers}
        self._steps: list[Tensor] = []
        self._lipschitz_bounds: list[Tensor] = []
        self._local: StepTensors | None = None  # what this process holds of DTensors

    def add(self, param: Tensor, index: int, state: dict[str, Any]) -> None:
        """Adds a parameter with a gradient, whose draws differ by ``index``. Missing state is made here, but not kept
        before the step was made."""
        check_plain(param, index)  # the constructor does not check frozen ones
        new: dict[str, Tensor] = {}

        def get(name: str, make: Callable[[], Tensor]) -> Tensor:
            tensor: Tensor | None = state.get(name)
            if tensor is None:
                with lasting_tensors():
                    tensor = new[name] = make()
            return tensor

        self._params.append(param)
        self._grads.append(param.grad)
        self._indices.append(index)
        self._has_dtensors = self._has_dtensors or is_dtensor(param)
        self._shards += shard_layout(param, index) if is_dtensor(param) else WHOLE
        self._steps.append(get("step", lambda: torch.zeros((), dtype=torch.int64, device=self._device)))
        for name in self._buffer_names:
            self._buffers[name].append(get(name, lambda: new_buffer(param)))
        if self._has_bound:
            dtype = opmath_dtype(param.dtype)
            bound = get("lipschitz_bound", lambda: torch.zeros((), dtype=dtype, device=self._device))
            self._lipschitz_bounds.append(bound)
        if new:
            self._new_state.append((param, new))

    def drawn(self) -> Iterator[tuple[int, int, Tensor]]:
        """(seed, index, parameter) of the random numbers that the step draws."""
        if not self._idle:
            for param, index in zip(self._params, self._indices, strict=True):
                rounds = self._group["rounding"] == "stochastic" and opmath_dtype(param.dtype) != param.dtype
                if self._group["calibration"] != 0 or rounds:
                    yield self._group["seed"], index, param

    def makes_state(self) -> bool:
        """Whether it makes state that its parameters lack, or is only there for that."""
        return self._idle or bool(self._new_state)

    def renew(self, state: State) -> bool:
        """Takes the gradients, state and options of another step, in which the same parameters have gradients.

        Args:
            state: the optimizer's state.

        Returns:
            False where a gradient or an entry of the state is missing, or the parameters are on another device.
        """
        if self._params[0].device != self._device:
            return False
        # A tensor's value can change in place, and the operator may have got a copy of it.
        if isinstance(self._group["lr"], torch.Tensor) or not _same(self._values(), self._option_values):
            self._take_options()
        states: list[Any] = list(map(state.get, self._params))
        self._grads = [param.grad for param in self._params]
        try:
            self._steps = [s["step"] for s in states]
            for name in self._direction.buffers:
                self._buffers[name] = [s[name] for s in states] if name in self._buffer_names else []
            self._lipschitz_bounds = [s["lipschitz_bound"] for s in states] if self._has_bound else []
        except (KeyError, TypeError):  # TypeError: no state at all
            return False
        kept: list[Sequence[Tensor | None]] = [self._steps, *self._buffers.values(), self._lipschitz_bounds]
        return _none_is_none(self._grads) and all(map(_none_is_none, kept))

    def _tensors(self) -> StepTensors:
        grads: list[Any] = self._grads
        shards = self._shards if self._has_dtensors else []
        tensors = StepTensors(
            self._params, grads, self._buffers, self._steps, self._lipschitz_bounds, self._indices, shards
        )
        if not self._has_dtensors:
            return tensors
        if self._local is None:  # once for the check and the step: gradients may have to be communicated
            self._local = tensors._replace(
                params=list(map(local_tensor, self._params)),
                grads=[local_gradient(*pair) for pair in zip(self._params, self._indices, strict=True)],
                buffers={name: list(map(local_tensor, buffers)) for name, buffers in self._buffers.items()},
                steps=list(map(local_tensor, self._steps)),
                lipschitz_bounds=list(map(local_tensor, self._lipschitz_bounds)),
            )
        return self._local

    def _all_options(self, shared: SharedArguments) -> dict[str, Any]:
        return {**self._options, "fresh_momentum": self._fresh, **shared(self._device, self._position)}

    def check(self, shared: SharedArguments) -> None:
        """Raises what run() would raise; changes nothing. ``shared``: see StepPlan.run."""
        self._direction.check(self._tensors(), self._all_options(shared), kernel=self._kernel)

    def run(self, shared: SharedArguments) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Makes the step.

        Returns:
            [(param, what its state now has in addition)]
        """
        if self._idle:
            self.check(shared)
            self._forget()
            return self._new_state
        options = self._all_options(shared)
        self._direction.step(self._tensors(), options, kernel=self._kernel)
        self._forget()
        # A buffer made after the parameter's first step starts at its first applied step, and only found_inf holds
        # whether this step was applied. This is rare, so waiting for its value is acceptable.
        if self._fresh and options["found_inf"] is not None and bool(options["found_inf"]):
            for _, new in self._new_state:
                for name in self._buffer_names:
                    new.pop(name, None)
        return self._new_state


class StepPlan:
    """One call for each parameter group, more where a group spans devices.

    Args:
        idle: parameters that only get their state (state_only.py).

    Raises:
        ValueError, TypeError: an option is out of range, or a parameter is a piece of one.
    """

    def __init__(self, direction: Direction, param_groups: list[Group], state: State, idle: set[Tensor]) -> None:
        if not torch.compiler.is_compiling():
            check_not_pieces(param_groups)
        self._groups = list(param_groups)
        self._params = [list(group["params"]) for group in param_groups]
        self._without_grad: list[Tensor] = []
        self._calls: list[StepCall] = []
        self._first_indices = [group["first_index"] for group in param_groups]
        position = 0
        for group, indices in zip(param_groups, index_ranges(param_groups), strict=True):
            needed = direction.buffers_for(group)
            calls: dict[tuple[torch.device, bool, bool], StepCall] = {}
            for param, index in zip(group["params"], indices, strict=True):
                if param.grad is None:
                    self._without_grad.append(param)
                else:
                    own = state.get(param) or {}
                    fresh = bool(own) and any(own.get(name) is None for name in needed)
                    kind = (param.device, fresh, param in idle)
                    if kind not in calls:
                        calls[kind] = StepCall(direction, group, *kind, position)
                    calls[kind].add(param, index, own)
                position += 1
            self._calls.extend(calls.values())

    def drawn(self) -> Iterator[tuple[int, int, Tensor]]:
        """(seed, index, parameter) of the random numbers that the step draws."""
        for call in self._calls:
            yield from call.drawn()

    def makes_state(self) -> bool:
        """Whether it makes state that parameters lack: such a plan is good for one step."""
        return any(call.makes_state() for call in self._calls)

    def renew(self, param_groups: list[Group], state: State) -> bool:
        """Takes the gradients, state and options of another step.

        Returns:
            False where something else has changed: groups, parameters, or which of them have gradients and state.
        """
        return (
            _same(param_groups, self._groups)
            and [group["first_index"] for group in param_groups] == self._first_indices
            and all(_same(group["params"], params) for group, params in zip(param_groups, self._params, strict=True))
            and all(param.grad is None for param in self._without_grad)
            and all(call.renew(state) for call in self._calls)
        )

    def run(self, state: State, shared: SharedArguments) -> None:
        """Makes the step and keeps in ``state`` what parameters lacked there.

        Args:
            shared: the operator's arguments that belong to the whole optimizer.

        Raises:
            ValueError, TypeError: something is wrong with a tensor or an option; nothing was changed.
        """
        # A later call must not find an error after an earlier one has stepped. In a graph no call steps before all were
        # traced, and so checked.
        if len(self._calls) > 1 and not torch.compiler.is_compiling():
            for call in self._calls:
                call.check(shared)
        for call in self._calls:
            for param, new in call.run(shared):
                state[param].update(new)
