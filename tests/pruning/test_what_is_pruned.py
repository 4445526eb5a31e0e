# SPDX-License-Identifier: Apache-2.0
"""Which parameters are pruned: the recipe of the documentation, and weights that hard thresholding would make NaN."""

import copy
from pathlib import Path

import pytest
import torch

from csgd_cuda import CSGD


class Norms:
    """Ways to give a layer a weight that is a magnitude times a normed direction."""

    new = staticmethod(torch.nn.utils.parametrizations.weight_norm)
    old = staticmethod(torch.nn.utils.weight_norm)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("norm", [Norms.new, Norms.old])
@pytest.mark.parametrize("layer", [torch.nn.Conv2d(3, 8, 3), torch.nn.Conv1d(3, 8, 3), torch.nn.Linear(3, 8)], ids=str)
def test_filters_of_a_normed_direction_are_refused(layer, norm, named):
    """Dropped, they would make the weight NaN."""
    model = torch.nn.Sequential(norm(copy.deepcopy(layer)))
    params = [(n, p) if named else p for n, p in model.named_parameters() if p.dim() > 1]
    if isinstance(layer, torch.nn.Linear) and not named:
        CSGD(params, sparsity=0.5, structure="filter")  # these may be two linear layers
        return
    with pytest.raises(
        ValueError, match=r"parameters 0 and 1, of shapes .* are magnitude and direction of weight_norm"
    ):
        CSGD(params, sparsity=0.5, structure="filter")
    optimizer = CSGD(params)
    with pytest.raises(ValueError, match="weight_norm"):
        optimizer.add_param_group({"params": copy.deepcopy(params), "sparsity": 0.5, "structure": "filter"})
    assert len(optimizer.param_groups) == 1


def test_layers_with_one_input_are_no_normed_directions():
    model = torch.nn.Sequential(torch.nn.Linear(1, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    for params in (model.parameters(), model.named_parameters()):
        CSGD(params, sparsity=0.5, structure="filter")


def test_recipe_of_the_documentation_picks_linear_layers_and_convolutions():
    """No embeddings, positions, or parts of parametrized weights; a shared weight once, in the order of the model."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(7, 4)
            self.position = torch.nn.Parameter(torch.zeros(1, 5, 4))
            self.conv = torch.nn.Conv1d(4, 4, 3)
            self.normed = Norms.new(torch.nn.Conv1d(4, 4, 3))
            self.shared = torch.nn.Linear(4, 4)
            self.again = self.shared
            self.attention = torch.nn.MultiheadAttention(4, 2)

    model = Model()
    block = (Path(__file__).parents[2] / "docs" / "pruning.md").read_text().split("```python\n")[1].split("...\n")[0]
    names = {"model": model}
    exec(block, names)
    pruned, others = names["optimizer"].param_groups
    assert [id(p) for p in pruned["params"]] == [
        id(p) for p in (model.conv.weight, model.shared.weight, model.attention.out_proj.weight)
    ]
    assert len(pruned["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert not others["sparsity"]
