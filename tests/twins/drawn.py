# SPDX-License-Identifier: Apache-2.0
"""What random sequences are made of: shapes, values, options, and the hypothesis strategies that draw them."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import DTYPES, OPTIMIZERS, heavy_tailed
from .guarded import LAYOUTS

SHAPES = [(n,) for n in (0, 1, 7, 8, 9, 127, 128, 129, 255, 256, 257, 300, 1000)]
SHAPES += [(), (7, 0), (1, 8, 1), (3, 43), (16, 16), (2, 3, 4, 5), (2, 8, 4, 4)]
LARGE = [(16385,), (129, 255)]  # more than a chunk of the CPU kernel, and enough to wake its threads


class TensorOf(NamedTuple):
    """An option given as a tensor, of which each twin has its own."""

    value: float | list[float]
    dtype: torch.dtype


_OPTIONS = {
    "lr": [
        0.1, 0.0, 1.0, TensorOf(0.1, torch.float32), TensorOf(0.3, torch.float64), TensorOf(0.3, torch.bfloat16),
        TensorOf(2, torch.int64),
    ],
    "weight_decay": [0, 0.1],
    "maximize": [False, True],
    "calibration": [1.0, 0, 0.25, 4],
    "lipschitz": [None, 0.7, 0.0],
    "bound_decay": [0.99, 0.0, 0.5, 1],
    "rounding": ["stochastic", "nearest"],
    "seed": [0, 5, 2**32, 2**64 - 1],
}  # fmt: skip
OPTIONS = {
    CSGD: {"momentum": [0.9, 0, 0.5], "dampening": [0, 0.5, 1.0], "nesterov": [False, True], **_OPTIONS},
    CalibratedAdamW: {"betas": [(0.9, 0.999), (0.5, 0.75), (0.0, 0.0)], "eps": [1e-8, 1e-8, 1e-3, 0], **_OPTIONS},
}
# Refused for a new group, but not by a step: see csgd_cuda/optim/options.py.
_ODD = {"lr": [-1e-19, -0.1, TensorOf(-0.1, torch.float32)], "weight_decay": [-0.1]}
ODD = {CSGD: {"momentum": [-0.5], **_ODD}, CalibratedAdamW: _ODD}
_INVALID = {
    "lr": [float("inf"), float("nan"), TensorOf(-float("inf"), torch.float32), TensorOf([0.1, 0.2], torch.float32)],
    "weight_decay": [float("nan")],
    "calibration": [float("inf")],
    "lipschitz": [-1.0],
    "bound_decay": [1.5],
    "rounding": ["up"],
    "seed": [-1, 2**64, 1.5],
    "differentiable": [True],
    "first_index": [-1, 2**32, 1.5],
}
INVALID = {
    CSGD: {"momentum": [float("nan")], "dampening": [float("inf")], **_INVALID},
    CalibratedAdamW: {"betas": [(1.0, 0.9), (0.9, -0.1), (0.9,)], "eps": [-1e-8], "amsgrad": [True], **_INVALID},
}
# Of the first group; the others follow with room for their parameters.
FIRST_INDICES = [None, 40, 2**31 - 1, 2**32 - 1000]
INDICES_OF_A_GROUP = 20
# grad_scale and found_inf of a step; GradScaler sums found_inf over devices.
SCALES = [(2.0, 0.0), (1024.0, 0.0), (None, 0.0), (2.0, None), (0.0, 1.0), (1.0, 2.0), (None, 1.0)]


def of_its_optimizer(strategies):
    """The strategy of the machine's optimizer, among ``strategies`` by optimizer."""
    return st.runner().flatmap(lambda machine: strategies[machine.optimizer_class])


def one_of_its(choices):
    """``choices``: lists by optimizer."""
    return of_its_optimizer({optimizer: st.sampled_from(list(values)) for optimizer, values in choices.items()})


def one_option_of(*tables):
    """(name, value) of an option; ``tables``: by optimizer, from names to values."""
    return one_of_its(
        {
            optimizer: [
                (name, value) for table in tables for name in table[optimizer] for value in table[optimizer][name]
            ]
            for optimizer in tables[0]
        }
    )


changes, bad_changes = one_option_of(OPTIONS, ODD), one_option_of(INVALID)
some = st.integers(0, 11)  # of the parameters or groups, counted round and round
seeds = st.integers(0, 2**16)
layouts = st.sampled_from(LAYOUTS)
kinds = st.sampled_from(["heavy", "heavy", "heavy", "special", "zero", "tiny"])
shapes = st.integers(0, 59).flatmap(lambda k: st.sampled_from(LARGE if k == 37 else SHAPES))
tensors = st.lists(st.tuples(shapes, layouts, st.sampled_from(DTYPES), seeds), min_size=1, max_size=3)


def of_new_group(group):
    """Nesterov where the constructor takes it; a change of options may come to it with others, too."""
    if group.get("nesterov"):
        group = {**group, "nesterov": group["momentum"] > 0 and group["dampening"] == 0}
    return group


def groups_with(table):
    drawn = {name: st.sampled_from(values) for name, values in table.items() if name != "lr"}
    return st.fixed_dictionaries(drawn).map(of_new_group)


_options_of = {optimizer: groups_with(table) for optimizer, table in OPTIONS.items()}
options = of_its_optimizer(_options_of)
# (optimizer, [(tensors, options)]) of a machine's start.
starts = st.sampled_from(OPTIMIZERS).flatmap(
    lambda optimizer: st.tuples(
        st.just(optimizer), st.lists(st.tuples(tensors, _options_of[optimizer]), min_size=1, max_size=2)
    )
)

pruning = st.fixed_dictionaries(
    {
        "sparsity": st.sampled_from([0.5, 0.9]), "structure": st.sampled_from(["element", "filter"]),
        "regrow": st.booleans(), "threshold_every": st.integers(1, 2),
        "dropped_momentum": st.sampled_from(["clear", "keep"]),
    }
)  # fmt: skip

SPECIAL = [0.0, -0.0, 1e-45, -3e-42, 1e-310, 1e-7, 6e4, 1e30, float("inf"), -float("inf"), float("nan")]


def make_values(kind, shape, dtype, seed):
    """Gradients or parameters: "zero", "tiny" (subnormal in float32), "heavy" tailed, or that with "special" values."""
    generator = torch.Generator().manual_seed(seed)
    values = heavy_tailed(shape, generator, torch.float64)
    if kind == "special":
        pick = torch.randint(0, 8 * len(SPECIAL), shape, generator=generator)
        special = torch.tensor(SPECIAL, dtype=torch.float64)[pick.clamp(max=len(SPECIAL) - 1)]
        values = torch.where(pick < len(SPECIAL), special, values)
    return (values * {"zero": 0.0, "tiny": 1e-40}.get(kind, 1.0)).to(dtype)
