# SPDX-License-Identifier: Apache-2.0
"""torchvision, also where the operators in its wheel are for another build of torch.

The wheels on PyPI hold operators for a CUDA build of torch. Beside a CPU build they do not load, and the import of
torchvision fails where it describes them. They are declared here then, and nms, which the experiments need, is defined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tools.program import UserError


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    order = scores.argsort(descending=True, stable=True)
    rivals = (torchvision.ops.box_iou(boxes[order], boxes[order]) > iou_threshold).triu(diagonal=1)  # [better, worse]
    keep = torch.ones(len(order), dtype=torch.bool)
    for k in range(len(order)):
        keep &= ~(rivals[k] & keep[k])
    return order[keep]


try:
    import torchvision
except ModuleNotFoundError:
    raise UserError("torchvision is not installed, which this needs; pip install torchvision.") from None
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    _library = torch.library.Library("torchvision", "FRAGMENT")  # its definitions hold as long as it is kept
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.impl("nms", _nms, "CPU")
    import torchvision

import torchvision.transforms.v2  # noqa: E402  which torchvision does not import by itself

# What torchvision.ops.nms calls once it has seen that the wheel's operators are loaded: of boxes [N, 4] and scores [N]
# the indices of the boxes that stay, best first.
nms = torch.ops.torchvision.nms

__all__ = ["nms", "torchvision"]
