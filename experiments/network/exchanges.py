# SPDX-License-Identifier: Apache-2.0
"""The exchanges of gradients that are compared, each by a name such as "powersgd-1" or "calibrated-clip2.5"."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel

from csgd_cuda.distributed import CalibratedHookState, calibrated_hook

from .powersgd import bucket_by_bucket

PLAIN = "plain"
ALONE = "no communication"  # a step without any exchange, where figures go by names of exchanges
KINDS = "plain, fp16, bf16, powersgd-RANK, calibrated, calibrated-clipC-blockN-compact-ef (each part may be left out)"
POWERSGD_START = 2  # its first steps are plain all-reduces; warm start and error feedback need at least two
_LABELS = {PLAIN: "plain DDP, float32", "fp16": "fp16 hook", "bf16": "bf16 hook"}
_PARAMETER = re.compile(
    r"(powersgd)-([1-9]\d*)|(calibrated)(?:-clip(\d+(?:\.\d+)?))?(?:-block([1-9]\d*))?(-compact)?(-ef)?"
)


@dataclass(frozen=True)
class Exchange:
    """kind: plain, fp16, bf16, powersgd or calibrated; rank of PowerSGD; options of the calibrated hook."""

    name: str
    kind: str
    rank: int | None = None
    clip: float | None = None
    block: int | None = None
    compact: bool = False
    error_feedback: bool = False

    @classmethod
    def of(cls, name: str) -> Exchange:
        """ValueError where there is none of this name."""
        if name in _LABELS:
            return cls(name, name)
        match = _PARAMETER.fullmatch(name)
        if match is None or (match[4] and float(match[4]) == 0):
            raise ValueError(f"{name!r} is none of {KINDS}")
        if match[1]:
            return cls(name, "powersgd", rank=int(match[2]))
        clip, block = (float(match[4]) if match[4] else None), (int(match[5]) if match[5] else None)
        flags = {"compact": match[6] is not None, "error_feedback": match[7] is not None}
        return cls(name, "calibrated", clip=clip, block=block, **flags)

    @property
    def label(self) -> str:
        """For tables and legends."""
        if self.kind == "powersgd":
            return f"PowerSGD rank {self.rank}"
        if self.kind == "calibrated":
            options = [
                f", {name} {value:g}" for name in ("clip", "block") if (value := getattr(self, name)) is not None
            ]
            flags = {", compact": self.compact, ", error feedback": self.error_feedback}
            return "".join(["calibrated", *options, *(text for text, chosen in flags.items() if chosen)])
        return _LABELS[self.kind]

    def register(self, model: DistributedDataParallel, seed: int = 0) -> CalibratedHookState | None:
        """Makes the model exchange its gradients so; the state that counts the bytes, where there is one."""
        if self.kind == "fp16":
            model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif self.kind == "bf16":
            model.register_comm_hook(None, default_hooks.bf16_compress_hook)
        elif self.kind == "powersgd":
            state = PowerSGDState(None, self.rank, start_powerSGD_iter=POWERSGD_START, random_seed=seed)
            model.register_comm_hook(state, bucket_by_bucket)
        elif self.kind == "calibrated":
            options = {name: getattr(self, name) for name in ("clip", "block", "compact", "error_feedback")}
            ours = CalibratedHookState(model, seed=seed, **options)
            model.register_comm_hook(ours, calibrated_hook)
            return ours
        return None


def argument(text: str) -> str:
    """argparse type: the name of an exchange."""
    try:
        return Exchange.of(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
