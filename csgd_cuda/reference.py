# SPDX-License-Identifier: Apache-2.0
"""The step of Calibrated SGD in pure PyTorch: any device, any torch, the same bits as the kernels.

It is what runs without a compiler, and what the kernels are held against. docs/algorithm.md derives the rule;
csrc/core/update_rule.h is the same rule in C++. Every operation is rounded on its own, hence no ``alpha=``, no
``addcmul``, no ``65536 / tensor`` (which torch computes as a reciprocal and a product).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .aliases import Tensors
from .checks import check_csgd, opmath_dtype
from .philox import CALIBRATION_STREAM, MOMENTUM_STREAM, PARAM_STREAM, draws, draws_at
from .pruned_step import count_first_digits
from .rounding import round_stochastic
from .rows import Rows, memory_order
from .rule import LAYOUTS, calibrated, calibration_scale, largest_size, moves, moving_draws, next_bound, ordered_bits
from .shards import WHOLE, ShardLayout

_T = TypeVar("_T")


def block_elements(device: torch.device) -> int:
    """How many elements are worked on at a time; a multiple of 8."""
    if device.type == "cpu":
        # 256 KB of each temporary to a thread: they stay in its cache, and an operation takes longer than its call.
        # Compiled code cannot ask for the number of threads.
        return 2**16 * (1 if torch.compiler.is_compiling() else torch.get_num_threads())
    return 2**22  # many times as long as a launch takes


@torch.no_grad()
def csgd_(
    params: Tensors, grads: Tensors, momentum_buffers: Tensors, steps: Tensors, lipschitz_bounds: Tensors,
    indices: Sequence[int], shards: Sequence[int], *, lr_tensor: Tensor | None, grad_scale: Tensor | None,
    found_inf: Tensor | None, tallies: Tensor | None, masks: Tensors, histograms: Tensor | None, **options: Any,
) -> None:  # fmt: skip
    """One step of every parameter, in place; the arguments are those of the operator (functional.csgd_)."""
    check_csgd(
        params, grads, momentum_buffers, steps, lipschitz_bounds, indices, shards,
        lr_tensor=lr_tensor, grad_scale=grad_scale, found_inf=found_inf, tallies=tallies, masks=masks,
        histograms=histograms, **options,
    )  # fmt: skip
    if not params:
        return
    if lr_tensor is not None:
        options["lr"] = lr_tensor
    # A tensor, not a bool: reading it here would make the host wait for a GPU.
    apply = None if found_inf is None else found_inf.reshape(()) == 0
    moved = None if tallies is None else tallies[:, 0].unbind()
    size = len(ShardLayout._fields)
    layouts = [ShardLayout(*shards[k * size : (k + 1) * size]) if shards else WHOLE for k in range(len(params))]
    for stack in _stacks(params, layouts):

        def pick(values: Sequence[_T], stack: list[int] = stack) -> list[_T]:
            return [values[k] for k in stack] if values else []

        _StackStep(
            pick(params), pick(grads), pick(momentum_buffers), pick(steps), pick(lipschitz_bounds), pick(indices),
            masks=pick(masks), layout=layouts[stack[0]], grad_scale=grad_scale, apply=apply, options=options,
            tallies=None if moved is None else [moved[indices[k] - indices[0]] for k in stack],
        ).run()  # fmt: skip
    if histograms is not None:
        count_first_digits(params, masks, histograms, apply)


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

    Each is a row of a matrix, so that the many small ones of a network cost the calls of a single one. Of what is a
    number to each parameter there is a column.
    """

    def __init__(
        self, params: Tensors, grads: Tensors, momentum_buffers: Tensors, steps: list[Tensor], bounds: list[Tensor],
        indices: Sequence[int], *, masks: Tensors, layout: ShardLayout, grad_scale: Tensor | None, apply: Tensor | None,
        tallies: list[Tensor] | None, options: dict[str, Any],
    ) -> None:  # fmt: skip
        orders = [memory_order(param) for param in params]
        self.rows = Rows(params, orders)
        self.momentum_rows = Rows(momentum_buffers, orders) if momentum_buffers else None
        self.param = self.rows.matrix
        self.grad = Rows(grads, orders).matrix
        self.mask = Rows(masks, orders).matrix if masks else None
        self.momentum_buffer = None if self.momentum_rows is None else self.momentum_rows.matrix
        self.steps, self.bounds, self.tallies = steps, bounds, tallies
        self.layout, self.apply, self.options = layout, apply, options
        dtype, self.device = self.param.dtype, self.param.device
        self.opmath = opmath_dtype(dtype)
        self.bits = LAYOUTS[self.opmath].integer
        self.rounds = options["rounding"] == "stochastic" and self.opmath != dtype
        self._columns(indices, grad_scale)

    def _columns(self, indices: Sequence[int], grad_scale: Tensor | None) -> None:
        opmath, device, options = self.opmath, self.device, self.options

        def number(value: float | Tensor) -> Tensor:
            if isinstance(value, torch.Tensor):
                return value.to(device=device, dtype=opmath).reshape(())
            return torch.full((), value, dtype=opmath, device=device)

        self.lr = number(options["lr"])
        self.unscale = None if grad_scale is None else number(1.0) / number(grad_scale)
        self.bound = _column(self.bounds) if self.bounds else None
        lipschitz = self.bound if self.bound is not None else number(options["lipschitz"])
        self.scale = calibration_scale(number(options["calibration"]), lipschitz)
        self.step = _column(self.steps)
        first = (self.step == 0) | options["fresh_momentum"]
        # On the first step the momentum buffer takes the gradient: -0 takes the place of the buffer, for -0 + g is g.
        self.keeps_buffer = first.to(self.bits) - 1  # all bits, or none
        self.minus_zero = first.to(self.bits) << LAYOUTS[opmath].sign_place
        self.grad_share = torch.where(first, number(1.0), number(1.0 - options["dampening"]))
        if device.type == "cpu":
            self.index = torch.tensor(indices, device=device).view(-1, 1)
        else:  # torch.tensor would wait for a GPU
            self.index = _column([torch.full((), index, dtype=torch.int64, device=device) for index in indices])

    def run(self) -> None:
        count, length = self.param.shape
        self.largest = torch.zeros((count, 1), dtype=self.bits, device=self.device)
        self.moved = torch.zeros((count, 1), dtype=torch.int64, device=self.device)
        # Draws are made for four blocks: of the words they are made from, int64, these are the same bytes again.
        # With fewer torch would not use its threads.
        at_once = block_elements(self.device) * 4
        for begin in range(0, length, at_once):
            self._step_columns(begin, min(begin + at_once, length))
        self.rows.write_back()
        if self.momentum_rows is not None:
            self.momentum_rows.write_back()
        self._advance()

    def _advance(self) -> None:
        if self.bound is not None:
            new = next_bound(self.bound, self.options["bound_decay"], largest_size(self.largest, self.opmath))
            torch._foreach_copy_(self.bounds, _where(self.apply, new, self.bound).view(-1).unbind())
        new_steps = self.step + (1 if self.apply is None else self.apply)
        torch._foreach_copy_(self.steps, new_steps.view(-1).unbind())
        if self.tallies is not None:
            moved = self.moved if self.apply is None else torch.where(self.apply, self.moved, _column(self.tallies))
            torch._foreach_copy_(self.tallies, moved.view(-1).unbind())

    def _step_columns(self, begin: int, end: int) -> None:
        """Steps the elements begin ... end - 1 of each parameter."""

        positions = None if self.layout == WHOLE else self.layout.positions(begin, end, self.device)

        def make(stream: int) -> Tensor:
            of_rows = {"seed": self.options["seed"], "stream": stream, "index": self.index, "step": self.step}
            if positions is None:
                return draws(begin, end, device=self.device, **of_rows)
            return draws_at(positions, **of_rows)

        calibration = make(CALIBRATION_STREAM)
        param = make(PARAM_STREAM) if self.rounds else None
        momentum = make(MOMENTUM_STREAM) if self.rounds and self.momentum_buffer is not None else None
        block = block_elements(self.device)
        for first in range(begin, end, block):
            part = slice(first - begin, min(first + block, end) - begin)
            self._step_block(
                slice(first, min(first + block, end)),
                calibration[..., part],
                None if param is None else param[..., part],
                None if momentum is None else momentum[..., part],
            )

    def _direction(self, grad: Tensor, param: Tensor, momentum_buffer: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The direction of plain SGD and the new momentum buffer (None without momentum), both unrounded."""
        options = self.options
        g = grad.to(self.opmath)
        if self.unscale is not None:
            g = g * self.unscale
        if options["maximize"]:
            g = -g
        if options["weight_decay"] != 0:
            g = g + param.to(self.opmath) * options["weight_decay"]
        if momentum_buffer is None:
            return g, None
        new = momentum_buffer.to(self.opmath) * options["momentum"]
        new.view(self.bits).bitwise_and_(self.keeps_buffer).bitwise_or_(self.minus_zero)
        new += g if options["dampening"] == 0 else g * self.grad_share
        return (g + new * options["momentum"] if options["nesterov"] else new), new

    def _step_block(
        self, columns: slice, draw: Tensor, param_draw: Tensor | None, momentum_draw: Tensor | None
    ) -> None:
        """Steps the elements of the slice ``columns``; notes max |d| over the finite ones and how many moved."""
        param = self.param[:, columns]
        momentum_buffer = None if self.momentum_buffer is None else self.momentum_buffer[:, columns]
        grad = self.grad[:, columns]
        if self.mask is not None:
            grad = grad.masked_fill(~self.mask[:, columns], 0.0)
        d, new_momentum = self._direction(grad, param, momentum_buffer)
        size = d.abs()
        n = moving_draws(size, self.scale)
        self.largest = torch.maximum(self.largest, ordered_bits(size).amax(1, keepdim=True))
        move = moves(draw, n)
        if self.apply is not None:
            move *= self.apply
            if momentum_buffer is not None and new_momentum is not None:  # both or neither
                new_momentum = torch.where(self.apply, new_momentum, momentum_buffer.to(self.opmath))
        self.moved -= move.sum(1, keepdim=True, dtype=self.bits)
        if momentum_buffer is not None and new_momentum is not None:
            self._store(momentum_buffer, new_momentum, momentum_draw)
        change = calibrated(d, n).mul_(self.lr)
        change.view(self.bits).bitwise_and_(move)  # else +0, and x - 0 is x, whatever x is
        if self.opmath == param.dtype:
            param.sub_(change)
        else:
            self._store(param, param.to(self.opmath).sub_(change), param_draw)

    def _store(self, to: Tensor, values: Tensor, draw: Tensor | None) -> None:
        """Writes, rounded to the storage dtype; what that can hold is not changed by the rounding."""
        to.copy_(values if draw is None else round_stochastic(values, to.dtype, draw))
