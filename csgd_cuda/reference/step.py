# SPDX-License-Identifier: Apache-2.0
"""The step of a direction, block by block over many parameters at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from ..distributed.shards import WHOLE, ShardLayout
from ..tensors import StepTensors, Tensors, opmath_dtype, outside_gpu_code
from .flatten import Flattened, memory_order
from .philox import CALIBRATION_STREAM, PARAM_STREAM, draws, draws_at
from .rule import (
    LAYOUTS,
    calibrated,
    calibration_scale,
    largest_size,
    moves,
    moving_draws,
    next_bound,
    ordered_bits,
    round_stochastic,
)

_T = TypeVar("_T")


class StepDirection(Protocol):
    """The direction in one step of parameters of one dtype, which are the rows of a matrix.

    Attributes:
        streams: of the stochastic rounding of each buffer.
    """

    streams: ClassVar[Mapping[str, int]]

    def __init__(self, options: dict[str, Any], step: Tensor, opmath: torch.dtype) -> None:
        """``step``: the applied steps of each parameter, int64 of shape (parameters, 1)."""

    def __call__(self, g: Tensor, param: Tensor, buffers: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The direction d and the new buffers, unrounded.

        Args:
            g: the gradient in opmath, without the loss scale.
            param, buffers: as stored.
        """


def block_elements(device: torch.device) -> int:
    """How many elements are worked on at a time; a multiple of 8."""
    if device.type == "cpu":
        # 256 KB of each temporary to a thread: they stay in its cache, and an operation takes longer than its call.
        # Compiled code cannot read the number of threads.
        return 2**16 * (1 if torch.compiler.is_compiling() else torch.get_num_threads())
    return 2**22  # many times as long as a launch takes


@torch.no_grad()
def make_step(direction: type[StepDirection], tensors: StepTensors, options: dict[str, Any]) -> None:
    """One step of every parameter, in place, of arguments that were checked (checks.py).

    Args:
        options: those of the operator.
    """
    params, indices = tensors.params, tensors.indices
    if not params:
        return
    if options["lr_tensor"] is not None:
        options = {**options, "lr": options["lr_tensor"]}
    # A tensor, not a bool: to read it here would make the host wait for a GPU.
    apply = None if options["found_inf"] is None else options["found_inf"].reshape(()) == 0
    moved = None if options["tallies"] is None else options["tallies"][:, 0].unbind()
    size = len(ShardLayout._fields)
    shards = tensors.shards
    layouts = [ShardLayout(*shards[k * size : (k + 1) * size]) if shards else WHOLE for k in range(len(params))]
    for stack in _stacks(params, layouts):

        def pick(values: Sequence[_T], stack: list[int] = stack) -> list[_T]:
            return [values[k] for k in stack] if values else []

        of_stack = StepTensors(
            pick(params), pick(tensors.grads), {name: pick(b) for name, b in tensors.buffers.items() if b},
            pick(tensors.steps), pick(tensors.lipschitz_bounds), pick(indices), [],
        )  # fmt: skip
        tallies = None if moved is None else [moved[indices[k] - indices[0]] for k in stack]
        _StackStep(direction, of_stack, layouts[stack[0]], apply, tallies, options).run()


make_step_on = outside_gpu_code(make_step)


