# SPDX-License-Identifier: Apache-2.0
"""Error feedback: what the codes of a rank have left of its gradients, to be added to its next ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kinds import INTEGER, instance_of

_MAPPING = instance_of(Mapping, "a dict")


class Residuals:
    """Of one rank: float32 of shape (n,) for each parameter of n coordinates, in its memory order.

    They belong to the rank whose gradients they are part of: with another rank, or another number of ranks, such as
    after a checkpoint of rank 0 was loaded everywhere, they begin at 0 again.

    Attributes:
        place: (rank, world size), None before the first step.
        tensors: by the names of the parameters that were exchanged so far.
    """

    def __init__(self) -> None:
        self.place: tuple[int, int] | None = None
        self.tensors: dict[str, Tensor] = {}

    def of(self, name: str, grad: Tensor, place: tuple[int, int]) -> Tensor:
        """The residual of a parameter with this gradient, on its device."""
        if self.place != place:
            self.place, self.tensors = place, {}
        residual = self.tensors.get(name)
        if residual is None:
            residual = torch.zeros_like(grad, dtype=torch.float32)
        self.tensors[name] = residual = residual.to(grad.device)
        return residual

    def saved(self) -> dict[str, Any] | None:
        """For ``torch.save``; None where there is nothing to save."""
        if self.place is None:
            return None
        tensors = {name: residual.clone() for name, residual in self.tensors.items()}
        return {"rank": self.place[0], "world_size": self.place[1], "tensors": tensors}

    @classmethod
    def loaded(cls, saved: Any, numels: Mapping[str, int]) -> Residuals:
        """Those that were saved.

        Args:
            saved: what ``saved()`` returned.
            numels: how many coordinates each parameter has.

        Raises:
            ValueError, TypeError: it is something else, or does not fit the parameters; the message names the entry.
        """
        out = cls()
        if saved is None:
            return out
        _MAPPING.check("residuals", saved)
        missing = [name for name in ("rank", "world_size", "tensors") if name not in saved]
        if missing:
            raise ValueError(f"residuals has no entry {missing[0]!r}; is it that of a CalibratedHookState?")
        for name in ("rank", "world_size"):
            INTEGER.check(f"residuals: {name}", saved[name])
        _MAPPING.check("residuals: tensors", saved["tensors"])
        for name, residual in saved["tensors"].items():
            if name not in numels:
                raise ValueError(f"residuals has {name!r}, which is not a parameter of the module")
            wanted = f"the residual of {name} must be a float32 tensor of shape ({numels[name]},)"
            if not isinstance(residual, Tensor):
                raise TypeError(f"{wanted}, got a {type(residual).__name__}")
            if residual.shape != (numels[name],) or residual.dtype != torch.float32:
                raise ValueError(f"{wanted}, got {residual.dtype} of shape {tuple(residual.shape)}")
            out.tensors[name] = residual.clone()
        out.place = int(saved["rank"]), int(saved["world_size"])
        return out
