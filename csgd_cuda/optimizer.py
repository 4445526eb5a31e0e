# SPDX-License-Identifier: Apache-2.0
"""CSGD, the optimizer: validates, keeps the state, and makes one operator call per parameter group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack  # of torch's own dependencies

from .aliases import Group
from .checks import check_dtype, check_plain
from .diagnostics import Diagnostics
from .functional import choose_backend
from .options import check_new_group, complete_group, index_ranges
from .pruning_options import PruningOptions, pruning_defaults
from .sharded import Sharded
from .sparsity import Pruned, check_thresholding
from .state import restore_state
from .step_plan import StepPlan

_Loss = TypeVar("_Loss")


class CSGD(Diagnostics, Pruned, Sharded, Optimizer):
    """Calibrated Stochastic Gradient Descent: torch.optim.SGD whose update is a random, unbiased, sparse one.

    A coordinate with SGD direction d moves with probability ``p = min(1, |d| / (c * l))``, rounded up to a multiple
    of 2^-16, and then by d / p: the mean of the updated variable is that of SGD, exactly, while only a share of
    the coordinates moves. l bounds ``|d|``: a running maximum over the parameter tensor, or a fixed number.

    Args:
        params: parameters, or dicts of parameter groups, as for torch.optim.SGD. float32, float64, bfloat16,
            float16; every option may differ from group to group. Those without requires_grad may be of any kind as
            long as they have no gradient.
        lr: learning rate, a number or a tensor with one element.
        momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        calibration: c >= 0. 0 is plain SGD; with larger c fewer coordinates move, with a larger variance.
        lipschitz: the Lipschitz constant, if it is known, in the unit of the gradient; None estimates it from the
            directions seen.
        bound_decay: beta in [0, 1]: each step the estimate l becomes ``max(beta * l, max |d|)``.
        rounding: "stochastic" (unbiased) or "nearest", of what is stored in bfloat16 and float16.
        seed: 0 ... 2^64 - 1. Equal seeds and gradients give equal bits, on any backend and number of threads.
        foreach, capturable: accepted for compatibility; there is one implementation, and its state is always on
            the parameter's device.
        first_index: of the first parameter in the random draws, from which all groups count on; in a group, of its own
            first. None: 0. For several optimizers that are to draw as one does, or ones with equal seeds apart.
        differentiable: must be False.
        fused: None takes the C++/CUDA kernel where there is one, else pure PyTorch, with a warning (once per process)
            where the parameters are on a GPU; True demands the kernel, and lets torch.amp.GradScaler leave unscaling
            and skipping to it, as in torch.optim.SGD; False takes pure PyTorch.
        pruning: ``sparsity`` > 0 keeps that share of the weights zero; the options of ``PruningOptions``.

    State per parameter: ``momentum_buffer`` (with momentum; the parameter's shape and dtype), ``step`` (int64, the
    steps applied) and ``lipschitz_bound`` (float32, or float64 for a float64 parameter; not with a fixed constant),
    both without dimensions.

    Raises:
        ValueError, TypeError: an option or a parameter is out of range; the message names it.
        RuntimeError: ``fused=True`` cannot be had; the message says why.

    Source: Zhuo et al., "Calibrated Stochastic Gradient Descent for Convolutional Neural Networks", AAAI 2019; the
    formulation is ours (docs/algorithm.md).
    """

    # Whether torch.amp.GradScaler leaves the unscaling and the skipping to step(). As in torch.optim.SGD only with
    # fused=True: whatever runs between backward and step, a hook that clips for one, expects unscaled gradients.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        calibration: float = 1.0,
        lipschitz: float | None = None,
        bound_decay: float = 0.99,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        first_index: int | None = None,
        **pruning: Unpack[PruningOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "calibration": calibration,
            "lipschitz": lipschitz,
            "bound_decay": bound_decay,
            "rounding": rounding,
            "seed": seed,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "capturable": capturable,
            "first_index": first_index,
            **pruning_defaults(pruning),
        }
        check_new_group(defaults)
        self._tallies_on = {}
        self._plan: StepPlan | None = None  # of the last step
        self._forget_shards()
        self._step_supports_amp_scaling = bool(fused)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        checkpoint = self.__dict__.get("_checkpoint")
        if checkpoint is not None:  # called by load_state_dict, which has cast what must not be cast
            for new, own in zip(state["param_groups"], self.param_groups, strict=True):
                complete_group(new, own)
            state = {**state, "state": restore_state(checkpoint, state["param_groups"], state["state"])}
        super().__setstate__(state)
        if checkpoint is None:  # a copy, to which torch gives no other attributes
            self._step_supports_amp_scaling = bool(self.defaults["fused"])
        self._tallies_on = {}
        self._plan = None
        self._forget_shards()
        for group in self.param_groups:
            complete_group(group, self.defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of CSGD, bit for bit in every dtype, or one of torch.optim.SGD.

        Options that torch.optim.SGD does not have, and how it runs (fused, foreach, differentiable), stay this
        optimizer's own. The next step is exact SGD with its momentum, since the bound starts at 0; with a fixed
        Lipschitz constant it is calibrated at once.

        Raises:
            ValueError: the groups or the shapes do not fit this optimizer's parameters; nothing was changed.
        """
        # The last of the pre-hooks sees the dict as it is loaded, before torch casts its tensors.
        handle = self.register_load_state_dict_pre_hook(
            lambda _, final: self.__dict__.__setitem__("_checkpoint", final)
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_checkpoint", None)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a parameter group, as torch.optim.SGD does.

        Raises:
            ValueError, TypeError, RuntimeError: as the constructor; nothing was added.
        """
        if isinstance(param_group, dict):
            check_new_group({**self.defaults, **param_group})
            first = self.defaults["first_index"]
            if first is not None:  # of the optimizer: its groups count on from it, where they have none of their own
                param_group.setdefault("first_index", first + sum(len(g["params"]) for g in self.param_groups))
        super().add_param_group(param_group)
        try:
            index_ranges(self.param_groups)
            self._check_params(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        self._ranks_agree = False

    def _check_params(self, group: Group) -> None:
        first = sum(len(g["params"]) for g in self.param_groups[:-1])
        check_thresholding(group, {}, first)
        seen = set()
        for index, param in enumerate(group["params"], start=first):
            if param in seen:
                raise ValueError(f"parameter {index} is given twice in one group; its state can count only one of them")
            seen.add(param)
            if not param.requires_grad:  # frozen: quantized weights for one. If it gets a gradient, the step checks it
                continue
            check_plain(param, index)
            check_dtype(param, index)
            if param.device.type != "meta":  # which may be materialised before the first step; the step asks again
                choose_backend(param.device, group["fused"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...

    @torch.no_grad()
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
        if torch.compiler.is_compiling() and (self._has_dtensors() or self._has_sparsity()):
            self._make_step_uncompiled()
        else:
            self._make_step()
        return loss

    def _make_step(self) -> None:
        self._finish_bounds()
        self._run_plan()
        self._start_bounds()

    # What DTensors hold, and what is exchanged of them from step to step, is beyond a compiled graph. Pruning counts
    # its steps in Python: each would be compiled anew.
    _make_step_uncompiled = _disable_dynamo(_make_step)

    def _run_plan(self) -> None:
        """Makes the step by the last step's plan where that still holds, else by a new one."""
        plan, self._plan = self._plan, None
        if plan is not None and plan.renew(self.param_groups, self.state):
            try:
                plan.run(self.state, self._shared_arguments)
                self._plan = plan
                return
            except (ValueError, TypeError):
                if self._has_dtensors():  # the gradients may have been communicated, which the others do not do again
                    raise
                # nothing was changed: a new plan does better (parameters moved to another device) or says why not
        self._find_shards()  # first: what only this rank finds wrong would make the others wait
        plan = StepPlan(self.param_groups, self.state)
        plan.run(self.state, self._shared_arguments)
        if not plan.makes_state() and not torch.compiler.is_compiling():
            self._plan = plan

    def _shared_arguments(self, device: torch.device, position: int) -> dict[str, Tensor | None]:
        """The arguments of an operator call that belong to the whole optimizer; ``position`` of its first parameter."""

        def on_device(name: str) -> Tensor | None:  # set by torch.amp.GradScaler
            tensor = getattr(self, name, None)
            # To a CPU the copy must be over before the value is read there.
            return None if tensor is None else tensor.to(device, non_blocking=device.type != "cpu")

        return {
            "grad_scale": on_device("grad_scale"),
            "found_inf": on_device("found_inf"),
            "tallies": self._tallies(device)[position:],
        }
