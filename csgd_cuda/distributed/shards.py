# SPDX-License-Identifier: Apache-2.0
"""Shards: where the elements that one process holds lie in the whole parameter, and the plain tensors in a DTensor.

torch's DTensor is used where a parameter is one, and imported then only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..tensors import Group


class ShardLayout(NamedTuple):
    """Where a shard's elements, in memory order, lie in the whole: runs of consecutive positions, in equal groups.

    Element j of the shard is in run r = j // run_length, and has in the whole parameter the position
    ``offset + r // group_runs * group_stride + r % group_runs * run_stride + j % run_length``. One split dimension
    takes one group; a second one, neither of them the first dimension, takes several. csrc/core/shard.h is the same.
    """

    offset: int
    run_length: int  # 0: no shard, but the whole parameter
    run_stride: int
    group_runs: int
    group_stride: int

    def positions(self, begin: int, end: int, device: torch.device) -> Tensor:
        """The positions of the shard's elements begin ... end - 1 in the whole parameter, int64."""
        element = torch.arange(begin, end, device=device)
        run = element // self.run_length
        group, run_in_group = run // self.group_runs, run % self.group_runs
        start = self.offset + group * self.group_stride + run_in_group * self.run_stride
        return start + element % self.run_length


WHOLE = ShardLayout(0, 0, 0, 0, 0)


def layout_of_block(sizes: list[int], offsets: list[int], whole: list[int]) -> ShardLayout | None:
    """The layout of a block of a row-major tensor.

    Args:
        sizes, offsets: of the block in each dimension, slowest first; no size is 0.
        whole: the tensor's own sizes.

    Returns:
        None where runs and groups cannot describe it: split along three dimensions of which none is the first.
    """
    strides = [1] * len(whole)
    for k in range(len(whole) - 1, 0, -1):
        strides[k - 1] = strides[k] * whole[k]
    offset = sum(o * stride for o, stride in zip(offsets, strides, strict=True))
    levels: list[tuple[int, int]] = []  # (count, stride), from the elements of a run outwards
    count, stride = 1, 1
    for k in range(len(whole) - 1, -1, -1):
        if count * stride != strides[k]:  # there is a gap behind the block counted so far
            if count > 1 or not levels:
                levels.append((count, stride))
            count, stride = 1, strides[k]
        count *= sizes[k]
    if count > 1 or not levels:
        levels.append((count, stride))
    if len(levels) > 3:
        return None
    (run, _), (group_runs, run_stride), (groups, group_stride) = [*levels, (1, 0), (1, 0)][:3]
    extent = (group_runs - 1) * run_stride + run
    return ShardLayout(offset, run, max(run_stride, run), group_runs, group_stride if groups > 1 else extent)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a torch.distributed DTensor."""
    if torch.compiler.is_compiling():  # where no tensor counts as a wrapper
        if not torch.distributed.is_available():
            return False
    elif not is_traceable_wrapper_subclass(tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def check_plain(param: Tensor, index: int) -> None:
    """Raises TypeError for a tensor that wraps others, but for a DTensor of which every process can draw its part."""
    if is_dtensor(param):
        shard_layout(param, index)
    elif is_traceable_wrapper_subclass(param):
        raise TypeError(f"parameter {index} is a {type(param).__name__}; csgd_cuda supports plain tensors and DTensors")


def check_not_pieces(param_groups: Sequence[Group]) -> None:
    """Raises TypeError for the pieces that FSDP1 makes of parameters, where a step would need a bound of the whole.

    FullyShardedDataParallel(use_orig_params=True) marks each parameter as flattened, and leaves each rank a flat piece
    of it, or nothing. Unsharded (NO_SHARD, one rank) the parameters keep their shapes. With use_orig_params=False there
    are flat parameters, which are marked as such, and whose bounds FSDP1 takes for a rank's own.
    """
    pieces = []
    index = -1
    for group in param_groups:
        for param in group["params"]:
            index += 1
            if getattr(param, "_fsdp_flattened", False) and not getattr(param, "_is_flat_param", False):
                if param.dim() != 1:
                    return
                if group["lipschitz"] is None:
                    pieces.append(index)
    if pieces:
        raise TypeError(
            f"parameter {pieces[0]} is a piece of one that FullyShardedDataParallel(use_orig_params=True) has split: "
            "each rank would have a Lipschitz bound of its own, and FSDP.optim_state_dict would fail. Take fully_shard "
            "of torch.distributed.fsdp (FSDP2), which has the bits of one process; or use_orig_params=False, or a "
            "fixed lipschitz"
        )


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; another tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        local: Any = tensor.to_local()  # type: ignore[attr-defined]
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def local_gradient(param: Tensor, index: int) -> Tensor:
    """The gradient of what this process holds of a parameter.

    A gradient whose placements differ from its parameter's (the pending sum of a replicated parameter's, in tensor
    parallel) is redistributed to the parameter's placements first, as torch.optim.SGD does it; every process takes
    part.

    Raises:
        TypeError, ValueError: one of the two is a DTensor and the other is not, or their meshes differ.
    """
    grad: Any = param.grad
    if is_dtensor(param) != is_dtensor(grad):
        raise TypeError(f"parameter {index}: gradient is a {type(grad).__name__}, expected a {type(param).__name__}")
    if not is_dtensor(param):
        return grad  # type: ignore[no-any-return]
    like: Any = param
    if grad.device_mesh != like.device_mesh:
        raise ValueError(
            f"parameter {index}: gradient is on {grad.device_mesh}, expected {like.device_mesh} as the parameter"
        )
    if grad.placements != like.placements:
        grad = grad.redistribute(placements=like.placements)
    return local_tensor(grad)


def shard_layout(param: Any, index: int) -> ShardLayout:
    """Where the elements that this process holds of a DTensor lie in the whole one; no communication.

    Raises:
        TypeError: it is placed in a way whose random draws cannot be those of the whole parameter.
    """
    if any(placement.is_partial() for placement in param.placements):
        raise TypeError(
            f"parameter {index} is a DTensor placed {param.placements}: a parameter cannot be a partial sum"
        )
    local = local_tensor(param)
    if local.shape == param.shape or local.numel() == 0:
        return WHOLE
    if not hasattr(param, "__create_chunk_list__"):
        raise TypeError(f"parameter {index} is a DTensor; csgd_cuda needs torch >= 2.4 to step one")
    chunks = param.__create_chunk_list__()
    # In the order of the whole one's memory, slowest dimension first, in which its elements are counted.
    by_stride = sorted(range(param.dim()), key=lambda k: -param.stride(k))
    strides_of_block = [local.stride(k) for k in by_stride if local.shape[k] > 1]
    if len(chunks) != 1 or list(chunks[0].sizes) != list(local.shape):
        raise TypeError(f"parameter {index} is a DTensor placed {param.placements}: its shard is not one block of it")
    if strides_of_block != sorted(strides_of_block, reverse=True):
        raise TypeError(
            f"parameter {index} is a DTensor whose shard is laid out in memory otherwise than the whole: their strides "
            f"are {list(local.stride())} and {list(param.stride())}. Make it contiguous() before it is distributed"
        )
    layout = layout_of_block(
        [local.shape[k] for k in by_stride], [chunks[0].offsets[k] for k in by_stride],
        [param.shape[k] for k in by_stride],
    )  # fmt: skip
    if layout is None:
        raise TypeError(
            f"parameter {index} is a DTensor placed {param.placements}: it is split along three dimensions after the "
            "first, csgd_cuda can draw for two"
        )
    return layout
