# SPDX-License-Identifier: Apache-2.0
"""2:4 weights: how they are recognised, and what the sparse tensor cores need."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from csgd_cuda import CSGD
from csgd_cuda.pruning import is_two_of_four, to_semi_structured


def test_two_of_four_is_recognised():
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3], [0, 0, 0, 0, 0, 4, 5, 0]])
    assert is_two_of_four(weight)
    weight[1, 4] = 1
    assert not is_two_of_four(weight)
    assert not is_two_of_four(torch.zeros(2, 6))
    assert not is_two_of_four(torch.zeros(8))


def test_semi_structured_weights_need_a_gpu_and_a_pattern():
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="no Linear layer of 2:4 weights"):
        to_semi_structured(model)
    CSGD(model[0].parameters(), lr=0.1, sparsity=0.5, structure="2:4").threshold()
    with pytest.raises(RuntimeError, match="0: semi-structured weights need a CUDA GPU"):
        to_semi_structured(model)


def test_semi_structured_weights_of_a_parametrized_layer_are_refused():
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    parametrizations.weight_norm(model[0])
    with pytest.raises(TypeError, match=r"^0 has a parametrization of weight"):
        to_semi_structured(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_semi_structured_weights_give_the_same_outputs():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no sparse tensor cores")
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)).cuda().half()
    optimizer = CSGD([layer.weight for layer in (model[0], model[2])], lr=0.1, sparsity=0.5, structure="2:4")
    optimizer.threshold()
    inputs = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        expected = model(inputs)
        assert to_semi_structured(model) == ["0", "2"]
        assert (model(inputs) - expected).abs().max() <= 2e-3 * expected.abs().max()
