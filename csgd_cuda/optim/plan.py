# SPDX-License-Identifier: Apache-2.0
"""The operator calls of an optimizer step, kept for the next step as long as they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from operator import is_, is_not, itemgetter
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
from .diagnostics import Tallies
from .direction import Direction
from .options import check_group, index_ranges, step_options
from .state import new_buffer

# For a device, the operator's arguments of torch.amp.GradScaler: grad_scale, found_inf.
ScalerArguments: TypeAlias = Callable[[torch.device], dict[str, Tensor | None]]


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(a) == len(b) and all(map(is_, a, b))


def gather(params: list[Tensor], states: State, names: tuple[str, ...]) -> list[list[Any]] | None:
    """The gradients of parameters, and the entries of these names in their states, as lists; None where one lacks."""
    own = [states.get(param) or {} for param in params]
    lists = [[param.grad for param in params], *([entries.get(name) for entries in own] for name in names)]
    return lists if all(all(map(is_not, entries, repeat(None))) for entries in lists) else None


# In C++ both take a tenth of the time.
_same, _gather = (same, gather) if extension._C is None else (extension._C.same, extension._C.gather)


class StepCall:
    """Parameters of one group on one device, and the part of their operator call that stays valid between steps.

    Neither gradients nor state are held between steps, so that callers can free or replace them.
    """

    def __init__(
        self, direction: Direction, group: Group, device: torch.device, fresh: bool, idle: bool, tallies: Tallies,
        position: int, count: int,
    ) -> None:  # fmt: skip
        """
        Args:
            fresh: the parameters have made steps without the buffers.
            idle: no step is made, the parameters only get their state.
            tallies: those of the optimizer.
            position: of the first parameter over all groups.
            count: of the parameters of all groups.
        """
        self._direction, self._group, self._device = direction, group, device
        self._fresh, self._idle = fresh, idle
        self._tallies, self._position, self._count = tallies, position, count
        self._all_rows: Tensor | None = None  # the tallies that _own_rows is a slice of
        self._params: list[Tensor] = []
        self._indices: list[int] = []
        self._shards: list[int] = []  # the numbers of each parameter's ShardLayout
        self._has_dtensors = False
        self._new_state: list[tuple[Tensor, dict[str, Tensor]]] = []  # (param, what is to be added to its state)
        self._read = itemgetter(*direction.options)
        self._take_options()
        # The gradients and what the state has of each name, as gather() returns them. Not held between steps.
        self._lists: list[list[Any]] = [[] for _ in ("grad", *self._names)]
        self._local: StepTensors | None = None  # what this process holds of DTensors

    def _values(self) -> list[Any]:
        return list(self._read(self._group))

    def _take_options(self) -> None:
        table = self._direction.options
        check_group(table, self._group)  # schedulers, users and checkpoints change the options after the constructor
        self._kernel = extension.takes_kernel(self._device, self._group["fused"])
        self._options = step_options(table, self._group, self._device)
        self._options |= self._direction.fresh_argument(self._fresh)
        self._option_values = self._values()
        self._buffer_names = self._direction.buffers_for(self._group)
        self._has_bound = self._group["lipschitz"] is None
        self._names = ("step", *self._buffer_names, *(("lipschitz_bound",) if self._has_bound else ()))

    def add(self, param: Tensor, index: int, state: dict[str, Any]) -> None:
        """Adds a parameter with a gradient, whose draws differ by ``index``. Missing state is made here, but not kept
        before the step was made."""
        check_plain(param, index)  # the constructor does not check frozen ones
        self._params.append(param)
        self._indices.append(index)
        self._has_dtensors = self._has_dtensors or is_dtensor(param)
        self._shards.extend(shard_layout(param, index) if is_dtensor(param) else WHOLE)
        grads, *of_state = self._lists
        grads.append(param.grad)
        new: dict[str, Tensor] = {}
        for name, entries in zip(self._names, of_state, strict=True):
            tensor: Tensor | None = state.get(name)
            if tensor is None:
                with lasting_tensors():
                    tensor = new[name] = self._make(name, param)
            entries.append(tensor)
        if new:
            self._new_state.append((param, new))

    def _make(self, name: str, param: Tensor) -> Tensor:
        """An entry of the state of a parameter that has made no step."""
        if name in self._buffer_names:
            return new_buffer(param)
        dtype = torch.int64 if name == "step" else opmath_dtype(param.dtype)
        return torch.zeros((), dtype=dtype, device=self._device)

    def drawn(self) -> Iterator[tuple[int, int, Tensor]]:
        """(seed, index, parameter) of the random numbers that the step draws."""
        if not self._idle:
            for param, index in zip(self._params, self._indices, strict=True):
                rounds = self._group["rounding"] == "stochastic" and opmath_dtype(param.dtype) != param.dtype
                if self._group["calibration"] != 0 or rounds:
                    yield self._group["seed"], index, param

    def makes_state(self) -> bool:
        """Whether it makes state that its parameters lack, or is only there for that."""
        return self._idle or len(self._new_state) > 0

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
        lists = _gather(self._params, state, self._names)
        if lists is None:
            return False
        self._lists = lists
        return True

    def _tensors(self) -> StepTensors:
        # torch.compile of torch 2.11 knows neither the truth of a list nor how to take from one that is unpacked.
        (grads, steps), others = self._lists[:2], self._lists[2:]
        bounds = others.pop() if self._has_bound else []
        names = self._direction.buffers
        buffers = dict(zip(names, others if len(others) else [[]] * len(names), strict=True))
        shards = self._shards if self._has_dtensors else []
        tensors = StepTensors(self._params, grads, buffers, steps, bounds, self._indices, shards)
        if not self._has_dtensors:
            return tensors
        if self._local is None:  # once for the check and the step: gradients may have to be communicated
            self._local = tensors._replace(
                params=list(map(local_tensor, self._params)),
                grads=[local_gradient(*pair) for pair in zip(self._params, self._indices, strict=True)],
                buffers={name: list(map(local_tensor, entries)) for name, entries in buffers.items()},
                steps=list(map(local_tensor, steps)),
                lipschitz_bounds=list(map(local_tensor, bounds)),
            )
        return self._local

    def _rows(self) -> Tensor:
        """The tallies from those of the first parameter on. To look them up and slice them takes two microseconds, so
        they are kept for as long as the optimizer has its tallies in the same tensor."""
        rows = self._tallies.rows_on.get(self._device)
        if rows is None or rows is not self._all_rows:
            self._all_rows = self._tallies.rows(self._device, self._count)
            self._own_rows = self._all_rows[self._position :]
        return self._own_rows

    def _forget(self) -> None:
        self._lists, self._local = [], None

    def check(self, scaler: ScalerArguments) -> None:
        """Raises what run() would raise; changes nothing."""
        options = {**self._options, **scaler(self._device), "tallies": self._rows()}
        self._direction.check(self._tensors(), options, kernel=self._kernel)

    def run(self, scaler: ScalerArguments) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Makes the step.

        Returns:
            [(param, what its state now has in addition)]
        """
        if self._idle:
            self.check(scaler)
            self._forget()
            return self._new_state
        options = {**self._options, **scaler(self._device), "tallies": self._rows()}
        self._direction.step(self._tensors(), options, kernel=self._kernel)
        self._forget()
        # A buffer made after the parameter's first step starts at its first applied step, and only found_inf holds
        # whether this step was applied. This is rare, so waiting for its value is acceptable.
        if self._fresh and options["found_inf"] is not None and bool(options["found_inf"]):
            for _, new in self._new_state:
                for name in self._buffer_names:
                    new.pop(name, None)
        return self._new_state


