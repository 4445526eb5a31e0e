# SPDX-License-Identifier: Apache-2.0
"""What a step of twins has to refuse: all of them with the same error, and with nothing changed."""

from dataclasses import dataclass

import torch

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import STATE_NAMES


class _Attributes:
    """A parameter's ``data`` and ``grad`` as entries of a dict."""

    def __init__(self, param):
        self._param = param

    def get(self, name):
        return getattr(self._param, name)

    __getitem__ = get

    def __setitem__(self, name, tensor):
        setattr(self._param, name, tensor)


@dataclass(frozen=True)
class Mishap:
    """``what`` ("data", "grad", an entry of the state or of the scaler) becomes ``wrong(what it was)``."""

    name: str
    what: str
    wrong: object

    def can_happen(self, twin, k):
        """Whether the parameter's next step uses this, and it can be wrong."""
        param = twin.params[k]
        group = next(group for group in twin.opt.param_groups if any(param is p for p in group["params"]))
        direction = twin.opt.direction
        unused = (self.what in direction.buffers and self.what not in direction.buffers_for(group)) or (
            self.what == "lipschitz_bound" and group["lipschitz"] is not None
        )
        if param.grad is None or unused or (self.wrong is overlapping and param.numel() < 2):
            return False
        return self._place(twin, k).get(self.what) is not None

    def _place(self, twin, k):
        if self.what in STATE_NAMES:
            return twin.opt.state.get(twin.params[k], {})
        return twin.scaler if self.what in ("grad_scale", "found_inf") else _Attributes(twin.params[k])

    def step(self, twin, k):
        place = self._place(twin, k)
        right = place[self.what]
        place[self.what] = self.wrong(right)
        try:
            twin.step(guarded=False)
        finally:
            place[self.what] = right


def overlapping(tensor):
    return tensor.new_ones(()).expand(tensor.shape)


def of_another_dtype(tensor):
    return tensor.to(torch.float16 if tensor.dtype is torch.float64 else torch.float64)


def of_another_shape(tensor):
    return tensor.new_ones(tensor.numel() + 2)


def gone(tensor):
    return None


_MISHAPS = [
    Mishap("parameter overlaps itself", "data", overlapping),
    Mishap("parameter moved, gradient not", "data", of_another_dtype),
    Mishap("sparse gradient", "grad", torch.Tensor.to_sparse),
    *(
        Mishap(f"{what} {wrong.__name__}", what, wrong)
        for what in ("step", "lipschitz_bound", "grad_scale", "found_inf")
        for wrong in (of_another_dtype, of_another_shape)
    ),
]


def _to(names, *wrongs):
    """Mishaps to entries of the state."""
    return [Mishap(f"{name} {wrong.__name__}", name, wrong) for name in names for wrong in wrongs]


_TO_BUFFERS = (of_another_dtype, of_another_shape, overlapping)
MISHAPS = {
    CSGD: [*_MISHAPS, *_to(["momentum_buffer"], *_TO_BUFFERS)],
    CalibratedAdamW: [*_MISHAPS, *_to(["exp_avg", "exp_avg_sq"], *_TO_BUFFERS, gone), *_to(["step"], gone)],
}

_BAD_GROUPS = [
    {"weight_decay": -0.1}, {"lr": -0.1}, {"lr": torch.tensor(-0.1)}, {"lr": float("nan")}, {"rounding": "down"},
]  # fmt: skip
BAD_GROUPS = {
    CSGD: [
        {"momentum": -1}, {"nesterov": True, "momentum": 0}, {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
        *_BAD_GROUPS,
    ],
    CalibratedAdamW: [{"betas": (0.9, 1.0)}, {"eps": -1.0}, {"decoupled_weight_decay": False}, *_BAD_GROUPS],
}  # fmt: skip


def without_a_group(state_dict, direction):
    state_dict["param_groups"].pop()


def without_a_parameter(state_dict, direction):
    state_dict["param_groups"][0]["params"].pop()


def of_another_optimizer(state_dict, direction):
    for name in ("momentum", "betas"):
        state_dict["param_groups"][-1].pop(name, None)


def _last_state(state_dict):
    return state_dict["state"].setdefault(state_dict["param_groups"][-1]["params"][-1], {})


def with_wrong_buffers(state_dict, direction):
    _last_state(state_dict).update({name: torch.ones(2, 3, 1, 2) for name in direction.buffers}, step=torch.tensor(1))


def with_incomplete_state(state_dict, direction):
    state = _last_state(state_dict)
    state.setdefault("step", torch.tensor(1))
    state.pop(direction.buffers[0], None)


_BAD_LOADS = [without_a_group, without_a_parameter, of_another_optimizer, with_wrong_buffers]
# CSGD goes on without a momentum buffer.
BAD_LOADS = {CSGD: _BAD_LOADS, CalibratedAdamW: [*_BAD_LOADS, with_incomplete_state]}
