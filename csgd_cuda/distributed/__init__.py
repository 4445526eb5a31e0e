# SPDX-License-Identifier: Apache-2.0
"""CSGD on several processes: gradients exchanged in few bits, and the check that all ranks are set up alike.

``DistributedDataParallel`` needs nothing of it: its replicas of a ``CSGD`` training stay bit-identical as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agreement import check_ranks_agree
    from .hook import CalibratedHookState, calibrated_hook

__all__ = ["CalibratedHookState", "calibrated_hook", "check_ranks_agree"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is used: a torch without torch.distributed lacks the types of hook.py, but the
    optimizer needs shards.py of this folder there, too."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import agreement, hook

    return getattr(agreement if name == "check_ranks_agree" else hook, name)
