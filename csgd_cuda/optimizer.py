# SPDX-License-Identifier: Apache-2.0
"""CSGD, the optimizer: validates, keeps the state, and makes one operator call per parameter group."""

import operator

import torch
from torch.optim import Optimizer

from .checks import SUPPORTED_DTYPES, check_options, opmath_dtype
from .functional import choose_backend, split_lr
from .state import new_momentum_buffer, restore_state

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
            self._keep_state(call)
        return loss

    def _calls(self):
        """The operator calls of one step: one per group, more where a group spans devices."""
        calls, index = [], 0
        for group in self.param_groups:
            buckets = {}
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state.get(param) or {}
                    fresh = group["momentum"] != 0 and bool(state) and state.get("momentum_buffer") is None
                    bucket = buckets.setdefault((param.device, fresh), _Bucket())
                    bucket.add(param, index, state, group)
                index += 1
            for (device, fresh), bucket in buckets.items():
                calls.append(_Call(self, group, device, fresh, bucket))
        return calls

    def _keep_state(self, call):
        # A momentum buffer made after the first step counts from its first applied step on, and only found_inf
        # knows whether this one was. Rare enough to wait for the answer.
        skipped = call.fresh_momentum and call.found_inf is not None and bool(call.found_inf)
        for param, new in call.bucket.new_state:
            if skipped:
                new.pop("momentum_buffer", None)
            self.state[param].update(new)

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


class _Bucket:
    """The tensors of one call, in the order of the operator's lists."""

    def __init__(self):
        self.params, self.grads, self.momentum_buffers = [], [], []
        self.steps, self.lipschitz_bounds, self.indices = [], [], []
        self.new_state = []  # (param, what is to be added to its state once the step has been made)

    def add(self, param, index, state, group):
        new = {}

        def get(name, make):
            if state.get(name) is None:
                new[name] = make()
                return new[name]
            return state[name]

        self.params.append(param)
        self.grads.append(param.grad)
        self.indices.append(index)
        device = param.device
        self.steps.append(get("step", lambda: torch.zeros((), dtype=torch.int64, device=device)))
        if group["momentum"] != 0:
            self.momentum_buffers.append(get("momentum_buffer", lambda: new_momentum_buffer(param)))
        if group["lipschitz"] is None:
            opmath = opmath_dtype(param.dtype)
            bound = get("lipschitz_bound", lambda: torch.zeros((), dtype=opmath, device=device))
            self.lipschitz_bounds.append(bound)
        if new:
            self.new_state.append((param, new))


class _Call:
    """One operator call, ready to be checked and run."""

    def __init__(self, optimizer, group, device, fresh_momentum, bucket):
        self.bucket, self.fresh_momentum = bucket, fresh_momentum

        def on_device(name):  # set by torch.amp.GradScaler
            tensor = getattr(optimizer, name, None)
            return None if tensor is None else tensor.to(device, non_blocking=True)

        self.found_inf = on_device("found_inf")
        lr, lr_tensor = split_lr(group["lr"])
        self.backend = choose_backend(device, group["fused"])
        lipschitz = group["lipschitz"]
        self.options = {
            "lr": lr,
            "momentum": float(group["momentum"]),
            "dampening": float(group["dampening"]),
            "weight_decay": float(group["weight_decay"]),
            "nesterov": group["nesterov"],
            "calibration": float(group["calibration"]),
            "lipschitz": None if lipschitz is None else float(lipschitz),
            "bound_decay": float(group["bound_decay"]),
            "rounding": group["rounding"],
            "seed": operator.index(group["seed"]),
            "maximize": group["maximize"],
            "fresh_momentum": fresh_momentum,
            "lr_tensor": lr_tensor,
            "grad_scale": on_device("grad_scale"),
            "found_inf": self.found_inf,
            "moved": optimizer._moved_counts(device),
        }

    def _arguments(self):
        b = self.bucket
        return (b.params, b.grads, b.momentum_buffers, b.steps, b.lipschitz_bounds, b.indices)

    def check(self):
        self.backend.check(*self._arguments(), **self.options)

    def run(self):
        self.backend.step(*self._arguments(), **self.options)
