# SPDX-License-Identifier: Apache-2.0
"""The check that all ranks are set up alike: they fail at once, instead of drifting apart or waiting for each other."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kinds import instance_of

PROCESS_GROUP = instance_of(dist.ProcessGroup, "a process group").or_none()


def described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def parameter_list(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Entries for ``agree``: the position and the description of each parameter."""
    return {f"parameter {k}": f"{name} {described(param)}".strip() for k, (name, param) in enumerate(named)}


def agree(what: Mapping[str, Any], groups: Sequence[dist.ProcessGroup | None]) -> None:
    """Compares named values over all ranks; every one of them must call it.

    Args:
        what: plain Python values (they are pickled), the most informative first.
        groups: the process groups of a mesh's dimensions, whose ranks are compared; or a single process group.

    Raises:
        ValueError: on all ranks, with the first name whose values differ, and two of the values.
    """
    message = difference(what, groups)
    if message is not None:
        raise ValueError(message)


def difference(what: Mapping[str, Any], groups: Sequence[dist.ProcessGroup | None]) -> str | None:
    """What ``agree`` raises, or None; the same on all ranks."""
    everyone: list[tuple[int, dict[str, Any]]] = [(dist.get_rank(), dict(what))]
    for group in groups:
        of_group: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(of_group, everyone, group=group)
        everyone = [entry for entries in of_group for entry in entries]
    (first, mine), *others = sorted(everyone, key=lambda entry: entry[0])
    for rank, theirs in others:
        for name in [*mine, *(name for name in theirs if name not in mine)]:
            values = mine.get(name, "missing"), theirs.get(name, "missing")
            if values[0] != values[1]:
                return f"the ranks disagree: {name} is {values[0]} on rank {first}, but {values[1]} on rank {rank}"
    return None


def check_ranks_agree(optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None) -> None:
    """Checks that an optimizer is the same on all ranks, which is what keeps replicas on the same bits.

    Every rank must call it: after the optimizer is made, and after a checkpoint is loaded. It costs one exchange of
    Python objects and waits for the device; steps need no communication.

    Args:
        optimizer: a ``CSGD``, a ``CalibratedAdamW``, or another optimizer.
        group: None is the default group.

    Raises:
        ValueError: on all ranks, naming the first difference and both values: an option of a parameter group, a
            parameter's shape or dtype, its step or Lipschitz bound.
    """
    instance_of(torch.optim.Optimizer, "a torch.optim.Optimizer").check("optimizer", optimizer)
    PROCESS_GROUP.check("group", group)
    agree(setup_of(optimizer, lambda _: True), [group])


def setup_of(optimizer: torch.optim.Optimizer, is_shared: Callable[[Tensor], bool]) -> dict[str, Any]:
    """Entries for ``agree``: the optimizer's options, the number of its parameters, and the description and state of
    those that all compared ranks have (``is_shared``)."""
    what: dict[str, Any] = {"the number of parameter groups": len(optimizer.param_groups)}
    params: list[Tensor] = []
    for k, options in enumerate(optimizer.param_groups):
        for name, value in options.items():
            if name in optimizer.defaults and _is_plain(value):  # other entries are notes of the user, or names
                what[f"{name} of parameter group {k}"] = _plain(value)
        params += options["params"]
        what[f"the number of parameters in groups 0 to {k}"] = len(params)
    shared = {k: param for k, param in enumerate(params) if is_shared(param)}
    what |= {f"parameter {k}": described(param) for k, param in shared.items()}
    for k, param in shared.items():
        state = optimizer.state.get(param) or {}
        for name in ("step", "lipschitz_bound"):
            if name in state:
                what[f"{name} of parameter {k}"] = _plain(state[name])
    return what


def _is_plain(value: Any) -> bool:
    """False for other objects that users keep in their groups, such as functions: they are not compared."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    numbers_and_names = all(entry is None or isinstance(entry, (numbers.Number, str)) for entry in entries)
    return numbers_and_names or isinstance(value, torch.Tensor)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value
