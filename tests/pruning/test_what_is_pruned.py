# SPDX-License-Identifier: Apache-2.0
"""Which parameters are pruned: the recipe of the documentation, and weights that hard thresholding would make NaN."""

import copy
from pathlib import Path

import pytest
import torch

from csgd_cuda import CSGD, calibrate, cuttable_weights, export_pruned
from experiments import models


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


@pytest.mark.parametrize("changed", [lambda m: m, calibrate, torch.nn.Module.eval], ids=["plain", "calibrated", "eval"])
@pytest.mark.parametrize("name", ["lenet", "chain", "resnet20", "wrn16-4"])
@torch.no_grad()
def test_cuttable_weights_are_those_whose_dead_filters_go(name, changed):
    """All of them and no other: every layer has dead filters."""
    model = changed(models.build(name, 0, models.Shape(3, (32, 32), 10)))
    weights = cuttable_weights(model)
    before = [p.clone() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    for layer in layers.values():
        layer.weight[: len(layer.weight) // 2] = 0
    small = export_pruned(model)
    smaller = [n for n, m in layers.items() if len(small.get_submodule(n).weight) < len(m.weight)]
    assert 0 < len(smaller) < len(layers)
    assert {id(layers[n].weight) for n in smaller} == {id(w) for w in weights}
    assert len(weights) == len(smaller)


def test_cuttable_weights_are_the_models_own_parameters_in_the_order_of_calls():
    """And the optimizer takes them."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.second, self.first = torch.nn.Linear(4, 2), torch.nn.Linear(8, 4), torch.nn.Linear(3, 8)

        def forward(self, x):
            return self.head(self.second(self.first(x).relu()).relu())

    model = Model()
    first, second = cuttable_weights(model)
    assert (first, second) == (model.first.weight, model.second.weight)
    optimizer = CSGD(cuttable_weights(model), lr=0.1, sparsity=0.5, structure="filter")
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    assert [len(layer.weight) for layer in (export_pruned(model).first, export_pruned(model).second)] == [4, 2]


@pytest.mark.parametrize(("pooling", "count"), [
    ({"padding": 1}, 0), ({"divisor_override": 5}, 0), ({"padding": 1, "count_include_pad": False}, 1), ({}, 1),
], ids=str)  # fmt: skip
def test_cuttable_weights_are_not_in_front_of_pooling_that_counts_its_padding(pooling, count):
    """There a dead filter is no constant."""
    first, norm, last = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 1)
    model = torch.nn.Sequential(first, norm, torch.nn.ReLU(), torch.nn.AvgPool2d(3, 2, **pooling), last)
    assert len(cuttable_weights(model)) == count


def test_cuttable_weights_refuses_what_export_pruned_refuses():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].register_forward_hook(lambda module, inputs, output: None)
    for function in (cuttable_weights, export_pruned):
        with pytest.raises(TypeError, match="0 has"):
            function(model)
        with pytest.raises(TypeError, match="model must be"):
            function(None)
