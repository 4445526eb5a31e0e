# SPDX-License-Identifier: Apache-2.0
"""CalibratedOptimizer: all that the calibrated optimizers have in common, whatever their direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .. import extension
from ..distributed.bounds import WholeBounds
from ..distributed.shards import check_plain, is_dtensor
from ..pruning import groups
from ..pruning.options import check_pruning, keep_pruning
from ..reference.checks import check_dtype
from ..tensors import Group, lasting_tensors
from . import diagnostics
from .direction import Direction
from .draws import note_draws
from .options import check_group, complete_group, index_ranges
from .plan import StepPlan
from .state import restore_state
from .state_only import only_get_state

_Loss = TypeVar("_Loss")


class CalibratedOptimizer(Optimizer):
    """An optimizer whose update is a random, unbiased, sparse estimate of that of a direction.

    A subclass names its ``direction`` and has a constructor with that one's options. Per parameter the state holds the
    direction's buffers, ``step`` and ``lipschitz_bound``.
    """

    direction: ClassVar[Direction]

    # Whether torch.amp.GradScaler leaves the unscaling and the skipping to step(). As in torch.optim.SGD only with
    # fused=True: whatever runs between backward and step, a hook that clips for one, expects unscaled gradients.
    _step_supports_amp_scaling = False

    _is_copy = False  # of an optimizer whose draws it is meant to repeat

    def __init__(self, params: ParamsT, options: Group) -> None:
        """``options``: the defaults of the parameter groups, all those of the direction's table and of pruning."""
        self._check_new_group(options)
        self._tallies = diagnostics.Tallies()
        self._begin()
        self._step_supports_amp_scaling = bool(options["fused"])
        super().__init__(params, options)

    def _begin(self) -> None:
        """Makes the attributes that are not part of the state: for a new optimizer, for a copy, and after a checkpoint
        was loaded. The tallies alone stay when one is loaded: they are those of the last step that was made here."""
        self._pruning = groups.Pruning(self.direction.buffers_for)
        self._bounds = WholeBounds()
        self._plan: StepPlan | None = None  # of the last step

    def _check_new_group(self, group: Group) -> None:
        check_group(self.direction.options, group)
        check_pruning(group)
        self.direction.check_new_group(group)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a parameter group, as torch.optim.SGD does.

        Raises:
            ValueError, TypeError, RuntimeError: as the constructor; nothing was added.
        """
        if isinstance(param_group, dict):
            self._check_new_group({**self.defaults, **param_group})
            first = self.defaults["first_index"]
            if first is not None:  # groups without a first_index continue from the optimizer's
                param_group.setdefault("first_index", first + sum(len(g["params"]) for g in self.param_groups))
        super().add_param_group(param_group)
        try:
            index_ranges(self.param_groups)
            self._check_params(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        self._bounds.params_changed()
        self._plan = None

    def _check_params(self, group: Group) -> None:
        first = sum(len(g["params"]) for g in self.param_groups[:-1])
        groups.check_group(group, {}, first)
        seen = set()
        for index, param in enumerate(group["params"], start=first):
            if param in seen:
                raise ValueError(f"parameter {index} is given twice in one group; its state can count only one of them")
            seen.add(param)
            if not param.requires_grad:  # frozen: quantized weights for one. If it gets a gradient, the step checks it
                continue
            check_plain(param, index)
            check_dtype(param, index)
            if param.device.type != "meta":  # which may be materialised before the first step; the step checks again
                extension.takes_kernel(param.device, group["fused"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...

    def step(self, closure: Callable[[], _Loss] | None = None) -> _Loss | None:
        """Steps every parameter that has a gradient.

        Args:
            closure: a function that evaluates the model again and returns the loss.

        Returns:
            The closure's result, or None.

        Raises:
            ValueError, TypeError: something is wrong with a parameter, a gradient, an option or the state; the
                message names it, and nothing was changed.
            RuntimeError: ``fused=True`` cannot be had any more, for parameters that were moved to another device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling() and (self._has_dtensors() or self._pruning.is_on(self.param_groups)):
            self._make_step_uncompiled()
        else:
            self._make_step()
        return loss

    def _make_step(self) -> None:
        grad_mode = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # torch.no_grad() takes five times as long, a tenth of a small tensor's step
        try:
            self._bounds.finish()
            if self._pruning.is_on(self.param_groups):
                idle = self._find_idle(self._plan)
                with self._pruning.around_step(self.param_groups, self.state, self._found_inf, idle):
                    self._run_plan(idle)
            else:
                self._run_plan()
                self._pruning.forget_masks(self.param_groups, self.state)
            self._bounds.start(self.state)
        finally:
            torch._C._set_grad_enabled(grad_mode)

    # A compiled graph can contain neither DTensors nor what the processes exchange between steps. Pruning counts its
    # steps in Python: each would be compiled anew.
    _make_step_uncompiled = _disable_dynamo(_make_step)

    def _find_idle(self, plan: StepPlan | None) -> set[Tensor]:
        """The parameters for which this step only makes the state; none where the last step's ``plan`` still holds."""
        if torch.compiler.is_compiling():
            return set()
        if plan is None:
            self._find_bounds()
        return only_get_state(self.param_groups, self.state, reads_steps=plan is None)

    def _run_plan(self, idle: set[Tensor] | None = None) -> None:
        """Makes the step by the last step's plan where that still holds, else by a new one.

        Args:
            idle: the parameters that only get their state, where that is already known.
        """
        plan = None
        # torch.compile traces a plan for the graph, and that of torch 2.11 can set no attribute of an optimizer.
        if not torch.compiler.is_compiling():
            plan, self._plan = self._plan, None
        if plan is not None and plan.renew(self.param_groups, self.state):
            try:
                plan.run(self.state, self._scaler_arguments)
                self._plan = plan
                return
            except (ValueError, TypeError):
                if self._has_dtensors():  # the gradients may have been exchanged; other ranks do not repeat that
                    raise
                # Nothing was changed. A new plan succeeds (parameters moved to another device) or raises the error
                # that names the cause.
        idle = self._find_idle(plan) if idle is None else idle
        if plan is not None:
            self._find_bounds()
        plan = StepPlan(self.direction, self.param_groups, self.state, idle, self._tallies)
        if not (self._is_copy or torch.compiler.is_compiling()):
            note_draws(self, plan.drawn())
        plan.run(self.state, self._scaler_arguments)
        if not plan.makes_state() and not torch.compiler.is_compiling():
            self._plan = plan

    def _find_bounds(self) -> None:
        """Before a new plan checks anything: if one rank alone raised an error, the others would wait for it."""
        if not torch.compiler.is_compiling():
            self._bounds.find(self)

    def _scaler_arguments(self, device: torch.device) -> dict[str, Tensor | None]:
        return {"grad_scale": self._on_device("grad_scale", device), "found_inf": self._found_inf(device)}

    def _found_inf(self, device: torch.device) -> Tensor | None:
        return self._on_device("found_inf", device)

    def _on_device(self, name: str, device: torch.device) -> Tensor | None:
        tensor: Tensor | None = getattr(self, name, None)  # set by torch.amp.GradScaler
        # To a CPU the copy must be over before the value is read there.
        return None if tensor is None else tensor.to(device, non_blocking=device.type != "cpu")

    def _has_dtensors(self) -> bool:
        return any(is_dtensor(param) for group in self.param_groups for param in group["params"])

    def state_dict(self) -> dict[str, Any]:
        """The state and the options, as torch.optim.SGD's; of DTensors with the bounds of the whole parameters."""
        self._bounds.finish()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class, bit for bit in every dtype, or one of torch's optimizer of this direction,
        whose buffers are rounded to nearest where they are of another dtype than ours.

        Options that torch's optimizer does not have, and how it runs (fused, foreach, differentiable), stay this
        optimizer's own. So do the options of pruning where the checkpoint's group is not pruned. The next step is that
        of the plain optimizer with the loaded buffers, since the bound starts at 0; with a fixed Lipschitz constant it
        is calibrated at once.

        Raises:
            ValueError: the groups or the shapes do not fit this optimizer's parameters, or the checkpoint is one of
                another optimizer; nothing was changed.
        """
        # The last of the pre-hooks gets the dict as it is loaded, before torch casts its tensors.
        handle = self.register_load_state_dict_pre_hook(
            lambda _, final: self.__dict__.__setitem__("_checkpoint", final)
        )
        try:
            with lasting_tensors():
                super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_checkpoint", None)

    def __getstate__(self) -> dict[str, Any]:
        self._bounds.finish()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        checkpoint = self.__dict__.get("_checkpoint")
        if checkpoint is not None:  # called by load_state_dict, which has cast what must not be cast
            for new, own in zip(state["param_groups"], self.param_groups, strict=True):
                self.direction.check_loaded_group(new)
                keep_pruning(new, own)
                complete_group(new, own)
            restored = restore_state(checkpoint, state["param_groups"], state["state"], self.direction)
            state = {**state, "state": restored}
        super().__setstate__(state)
        if checkpoint is None:  # a copy, to which torch gives no other attributes
            self._step_supports_amp_scaling = bool(self.defaults["fused"])
            self._tallies = diagnostics.Tallies()
            self._is_copy = True
        self._begin()
        # A pickle of an older version lacks the newer options, in its defaults as well.
        complete_group(self.defaults, {name: option.default for name, option in self.direction.options.items()})
        for group in self.param_groups:
            complete_group(group, self.defaults)

    @torch.no_grad()
    def threshold(self) -> None:
        """Drops what the groups' sparsity now drops, as a step that is due: before a pruned model is saved or measured.

        Between the steps that are due, and with ``regrow``, dropped weights move. Groups with sparsity 0 stay.

        Raises:
            ValueError, TypeError: an option or a parameter to which it does not apply; nothing was changed.
        """
        self._pruning.threshold(self.param_groups, self.state, self._found_inf)

    def density(self) -> dict[str | int, float]:
        """The share of coordinates that moved in each parameter's last applied step.

        Waits for the device, once per device. Not part of the state: it is of the last step that this optimizer has
        made. Of a DTensor it is the share of what this process holds.

        Returns:
            ``{name: share in [0, 1]}``, in the order of the parameters over all groups; the position in it takes the
            place of the name where the optimizer was not made from ``named_parameters()``. Without parameters that have
            made no step yet, are empty, or are on the device meta.
        """
        return self._tallies.density(self.param_groups)

    def overall_density(self) -> float | None:
        """The share of coordinates that moved over all parameters of ``density()`` together; None before a step."""
        return self._tallies.overall_density(self.param_groups)

    def lipschitz_bounds(self) -> dict[str | int, float]:
        """The bound l on ``|d|`` that each parameter's next step takes, in the unit of the gradient.

        It is the group's ``lipschitz`` where that is given, else the running maximum; 0 where there is none yet, and
        such a step is exact SGD. NaN on the device meta. Waits for the device, once for each that holds running maxima.
        Of a DTensor it is the bound of the whole parameter.

        Returns:
            ``{name: number >= 0}``, all parameters, named as in ``density()``.
        """
        self._bounds.finish()
        return diagnostics.lipschitz_bounds(self.param_groups, self.state)

    def backend(self) -> str:
        """The backend that the next step takes: "cpu kernel", "cuda kernel", "reference", or several.

        Raises:
            RuntimeError: a group has ``fused=True``, and there is no kernel for one of its parameters.
        """
        names = {
            extension.backend_name(param.device, group["fused"])
            for group in self.param_groups
            for param in group["params"]
            if param.requires_grad or param.grad is not None
        }
        return ", ".join(sorted(names))
