# SPDX-License-Identifier: Apache-2.0
"""PyTorch's PowerSGD hook where collectives run as they come, as with gloo."""

# No "from __future__ import annotations": DistributedDataParallel compares the hook's annotations with the types.

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook


def bucket_by_bucket(state: PowerSGDState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """powerSGD_hook, and no bucket before the one before it is done.

    The hook starts its second and third all-reduce from callbacks. With gloo, and more than one bucket under way, the
    ranks start them in different orders, and one rank's P is added to another's Q, or gloo ends the process.
    """
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(powerSGD_hook(state, bucket).wait())
    return done
