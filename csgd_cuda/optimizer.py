# SPDX-License-Identifier: Apache-2.0
"""CSGD, the optimizer: validates, keeps the state, and makes one operator call per parameter group."""

import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .checks import SUPPORTED_DTYPES, check_options
from .functional import choose_backend
from .state import restore_state
from .step_call import StepCall

_OPTION_NAMES = (
    "lr", "momentum", "dampening", "weight_decay", "nesterov", "calibration", "lipschitz", "bound_decay", "rounding",
    "seed",
)  # fmt: skip


class CSGD(Optimizer):
    """Calibrated Stochastic Gradient Descent: torch.optim.SGD whose update is a random, unbiased, sparse one.

    A coordinate with SGD direction d moves with probability p = min(1, |d| / (c * l)), rounded up to a multiple
    of 2^-16, and then by d / p: the mean of the updated variable is that of SGD, exactly, while only a share of
    the coordinates moves. l bounds |d|: a running maximum over the parameter tensor, or a fixed number.

    Args:
        params: parameters, or dicts of parameter groups, as for torch.optim.SGD. float32, float64, bfloat16,
            float16; every option may differ from group to group.
        lr: learning rate, a number or a tensor with one element.
        momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        calibration: c >= 0. 0 is plain SGD; with larger c fewer coordinates move, with a larger variance.
        lipschitz: the Lipschitz constant, if it is known; None estimates it from the directions seen.
        bound_decay: beta in [0, 1]: each step the estimate l becomes max(beta * l, max |d|).
        rounding: "stochastic" (unbiased) or "nearest", of what is stored in bfloat16 and float16.
        seed: 0 ... 2^64 - 1. Equal seeds and gradients give equal bits, on any backend and number of threads.
        foreach, capturable: accepted for compatibility; there is one implementation, and its state is always on
            the parameter's device.
        differentiable: must be False.
        fused: None takes the C++/CUDA kernel where there is one, else pure PyTorch; True demands the kernel; False
            takes pure PyTorch.

    State per parameter: ``momentum_buffer`` (with momentum), ``step`` (int64), ``lipschitz_bound`` (float32, or
    float64 for a float64 parameter; not with a fixed constant).

    Raises:
        ValueError, TypeError: an option or a parameter is out of range; the message names it.
        RuntimeError: ``fused=True`` cannot be had; the message says why.

    Source: Zhuo et al., "Calibrated Stochastic Gradient Descent for Convolutional Neural Networks", AAAI 2019; the
    formulation is ours (docs/algorithm.md).
    """

    # torch.amp.GradScaler then leaves the unscaling and the skipping to step().
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params,
        lr=1e-3,
        momentum=0,
        dampening=0,
        weight_decay=0,
        nesterov=False,
        *,
        calibration=1.0,
        lipschitz=None,
        bound_decay=0.99,
        rounding="stochastic",
        seed=0,
        maximize=False,
        foreach=None,
        differentiable=False,
        fused=None,
        capturable=False,
    ):
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
        }
        _check_group(defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state):
        checkpoint = self.__dict__.get("_checkpoint")
        if checkpoint is not None:  # called by load_state_dict, which has cast what must not be cast
            state = {**state, "state": restore_state(checkpoint, state["param_groups"])}
        super().__setstate__(state)
        for group in self.param_groups:  # of a torch.optim.SGD, or of an older CSGD
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict):
        """Loads a state_dict of CSGD, bit for bit in every dtype, or one of torch.optim.SGD.

        After the state of a torch.optim.SGD, the next step is exact SGD with its momentum: the bound starts at 0.

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

    def add_param_group(self, param_group):
        """Adds a parameter group, as torch.optim.SGD does; on an error nothing is added."""
        if isinstance(param_group, dict):
            _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            self._check_params(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_params(self, group):
        first = sum(len(g["params"]) for g in self.param_groups[:-1])
        for index, param in enumerate(group["params"], start=first):
            if is_traceable_wrapper_subclass(param):  # DTensor, for one: its shards would draw the same bits
                raise TypeError(
                    f"parameter {index} is a {type(param).__name__}; CSGD supports plain tensors only, "
                    "not yet sharded or wrapped ones"
                )
            if param.is_complex():
                raise TypeError(
                    f"parameter {index} is complex ({param.dtype}); CSGD does not support complex parameters: "
                    "pass torch.view_as_real(parameter) instead"
                )
            if param.dtype not in SUPPORTED_DTYPES:
                raise TypeError(
                    f"parameter {index} has dtype {param.dtype}; CSGD supports float32, float64, bfloat16 and float16"
                )
            choose_backend(param.device, group["fused"])

    @torch.no_grad()
    def step(self, closure=None):
        """Steps every parameter that has a gradient.

        Args:
            closure: a function that evaluates the model again and returns the loss.

        Returns:
            The closure's result, or None.

        Raises:
            ValueError, TypeError: something is wrong with a parameter, a gradient, an option or the state; the
                message names it, and nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls = self._calls()
        if len(calls) > 1:  # a later call must not find an error after an earlier one has stepped
            for call in calls:
                call.check()
        for call in calls:
            call.run()
            for param, new in call.new_state():
                self.state[param].update(new)
        return loss

    def _calls(self):
        """The operator calls of one step: one per group, more where a group spans devices."""
        calls, index = [], 0
        for group in self.param_groups:
            by_kind = {}
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state.get(param) or {}
                    fresh = group["momentum"] != 0 and bool(state) and state.get("momentum_buffer") is None
                    kind = (param.device, fresh)
                    if kind not in by_kind:
                        by_kind[kind] = self._new_call(group, *kind)
                    by_kind[kind].add(param, index, state)
                index += 1
            calls.extend(by_kind.values())
        return calls

    def _new_call(self, group, device, fresh_momentum):
        def on_device(name):  # set by torch.amp.GradScaler
            tensor = getattr(self, name, None)
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return StepCall(
            group,
            device,
            fresh_momentum=fresh_momentum,
            grad_scale=on_device("grad_scale"),
            found_inf=on_device("found_inf"),
            moved=self._moved_counts(device),
        )

    def _moved_counts(self, device):
        """The moved coordinates of each parameter index on this device; -1 before its first step."""
        counts = self.__dict__.setdefault("_moved", {})
        size = sum(len(group["params"]) for group in self.param_groups)
        old = counts.get(device)
        if old is None or old.numel() < size:
            counts[device] = torch.full((size,), -1, dtype=torch.int64, device=device)
            if old is not None:
                counts[device][: old.numel()] = old
        return counts[device]

    def density(self):
        """The share of coordinates that moved in each parameter's last applied step.

        Waits for the device, once per device. Not part of the state: NaN until a parameter has been stepped, and
        for empty parameters.

        Returns:
            A list of floats in [0, 1], one for each parameter over all groups.
        """
        counts = {device: moved.tolist() for device, moved in self.__dict__.get("_moved", {}).items()}
        shares = []
        for index, param in enumerate(p for group in self.param_groups for p in group["params"]):
            of_device = counts.get(param.device, ())
            moved = of_device[index] if index < len(of_device) else -1
            shares.append(moved / param.numel() if moved >= 0 and param.numel() else float("nan"))
        return shares

    def backend(self):
        """The backend that the next step takes: "cpu kernel", "cuda kernel", "reference", or several."""
        names = {
            choose_backend(param.device, group["fused"]).name
            for group in self.param_groups
            for param in group["params"]
        }
        return ", ".join(sorted(names))


def _check_group(group):
    """Checks the options of a group; turns a weight decay given as a tensor into a number, as torch allows it."""
    if isinstance(group["weight_decay"], torch.Tensor):
        group["weight_decay"] = group["weight_decay"].item()
    check_options(**{name: group[name] for name in _OPTION_NAMES})
    if group["differentiable"]:
        raise ValueError("differentiable=True is not supported: CSGD steps in place, outside autograd")
    if group["fused"] and group["foreach"]:
        raise ValueError("fused and foreach cannot both be True")
