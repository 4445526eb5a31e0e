# SPDX-License-Identifier: Apache-2.0
"""What CSGD does for parameters that are DTensors, beyond the step of what this process holds of them."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from .shards import is_dtensor

if TYPE_CHECKING:
    from .distributed.bounds import WholeBounds


class Sharded(Optimizer):
    """The methods of CSGD that keep the processes together; nothing of it communicates without a DTensor."""

    state: defaultdict[Tensor, Any]
    _whole_bounds: WholeBounds | None
    _ranks_agree: bool
    _parts_apart: str | None  # why the parts of a parameter do not belong together any more

    def _forget_shards(self) -> None:
        self._whole_bounds, self._ranks_agree, self._parts_apart = None, False, None

    def _has_dtensors(self) -> bool:
        return any(is_dtensor(param) for group in self.param_groups for param in group["params"])

    def _find_shards(self) -> None:
        """Before the first step of these parameters, and whenever they change."""
        if not self._has_dtensors():
            return
        from .distributed.bounds import WholeBounds

        self._whole_bounds = WholeBounds(self.param_groups)
        if not self._ranks_agree:
            self._whole_bounds.check(self)
            self._ranks_agree = True

    def _start_bounds(self) -> None:
        if self._whole_bounds is not None:
            self._whole_bounds.start(self.state)

    def _finish_bounds(self) -> None:
        """What reads the state comes after this. An error stays until a checkpoint is loaded."""
        if self._parts_apart is not None:
            raise ValueError(self._parts_apart)
        if self._whole_bounds is None:
            return
        try:
            self._whole_bounds.finish()
        except ValueError as error:
            self._parts_apart = str(error)
            raise

    def state_dict(self) -> dict[str, Any]:
        """The state and the options, as torch.optim.SGD's; of DTensors with the bounds of the whole parameters."""
        self._finish_bounds()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._finish_bounds()
        return super().__getstate__()
