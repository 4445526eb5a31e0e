# SPDX-License-Identifier: Apache-2.0
"""CSGD on several processes: gradients exchanged in few bits, and the check that all ranks are set up alike.

``DistributedDataParallel`` needs nothing of it: its replicas of a ``CSGD`` training stay bit-identical as they are.
"""

import torch

if torch.distributed.is_available():  # else the optimizer still needs shards.py and bounds.py of this folder
    from .agreement import check_ranks_agree
    from .hook import CalibratedHookState, calibrated_hook

    __all__ = ["CalibratedHookState", "calibrated_hook", "check_ranks_agree"]
