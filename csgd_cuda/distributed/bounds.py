# SPDX-License-Identifier: Apache-2.0
"""The Lipschitz bounds of sharded parameters.

Each process has only its part of ``|d|``, but the bound must be that of the whole parameter.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..tensors import Group, State, opmath_dtype
from .agreement import difference, setup_of
from .shards import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class _Mesh:
    """Parameters that are split over the same dimensions of one device mesh, with bounds of one dtype and device."""

    def __init__(self, groups: list[dist.ProcessGroup]) -> None:
        self._groups = groups
        self.params: list[tuple[int, Tensor, Group]] = []
        self._work: Any = None
        self._largest = torch.empty(0)
        self._indices: list[int] = []
        self._bounds: list[Any] = []

    def start(self, state: State) -> None:
        """Begins the exchange. Every process has a place for each parameter, with a gradient or without."""
        sent = [(index, param) for index, param, group in self.params if group["lipschitz"] is None]
        if not sent:
            return
        self._indices = [index for index, _ in sent]
        self._bounds = [(state.get(param) or {}).get("lipschitz_bound") for _, param in sent]
        zero = torch.zeros(1, dtype=opmath_dtype(sent[0][1].dtype), device=sent[0][1].device)
        parts = [zero if bound is None else bound.reshape(1) for bound in self._bounds]
        if zero.device.type == "cpu":  # the result of a GPU cannot be read without waiting for it
            has_grad = torch.tensor([float(param.grad is not None) for _, param in sent], dtype=zero.dtype)
            parts += [has_grad, -has_grad]
        self._largest = torch.cat(parts)
        for group in self._groups[:-1]:
            dist.all_reduce(self._largest, dist.ReduceOp.MAX, group=group)
        self._work = dist.all_reduce(self._largest, dist.ReduceOp.MAX, group=self._groups[-1], async_op=True)

    def finish(self) -> None:
        if self._work is None:
            return
        self._work.wait()
        self._work = None
        here = [k for k, bound in enumerate(self._bounds) if bound is not None]
        if here:
            largest = self._largest.unbind()
            torch._foreach_copy_([self._bounds[k].view(()) for k in here], [largest[k] for k in here])
        _, *has_grad = self._largest.split(len(self._bounds))  # type: ignore[no-untyped-call]
        self._bounds = []
        if has_grad:
            _check_all_had_gradients(self._indices, *has_grad)


def _check_all_had_gradients(indices: list[int], on_some: Tensor, minus_on_all: Tensor) -> None:
    """``on_some``: maximum over processes of 1 with a gradient, 0 without. ``minus_on_all``: of -1 with, 0 without."""
    differ = on_some != -minus_on_all
    if differ.any():
        index = indices[int(differ.nonzero()[0])]
        raise ValueError(
            f"parameter {index} had a gradient in the last step on some ranks, but none on others; its parts are now a "
            "step apart: go on from a checkpoint, and give every rank a gradient, be it zeros"
        )


def _is_on(mesh: DeviceMesh, param: Tensor) -> bool:
    return is_dtensor(param) and param.device_mesh == mesh  # type: ignore[attr-defined]


class WholeBounds:
    """The bounds of an optimizer's sharded parameters, made those of the whole ones between one step and the next.

    A step leaves ``max(beta * l, max |d|)`` over this process's part; the maximum of these over the processes is that
    of the whole parameter. The exchange is under way until the next step, or until the state is read. Without a DTensor
    among the parameters nothing is communicated.
    """

    def __init__(self) -> None:
        self._meshes: list[_Mesh] = []
        self._agreed = False
        self._broken: str | None = None  # why the parts of a parameter do not belong together any more

    def find(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the first step of an optimizer's parameters, and whenever they change.

        Raises:
            ValueError: the processes are set up differently; the message names the first difference.
        """
        index = -1  # over all groups
        meshes: dict[Any, _Mesh] = {}
        all_groups: dict[Any, list[dist.ProcessGroup]] = defaultdict(list)
        for group in optimizer.param_groups:
            for param in group["params"]:
                index += 1
                if not is_dtensor(param):
                    continue
                mesh = param.device_mesh
                if mesh not in all_groups and mesh.get_coordinate() is not None:
                    all_groups[mesh] = [mesh.get_group(k) for k in range(mesh.ndim)]
                split = [k for k in range(mesh.ndim) if not param.placements[k].is_replicate() and mesh.size(k) > 1]
                if not split or mesh.get_coordinate() is None:
                    continue
                key = (mesh, tuple(split), opmath_dtype(param.dtype), param.device)
                if key not in meshes:
                    meshes[key] = _Mesh([mesh.get_group(k) for k in split])
                meshes[key].params.append((index, param, group))
        self._meshes = list(meshes.values())
        if all_groups and not self._agreed:
            _check_agreement(optimizer, all_groups)
            self._agreed = True

    def params_changed(self) -> None:
        """The processes compare what they have again, at the next ``find``."""
        self._agreed = False

    def start(self, state: State) -> None:
        """After a step."""
        for mesh in self._meshes:
            mesh.start(state)

    def finish(self) -> None:
        """Before the bounds are read; needs no other process to do the same.

        Raises:
            ValueError: in a step a parameter had a gradient on only some of the processes over which it is split (found
                on CPUs; replicas are not compared). The error stays until a checkpoint is loaded.
        """
        if self._broken is not None:
            raise ValueError(self._broken)
        try:
            for mesh in self._meshes:
                mesh.finish()
        except ValueError as error:
            self._broken = str(error)
            raise


def _check_agreement(optimizer: torch.optim.Optimizer, all_groups: dict[Any, list[dist.ProcessGroup]]) -> None:
    """Compares options and parameters over the processes of each mesh, and the state of what is spread over it."""
    messages = [
        difference(setup_of(optimizer, partial(_is_on, mesh)), groups) for mesh, groups in all_groups.items()
    ]  # of all meshes, before anything is raised: others wait for this rank
    for message in filter(None, messages):
        raise ValueError(message)
