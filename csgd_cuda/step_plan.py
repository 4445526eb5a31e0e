# SPDX-License-Identifier: Apache-2.0
"""The operator calls of an optimizer step, kept for the next step as long as they hold."""

from __future__ import annotations

import torch
from torch import Tensor

from .aliases import Group, SharedArguments, State
from .options import index_ranges
from .sparsity import check_all_thresholding, drop_masks, has_masks, is_due, steps_pruned, threshold_group
from .step_call import StepCall, same


class StepPlan:
    """One call for each parameter group, more where a group spans devices or is pruned in part.

    Raises:
        ValueError, TypeError: an option is out of range.
    """

    def __init__(self, param_groups: list[Group], state: State) -> None:
        self._groups = list(param_groups)
        self._params = [list(group["params"]) for group in param_groups]
        self._without_grad: list[Tensor] = []
        self._calls: list[StepCall] = []
        self._first_indices = [group["first_index"] for group in param_groups]
        self._have_masks: list[bool] | None = None  # of the groups, when masks were dropped last
        position = 0
        for group, indices in zip(param_groups, index_ranges(param_groups), strict=True):
            calls: dict[tuple[torch.device, bool, bool], StepCall] = {}
            for param, index in zip(group["params"], indices, strict=True):
                if param.grad is None:
                    self._without_grad.append(param)
                else:
                    own = state.get(param) or {}
                    fresh_momentum = group["momentum"] != 0 and bool(own) and own.get("momentum_buffer") is None
                    kind = (param.device, fresh_momentum, steps_pruned(param, group))
                    if kind not in calls:
                        calls[kind] = StepCall(group, *kind, position)
                    calls[kind].add(param, index, own)
                position += 1
            self._calls.extend(calls.values())

    def makes_state(self) -> bool:
        """Whether it makes state that parameters lack: such a plan is good for one step."""
        return any(call.makes_state() for call in self._calls)

    def renew(self, param_groups: list[Group], state: State) -> bool:
        """Takes the gradients, state and options of another step.

        Returns:
            False where something else has changed: groups, parameters, or which of them have gradients and state.
        """
        return (
            same(param_groups, self._groups)
            and [group["first_index"] for group in param_groups] == self._first_indices
            and all(same(group["params"], params) for group, params in zip(param_groups, self._params, strict=True))
            and all(param.grad is None for param in self._without_grad)
            and all(call.renew(state) for call in self._calls)
        )

    def run(self, state: State, shared: SharedArguments) -> None:
        """Makes the step and keeps in ``state`` what parameters lacked there.

        ``shared(device, position)``: the operator's arguments that belong to the whole optimizer, for parameters
        on ``device`` from that at ``position`` over all groups on.

        Raises:
            ValueError, TypeError: something is wrong with a tensor or an option; nothing was changed.
        """
        sparse = [group for group in self._groups if group["sparsity"]]
        if sparse:
            check_all_thresholding(self._groups, state)
        if len(self._calls) > 1:  # a later call must not find an error after an earlier one has stepped
            for call in self._calls:
                call.check(shared)
        for call in self._calls:
            for param, new in call.run(shared):
                state[param].update(new)
        for group in sparse:
            group["threshold_step"] += 1
            histograms: dict[torch.device, Tensor] = {}
            for call in self._calls:
                histograms |= call.take_histograms(group)
            selects = is_due(group, group["threshold_step"])
            threshold_group(group, state, shared, selects=selects, histograms=histograms)
        if sparse:
            for call in self._calls:
                call.keep_option_values()
        have_masks = [has_masks(group) for group in self._groups]
        if have_masks != self._have_masks:
            drop_masks(self._groups, state)
            self._have_masks = have_masks
