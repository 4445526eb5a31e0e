# SPDX-License-Identifier: Apache-2.0
"""Twins: optimizers over equal parameters that must stay equal bit for bit, with guards around all of their memory."""

import torch

from csgd_cuda.tensors import opmath_dtype

from ..helpers import STATE_NAMES, assert_same_snapshots
from .drawn import TensorOf
from .guarded import Guarded, strides_of


class Twin:
    """An optimizer whose parameters, gradients, state and other tensors lie between guards.

    Args:
        habit: how it steps. "kept": as it is; "new plan": with no plan kept from the step before; "reborn": as a
            fresh optimizer that loads the state of the last one.
    """

    def __init__(self, optimizer_class, fused, habit):
        self.optimizer_class, self.fused, self.habit = optimizer_class, fused, habit
        self.params, self.opt = [], None
        self.guards = {}  # what it is of: Guarded
        self.scaler = {}  # as torch.amp.GradScaler sets them for a step

    def _guard(self, key, values, strides=None, offset=0):
        self.guards[key] = Guarded(values, strides, offset)
        return self.guards[key].view

    def lay_out(self, key, values, layout):
        return self._guard(key, values, strides_of(values.shape, layout), int(layout == "misaligned"))

    def add_group(self, tensors, options):
        """``tensors``: [(values, layout)]"""
        new = []
        for k, (values, layout) in enumerate(tensors, start=len(self.params)):
            new.append(self.lay_out(("param", k), values, layout).requires_grad_())
        group = {"params": new, **options, "fused": self.fused}
        if self.opt is None:
            self.opt = self.optimizer_class([group])
        else:
            self.opt.add_param_group(group)
        self.params += new

    def set_option(self, group, name, value):
        if isinstance(value, TensorOf):
            value = self._guard((name, group), torch.tensor(value.value, dtype=value.dtype))
        self.opt.param_groups[group][name] = value

    def set_data(self, k, values, layout):
        """Another dtype or layout, as Module.to() does it."""
        param = self.params[k]
        grad, param.grad = param.grad, None
        param.data = self.lay_out(("param", k), values, layout)
        if grad is not None:
            self.set_grad(k, grad.to(values.dtype), layout)

    def set_grad(self, k, values, layout):
        self.params[k].grad = self.lay_out(("grad", k), values, layout)

    def set_scaler(self, grad_scale, found_inf):
        numbers = {"grad_scale": grad_scale, "found_inf": found_inf}
        self.scaler = {name: self._guard(name, torch.tensor(n)) for name, n in numbers.items() if n is not None}

    def overflows(self):
        return "found_inf" in self.scaler and bool(self.scaler["found_inf"] != 0)

    def load(self, state_dict, fresh):
        groups = [{"params": group["params"]} for group in self.opt.param_groups]
        opt = self.optimizer_class(groups) if fresh else self.opt
        opt.load_state_dict(state_dict)
        self.opt = opt
        for group in opt.param_groups:  # the checkpoint may be a twin's
            group["fused"] = self.fused

    def guard_state(self):
        """Puts between guards what the optimizer has made since."""

        def guarded(key, tensor):
            known = self.guards.get(key)
            return tensor if known is not None and known.view is tensor else self._guard(key, tensor)

        for k, param in enumerate(self.params):
            state = self.opt.state.get(param, {})
            for name in STATE_NAMES:
                if state.get(name) is not None:
                    state[name] = guarded((name, k), state[name])
        for g, group in enumerate(self.opt.param_groups):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"] = guarded(("lr", g), group["lr"])
        rows = self.opt._tallies.rows_on
        for device, tallies in rows.items():
            rows[device] = guarded("tallies", tallies)

    def step(self, guarded=True):
        """``guarded=False``: with the state as it is, also where it is wrong."""
        if self.habit == "reborn":
            self.load(self.opt.state_dict(), fresh=True)
        elif self.habit == "new plan":
            self.opt._plan = None
        if guarded:
            self.guard_state()
        for name, tensor in self.scaler.items():
            setattr(self.opt, name, tensor)
        try:
            self.opt.step()
        finally:
            for name in self.scaler:
                delattr(self.opt, name)
        self.check_guards()
        self.guard_state()

    def state_in(self, k, dtype):
        """The state of parameter k as it has to be after a move to this dtype."""
        dtypes = {"step": torch.int64, "lipschitz_bound": opmath_dtype(dtype)}
        state = self.opt.state.get(self.params[k], {})
        return [(f"{name} {k}", state[name].to(dtypes.get(name, dtype))) for name in STATE_NAMES if name in state]

    def check_guards(self):
        broken = [key for key, guarded in self.guards.items() if not guarded.intact()]
        assert not broken, f"{self}: written outside of {broken}"

    def tensors(self):
        """Everything that twins share: [(name with dtype, tensor)]"""
        out = []
        for k, param in enumerate(self.params):
            state = self.opt.state.get(param, {})
            named = [("param", param), ("grad", param.grad), *((name, state.get(name)) for name in STATE_NAMES)]
            out.extend((f"{name} {k} {t.dtype}", t) for name, t in named if t is not None)
        return out

    def snapshot(self):
        return [(name, tensor.detach().clone()) for name, tensor in self.tensors()], self.density()

    def density(self):
        """None for the reborn: it is not part of the state."""
        return None if self.habit == "reborn" else self.opt.density()

    def __repr__(self):
        return f"{'kernel' if self.fused else 'reference'} ({self.habit})"


def assert_unchanged(twin, before):
    tensors, density = before
    assert_same_snapshots(twin.tensors(), tensors)
    assert twin.density() == density, twin


def assert_skipped(twin, before):
    """The step overflowed: all is as it was. State it needed may be there now, but of zeros; buffers only where there
    was no state at all, as those that join later have yet to take their first gradient."""
    tensors, density = before
    names = {name for name, _ in tensors}
    assert_same_snapshots([(name, tensor) for name, tensor in twin.tensors() if name in names], tensors)
    for name, tensor in twin.tensors():
        if name not in names:
            what, k, _ = name.split()
            assert not tensor.any(), name
            assert what not in twin.opt.direction.buffers or f"step {k} torch.int64" not in names, name
    assert twin.density() == density, twin


def assert_equal(first, *others):
    tensors, density = first.tensors(), first.density()
    for other in others:
        assert_same_snapshots(tensors, other.tensors())
        assert other.density() in (density, None), other
