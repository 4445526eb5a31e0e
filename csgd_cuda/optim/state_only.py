# SPDX-License-Identifier: Apache-2.0
"""Steps that only make state: the first step of a parameter, at learning rate 0, with a gradient of zeros.

torch.distributed.checkpoint makes such a step of an optimizer without state, to have tensors into which a checkpoint
can be loaded. It is no training: such a parameter gets its state, and counts as one without a gradient in all else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..distributed.shards import is_dtensor, local_gradient
from ..tensors import SUPPORTED_DTYPES, Group, State
from .options import value_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def only_get_state(param_groups: list[Group], state: State, *, reads_steps: bool) -> set[Tensor]:
    """The parameters for which the step only makes the state.

    Gradients are read, and with a GPU waited for, only where a parameter has made no step and its learning rate is 0.
    The value of a learning rate on a GPU is not known here, nor are gradients while a CUDA graph is captured.

    Args:
        state: the optimizer's.
        reads_steps: whether the count of a parameter that has a state is read, too, and not taken for more than 0.
    """
    fresh: list[Tensor] = []
    for group in param_groups:
        if value_of(group["lr"]) == 0:
            with_grad = filter(_has_readable_gradient, group["params"])
            fresh += [param for param in with_grad if _is_fresh(state.get(param) or {}, reads_steps)]
    if not fresh:
        return set()
    whole = [param for param in fresh if not is_dtensor(param)]
    shards = [param for param in fresh if is_dtensor(param)]
    differs = [*_any(whole), *_any_on_mesh(shards)]
    return {param for param, nonzero in zip([*whole, *shards], differs, strict=True) if not nonzero}


def _is_fresh(own: dict[str, Any], reads_steps: bool) -> bool:
    step = own.get("step")
    return step is None or (reads_steps and not step.is_meta and step.numel() == 1 and int(step) == 0)


def _has_readable_gradient(param: Tensor) -> bool:
    """Any other gradient is left to the step, which checks it."""
    grad = param.grad
    if grad is None or grad.is_meta or grad.layout is not torch.strided or grad.dtype not in SUPPORTED_DTYPES:
        return False
    if grad.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    if is_dtensor(param):
        return is_dtensor(grad) and _share_this_mesh(param, grad)
    return not is_traceable_wrapper_subclass(param) and not is_traceable_wrapper_subclass(grad)


def _share_this_mesh(param: Any, grad: Any) -> bool:
    """Whether both are on one mesh, of which this process is a part."""
    return param.device_mesh == grad.device_mesh and param.device_mesh.get_coordinate() is not None


def _any(params: Sequence[Any]) -> list[bool]:
    """Whether there is an element that is not 0 in each gradient."""
    answers: dict[torch.device, list[Tensor]] = defaultdict(list)
    for param in params:
        answers[param.grad.device].append(param.grad.any())
    read = {device: iter(torch.stack(of_device).tolist()) for device, of_device in answers.items()}
    return [next(read[param.grad.device]) for param in params]


def _any_on_mesh(params: Sequence[Any]) -> list[bool]:
    """The same of DTensors, over all processes of their meshes, all of which call this: their answers are one."""
    answers: dict[DeviceMesh, list[Tensor]] = defaultdict(list)
    for k, param in enumerate(params):
        answers[param.device_mesh].append(local_gradient(param, k).any().to(torch.int32))
    read = {}
    for mesh, of_mesh in answers.items():
        together = torch.stack(of_mesh)
        for dim in range(mesh.ndim):
            dist.all_reduce(together, dist.ReduceOp.MAX, group=mesh.get_group(dim))
        read[mesh] = iter(together.tolist())
    return [bool(next(read[param.device_mesh])) for param in params]
