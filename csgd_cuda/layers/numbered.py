# SPDX-License-Identifier: Apache-2.0
"""What layers that draw random numbers share: a number in their model, a count of steps, and the rank."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..kinds import INTEGER
from ..tensors import lasting_tensors

MOST_LAYERS = 2**16
MOST_RANKS = 2**16
_Self = TypeVar("_Self", bound="NumberedLayer")


class NumberedLayer(nn.Module):
    """A module whose draws depend on its ``index``, a number in the model, and its ``step``, both int64 buffers."""

    index: Tensor
    step: Tensor

    def _make_counters(self, *, saves_index: bool = True) -> None:
        # On the CPU, whatever torch.device() the model is made under: on meta they would lose their values.
        with lasting_tensors():
            self.register_buffer("index", torch.zeros((), dtype=torch.int64, device="cpu"), persistent=saves_index)
            self.register_buffer("step", torch.zeros((), dtype=torch.int64, device="cpu"))

    def number(self, index: int) -> None:
        """Sets ``index``, by which this layer's draws differ from those of others with the same seed."""
        INTEGER.check("index", index)
        if not 0 <= operator.index(index) < MOST_LAYERS:
            raise ValueError(f"index must be in 0 ... {MOST_LAYERS - 1}, got {index}")
        self.index.fill_(index)

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        # model.half() casts, model.to_empty() forgets: the buffers go to the new device, but stay what they are.
        before = dict(self._buffers)
        with lasting_tensors():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, old in before.items():
                new = self._buffers[name]
                if old is not None and new is not None and new is not old:
                    lost = old.is_meta and not new.is_meta
                    self._buffers[name] = torch.zeros_like(old, device=new.device) if lost else old.to(new.device)
        return self


def rank() -> int:
    """Of this process, 0 without torch.distributed."""
    distributed = torch.distributed
    return distributed.get_rank() % MOST_RANKS if distributed.is_available() and distributed.is_initialized() else 0
