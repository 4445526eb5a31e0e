# SPDX-License-Identifier: Apache-2.0
"""What a step of twins has to refuse: all of them with the same error, and with nothing changed."""

from dataclasses import dataclass

import torch

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
        unused = (self.what == "momentum_buffer" and group["momentum"] == 0) or (
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


MISHAPS = [
    Mishap("parameter overlaps itself", "data", overlapping),
    Mishap("parameter moved, gradient not", "data", of_another_dtype),
    Mishap("sparse gradient", "grad", torch.Tensor.to_sparse),
    *(
        Mishap(f"{what} {wrong.__name__}", what, wrong)
        for what in ("momentum_buffer", "step", "lipschitz_bound", "grad_scale", "found_inf")
        for wrong in (of_another_dtype, of_another_shape)
    ),
    Mishap("momentum_buffer overlaps itself", "momentum_buffer", overlapping),
]

BAD_GROUPS = [
    {"momentum": -1}, {"weight_decay": -0.1}, {"lr": -0.1}, {"lr": torch.tensor(-0.1)}, {"lr": float("nan")},
    {"nesterov": True, "momentum": 0}, {"nesterov": True, "momentum": 0.9, "dampening": 0.5}, {"rounding": "down"},
]  # fmt: skip


def without_a_group(state_dict):
    state_dict["param_groups"].pop()


def without_a_parameter(state_dict):
    state_dict["param_groups"][0]["params"].pop()


def with_a_wrong_momentum_buffer(state_dict):
    last = state_dict["param_groups"][-1]["params"][-1]
    state_dict["state"].setdefault(last, {})["momentum_buffer"] = torch.ones(2, 3, 1, 2)


BAD_LOADS = [without_a_group, without_a_parameter, with_a_wrong_momentum_buffer]