def _relied_on(param_groups: list[Group]) -> list[object]:
    """The objects that stay the same between steps of one plan: the groups, and of each its numbers and parameters."""
    objects: list[object] = list(param_groups)
    for group in param_groups:
        objects.append(group["first_index"])
        objects += group["params"]
    return objects


class StepPlan:
    """One call for each parameter group, more where a group spans devices.

    Args:
        idle: parameters that only get their state (state_only.py).
        tallies: those of the optimizer.

    Raises:
        ValueError, TypeError: an option is out of range, or a parameter is a piece of one.
    """

    def __init__(
        self, direction: Direction, param_groups: list[Group], state: State, idle: set[Tensor],
        tallies: Tallies,
    ) -> None:  # fmt: skip
        if not torch.compiler.is_compiling():
            check_not_pieces(param_groups)
        self._relied_on = _relied_on(param_groups)
        self._without_grad: list[Tensor] = []
        self._calls: list[StepCall] = []
        count = sum(len(group["params"]) for group in param_groups)
        position = 0
        for group, indices in zip(param_groups, index_ranges(param_groups), strict=True):
            calls: dict[tuple[torch.device, bool, bool], StepCall] = {}
            for param, index in zip(group["params"], indices, strict=True):
                if param.grad is None:
                    self._without_grad.append(param)
                else:
                    own = state.get(param) or {}
                    fresh = direction.is_fresh(group, own, index)
                    kind = (param.device, fresh, param in idle)
                    if kind not in calls:
                        calls[kind] = StepCall(direction, group, *kind, tallies, position, count)
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
        if not _same(_relied_on(param_groups), self._relied_on):
            return False
        for param in self._without_grad:
            if param.grad is not None:
                return False
        return all(call.renew(state) for call in self._calls)

    def run(self, state: State, scaler: ScalerArguments) -> None:
        """Makes the step and keeps in ``state`` what parameters lacked there.

        Args:
            scaler: for a device, the arguments of torch.amp.GradScaler.

        Raises:
            ValueError, TypeError: something is wrong with a tensor or an option; nothing was changed.
        """
        # A later call must not find an error after an earlier one has stepped. In a graph no call steps before all were
        # traced, and so checked.
        if len(self._calls) > 1 and not torch.compiler.is_compiling():
            for call in self._calls:
                call.check(scaler)
        for call in self._calls:
            for param, new in call.run(scaler):
                state[param].update(new)
