# SPDX-License-Identifier: Apache-2.0
"""The step of Calibrated SGD in pure PyTorch: any device, any torch, the same bits as the kernels.

It is what runs without a compiler, and what the kernels are held against. docs/algorithm.md derives the rule;
csrc/core/update_rule.h is the same rule in C++. Every operation is rounded on its own, hence no ``alpha=``, no
``addcmul``, no ``65536 / tensor`` (which torch computes as a reciprocal and a product).
"""

import torch

from .checks import check_csgd, opmath_dtype, separate_elements
from .philox import CALIBRATION_STREAM, DRAW_RANGE, MOMENTUM_STREAM, PARAM_STREAM, draws
from .rounding import round_stochastic

# Elements worked on at a time: a multiple of 8, small enough for the temporaries to stay in a CPU's cache.
BLOCK = 2**15


@torch.no_grad()
def csgd_(
    params, grads, momentum_buffers, steps, lipschitz_bounds, indices, *, lr_tensor, grad_scale, found_inf, tallies,
    **options,
):  # fmt: skip
    """One step of every parameter, in place; the arguments are those of the operator (functional.csgd_)."""
    check_csgd(
        params, grads, momentum_buffers, steps, lipschitz_bounds, indices,
        lr_tensor=lr_tensor, grad_scale=grad_scale, found_inf=found_inf, tallies=tallies, **options,
    )  # fmt: skip
    if lr_tensor is not None:
        options["lr"] = lr_tensor
    # A tensor, not a bool: reading it here would make the host wait for a GPU.
    apply = None if found_inf is None else found_inf.reshape(()) == 0
    for k, param in enumerate(params):
        _TensorStep(
            param,
            grads[k],
            momentum_buffers[k] if momentum_buffers else None,
            steps[k],
            lipschitz_bounds[k] if lipschitz_bounds else None,
            indices[k],
            grad_scale=grad_scale,
            apply=apply,
            moved=None if tallies is None else tallies[indices[k], 0],
            options=options,
        ).run()


def _where(condition, new, old):
    """``new`` where the condition (None: always) holds."""
    return new if condition is None else torch.where(condition, new, old)


def _is_dense(tensor):
    """True where the elements fill one stretch of memory, in whatever order."""
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == 0 or (reach + 1 == tensor.numel() and separate_elements(tensor))


def _same_memory_order(a, b):
    return all(s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1)


def _flat(tensor):
    """A dense tensor as one dimension, in memory order."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


class _TensorStep:
    """One step of one parameter, block by block over its memory."""

    def __init__(self, param, grad, momentum_buffer, step, bound, index, *, grad_scale, apply, moved, options):
        self.copies_back = []
        dense = param if _is_dense(param) else param.contiguous()  # else it counts in row-major order
        if dense is not param:
            self.copies_back.append((param, dense))
        self.param = _flat(dense)
        self.grad = self._laid_out(grad, dense, changed=False)
        self.momentum_buffer = None if momentum_buffer is None else self._laid_out(momentum_buffer, dense, changed=True)
        self.step, self.bound, self.index = step, bound, index
        self.apply, self.moved, self.options = apply, moved, options
        self.opmath = opmath_dtype(param.dtype)
        self.rounds = options["rounding"] == "stochastic" and self.opmath != param.dtype
        self._scalars(grad_scale)

    def _laid_out(self, tensor, like, *, changed):
        """``tensor`` flat in the memory order of ``like``: itself where it lies so, else a copy."""
        if not tensor.numel() or _same_memory_order(tensor, like):
            return _flat(tensor)
        copy = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device)
        copy.copy_(tensor)
        if changed:
            self.copies_back.append((tensor, copy))
        return _flat(copy)

    def _scalars(self, grad_scale):
        opmath, device, options = self.opmath, self.param.device, self.options

        def scalar(value):
            if isinstance(value, torch.Tensor):
                return value.to(device=device, dtype=opmath).reshape(())
            return torch.full((), value, dtype=opmath, device=device)  # torch.tensor would wait for a GPU

        self.lr = scalar(options["lr"])
        self.unscale = None if grad_scale is None else scalar(1.0) / scalar(grad_scale)
        self.draw_range = scalar(float(DRAW_RANGE))
        lipschitz = self.bound.reshape(()) if self.bound is not None else scalar(options["lipschitz"])
        bound = scalar(options["calibration"]) * lipschitz
        self.scale = torch.where(bound > 0, self.draw_range / bound, torch.inf)
        self.first = (self.step.reshape(()) == 0) | options["fresh_momentum"]

    def run(self):
        largest = torch.zeros((), dtype=self.opmath, device=self.param.device)
        moved = torch.zeros((), dtype=torch.int64, device=self.param.device)
        for begin in range(0, self.param.numel(), BLOCK):
            block_largest, block_moved = self._step_block(begin, min(begin + BLOCK, self.param.numel()))
            largest = torch.maximum(largest, block_largest)
            moved += block_moved
        for tensor, copy in self.copies_back:
            tensor.copy_(copy)
        self._advance(largest, moved)

    def _advance(self, largest, moved):
        if self.bound is not None:
            new = torch.maximum(self.bound * self.options["bound_decay"], largest)
            self.bound.copy_(_where(self.apply, new, self.bound))
        self.step.add_(1 if self.apply is None else self.apply.to(torch.int64))
        if self.moved is not None:
            self.moved.copy_(_where(self.apply, moved, self.moved))

    def _draws(self, begin, end, stream):
        return draws(
            begin, end, seed=self.options["seed"], stream=stream, index=self.index, step=self.step,
            device=self.param.device,
        )  # fmt: skip

    def _direction(self, grad, param, momentum_buffer):
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
        new += g * (1.0 - options["dampening"])
        new = torch.where(self.first, g, new)
        return (g + new * options["momentum"] if options["nesterov"] else new), new

    def _moving_draws(self, size):
        """n for |d| = size: how many of the 2^16 draws move the coordinate, as opmath."""
        n = (size * self.scale).ceil_().clamp_(max=float(DRAW_RANGE)).nan_to_num_(nan=float(DRAW_RANGE))
        return torch.maximum(n, (size != 0).to(self.opmath))

    def _store(self, to, values, mask, begin, end, stream):
        """Rounds to the storage dtype and writes, where the mask (None: everywhere) says so."""
        if self.rounds:
            values = round_stochastic(values, to.dtype, self._draws(begin, end, stream))
        to.copy_(_where(mask, values.to(to.dtype), to))

    def _step_block(self, begin, end):
        """Steps the elements begin ... end - 1; returns max |d| over the finite ones and how many moved."""
        param = self.param[begin:end]
        momentum_buffer = None if self.momentum_buffer is None else self.momentum_buffer[begin:end]
        d, new_momentum = self._direction(self.grad[begin:end], param, momentum_buffer)
        size = d.abs()
        n = self._moving_draws(size)
        move = self._draws(begin, end, CALIBRATION_STREAM).to(self.opmath) < n
        if self.apply is not None:
            move &= self.apply
        if momentum_buffer is not None:
            self._store(momentum_buffer, new_momentum, self.apply, begin, end, MOMENTUM_STREAM)
        moved_values = param.to(self.opmath) - (self.draw_range / n * d).mul_(self.lr)
        self._store(param, moved_values, move, begin, end, PARAM_STREAM)
        return torch.where(size < torch.inf, size, 0.0).max(), move.sum()