def _stacks(params: Tensors, layouts: list[ShardLayout]) -> Iterator[list[int]]:
    """The parameters' places in lists: those of one dtype, length and layout together, as many as make a block."""
    alike: dict[tuple[torch.dtype, int, ShardLayout], list[int]] = defaultdict(list)
    for k, (param, layout) in enumerate(zip(params, layouts, strict=True)):
        alike[param.dtype, param.numel(), layout].append(k)
    block = block_elements(params[0].device)
    for (_, numel, _), places in alike.items():
        count = max(1, block // max(1, numel))
        yield from (places[k : k + count] for k in range(0, len(places), count))


def _column(tensors: Tensors) -> Tensor:
    """Tensors with one element each as a new matrix of one column."""
    return torch.cat([tensor.reshape(1) for tensor in tensors]).view(-1, 1)


def _where(condition: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """``new`` where the condition (None: always) holds."""
    return new if condition is None else torch.where(condition, new, old)


class _StackStep:
    """One step of parameters of one dtype and length, block by block over their memory.

    Each is a row of a matrix, so that the many small ones of a network cost the calls of a single one. A number of each
    parameter is a column.
    """

    def __init__(
        self, direction: type[StepDirection], tensors: StepTensors, layout: ShardLayout, apply: Tensor | None,
        tallies: list[Tensor] | None, options: dict[str, Any],
    ) -> None:  # fmt: skip
        orders = [memory_order(param) for param in tensors.params]
        self._params = Flattened(tensors.params, orders)
        self._buffers = {name: Flattened(buffers, orders) for name, buffers in tensors.buffers.items()}
        self._grad = Flattened(tensors.grads, orders).matrix
        self._steps, self._bounds, self._tallies = tensors.steps, tensors.lipschitz_bounds, tallies
        self._layout, self._apply, self._options = layout, apply, options
        dtype, self._device = self._params.matrix.dtype, self._params.matrix.device
        self._opmath = opmath_dtype(dtype)
        self._bits = LAYOUTS[self._opmath].integer
        self._rounds = options["rounding"] == "stochastic" and self._opmath != dtype
        self._step = _column(self._steps)
        self._direction = direction(options, self._step, self._opmath)
        rounded = {"param": PARAM_STREAM, **{name: direction.streams[name] for name in self._buffers}}
        self._streams = {"calibration": CALIBRATION_STREAM, **(rounded if self._rounds else {})}
        self._take_numbers(tensors.indices)

    def _take_numbers(self, indices: Sequence[int]) -> None:
        device, options = self._device, self._options

        def number(value: float | Tensor) -> Tensor:
            if isinstance(value, torch.Tensor):
                return value.to(device=device, dtype=self._opmath).reshape(())
            return torch.full((), value, dtype=self._opmath, device=device)

        self._lr = number(options["lr"])
        self._unscale = None if options["grad_scale"] is None else number(1.0) / number(options["grad_scale"])
        self._bound = _column(self._bounds) if self._bounds else None
        lipschitz = self._bound if self._bound is not None else number(options["lipschitz"])
        self._scale = calibration_scale(number(options["calibration"]), lipschitz)
        self._index = self._integers(indices)

    def _integers(self, values: Sequence[int]) -> Tensor:
        """A new column on the device."""
        if self._device.type == "cpu":
            return torch.tensor(values, device=self._device).view(-1, 1)
        # torch.tensor would wait for a GPU
        return _column([torch.full((), value, dtype=torch.int64, device=self._device) for value in values])

    def run(self) -> None:
        count, length = self._params.matrix.shape
        self._largest = torch.zeros((count, 1), dtype=self._bits, device=self._device)
        self._moved = torch.zeros((count, 1), dtype=torch.int64, device=self._device)
        # Draws are made for four blocks at a time, so that each of their int64 tensors of words is as large as a
        # temporary of a block. With fewer elements torch would not use its threads.
        at_once = block_elements(self._device) * (4 if self._device.type == "cpu" else 1)
        self._stream = self._integers([*self._streams.values()]).unsqueeze(-1)
        for begin in range(0, length, at_once):
            self._step_columns(begin, min(begin + at_once, length))
        for flattened in (self._params, *self._buffers.values()):
            flattened.write_back()
        self._advance()

    def _advance(self) -> None:
        """After the last block: the bounds, the steps and the counts of coordinates that moved."""
        if self._bound is not None:
            new = next_bound(self._bound, self._options["bound_decay"], largest_size(self._largest, self._opmath))
            torch._foreach_copy_(self._bounds, _where(self._apply, new, self._bound).view(-1).unbind())
        new_steps = self._step + (1 if self._apply is None else self._apply)
        torch._foreach_copy_(self._steps, new_steps.view(-1).unbind())
        if self._tallies is not None:
            moved = _where(self._apply, self._moved, _column(self._tallies))
            torch._foreach_copy_(self._tallies, moved.view(-1).unbind())

    def _step_columns(self, begin: int, end: int) -> None:
        """Steps the elements begin ... end - 1 of each parameter."""
        positions = None if self._layout == WHOLE else self._layout.positions(begin, end, self._device)

        of_rows = {"seed": self._options["seed"], "stream": self._stream, "index": self._index, "step": self._step}
        # All streams at once: small parameters cost mostly the calls.
        if positions is None:
            drawn = draws(begin, end, device=self._device, **of_rows)
        else:
            drawn = draws_at(positions, **of_rows)
        made = dict(zip(self._streams, drawn.unbind(), strict=True))
        block = block_elements(self._device)
        for first in range(begin, end, block):
            last = min(first + block, end)
            part = slice(first - begin, last - begin)
            self._step_block(slice(first, last), {name: draw[..., part] for name, draw in made.items()})

    def _step_block(self, columns: slice, draw: dict[str, Tensor]) -> None:
        """Steps the elements of the slice ``columns``; notes max |d| over the finite ones and how many moved."""
        param = self._params.matrix[:, columns]
        buffers = {name: flattened.matrix[:, columns] for name, flattened in self._buffers.items()}
        g = self._grad[:, columns].to(self._opmath)
        if self._unscale is not None:
            g = g * self._unscale
        if self._options["maximize"]:
            g = -g
        d, new_buffers = self._direction(g, param, buffers)
        size = d.abs()
        n = moving_draws(size, self._scale)
        self._largest = torch.maximum(self._largest, ordered_bits(size).amax(1, keepdim=True))
        move = moves(draw["calibration"], n)
        if self._apply is not None:
            move *= self._apply
            new_buffers = {
                name: torch.where(self._apply, new, buffers[name].to(self._opmath)) for name, new in new_buffers.items()
            }
        self._moved -= move.sum(1, keepdim=True, dtype=self._bits)
        for name, new in new_buffers.items():
            self._store(buffers[name], new, draw.get(name))
        change = calibrated(d, n).mul_(self._lr)
        change.view(self._bits).bitwise_and_(move)  # else +0, and x - 0 is x, whatever x is
        if self._opmath == param.dtype:
            param.sub_(change)
        else:
            self._store(param, param.to(self._opmath).sub_(change), draw.get("param"))

    def _store(self, to: Tensor, values: Tensor, draw: Tensor | None) -> None:
        """Writes, rounded to the storage dtype; values of that dtype are not changed by the rounding."""
        to.copy_(values if draw is None else round_stochastic(values, to.dtype, draw))
