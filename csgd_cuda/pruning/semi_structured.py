# SPDX-License-Identifier: Apache-2.0
"""2:4 weights for sparse tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..kinds import MODULE


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of each four consecutive entries of dimension 1 are not zero."""
    if weight.dim() < 2 or weight.shape[1] % 4 != 0:
        return False
    return not bool((weight.detach().bool().reshape(len(weight), weight.shape[1] // 4, 4, -1).sum(dim=2) > 2).any())


def to_semi_structured(model: nn.Module) -> list[str]:
    """Gives the 2:4 weights of a model's Linear layers to the sparse tensor cores, in place, for inference.

    The weights become torch.sparse.SparseSemiStructuredTensor, which cannot be trained.

    Returns:
        The names of the layers changed.

    Raises:
        RuntimeError: a weight is not on a CUDA GPU of compute capability 8.0 or more, or torch refuses its shape.
        TypeError: a weight is neither float16 nor bfloat16, or parametrized.
        ValueError: no Linear layer has 2:4 weights. With any error, nothing was changed.
    """
    MODULE.check("model", model)
    new = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or not is_two_of_four(layer.weight):
            continue
        if parametrize.is_parametrized(layer, "weight"):
            raise TypeError(
                f"{name} has a parametrization of weight, which would not see the new one; take it off with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        weight = layer.weight.detach()
        if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
            raise RuntimeError(
                f"{name}: semi-structured weights need a CUDA GPU of compute capability 8.0 or more, got one on "
                f"{weight.device}"
            )
        if weight.dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"{name}: semi-structured weights must be float16 or bfloat16, got {weight.dtype}: use model.half()"
            )
        new[name] = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)
    if not new:
        raise ValueError("the model has no Linear layer of 2:4 weights; train it with structure='2:4', sparsity=0.5")
    for name, parameter in new.items():
        model.get_submodule(name).weight = parameter
    return list(new)
