# SPDX-License-Identifier: Apache-2.0
"""One operator call of an optimizer step: the tensors in the operator's lists, and the group's options."""

import torch

from .checks import opmath_dtype
from .functional import choose_backend, operator_options
from .state import new_momentum_buffer


class StepCall:
    """Parameters of one group on one device. State that a parameter lacks is made here, but not yet kept."""

    def __init__(self, group, device, *, fresh_momentum, grad_scale, found_inf, tallies):
        self.group, self.device = group, device
        self.params, self.grads, self.momentum_buffers = [], [], []
        self.steps, self.lipschitz_bounds, self.indices = [], [], []
        self._new_state = []  # (param, what is to be added to its state)
        self._backend = choose_backend(device, group["fused"])
        self._options = {
            **operator_options(group, device),
            "fresh_momentum": fresh_momentum,
            "grad_scale": grad_scale,
            "found_inf": found_inf,
            "tallies": tallies,
        }

    def add(self, param, index, state):
        """Adds a parameter with a gradient; ``index`` is its position over all groups."""
        new = {}

        def get(name, make):
            if state.get(name) is None:
                new[name] = make()
                return new[name]
            return state[name]

        self.params.append(param)
        self.grads.append(param.grad)
        self.indices.append(index)
        self.steps.append(get("step", lambda: torch.zeros((), dtype=torch.int64, device=self.device)))
        if self.group["momentum"] != 0:
            self.momentum_buffers.append(get("momentum_buffer", lambda: new_momentum_buffer(param)))
        if self.group["lipschitz"] is None:
            dtype = opmath_dtype(param.dtype)
            bound = get("lipschitz_bound", lambda: torch.zeros((), dtype=dtype, device=self.device))
            self.lipschitz_bounds.append(bound)
        if new:
            self._new_state.append((param, new))

    def _lists(self):
        return self.params, self.grads, self.momentum_buffers, self.steps, self.lipschitz_bounds, self.indices

    def check(self):
        """Raises what run() would raise; changes nothing."""
        self._backend.check(*self._lists(), **self._options)

    def run(self):
        """Makes the step."""
        self._backend.step(*self._lists(), **self._options)

    def new_state(self):
        """After run(): [(param, what its state now has in addition)]."""
        found_inf = self._options["found_inf"]
        # A momentum buffer made after the first step counts from its first applied step on, and only found_inf
        # knows whether this one was. Rare enough to wait for the answer.
        if self._options["fresh_momentum"] and found_inf is not None and bool(found_inf):
            for _, new in self._new_state:
                new.pop("momentum_buffer", None)
        return self._new_state
