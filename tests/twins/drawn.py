# SPDX-License-Identifier: Apache-2.0
"""What random sequences are made of: shapes, values, options, and the hypothesis strategies that draw them."""

import torch
from hypothesis import strategies as st

from ..helpers import DTYPES, heavy_tailed
from .guarded import LAYOUTS

SHAPES = [(n,) for n in (0, 1, 7, 8, 9, 127, 128, 129, 255, 256, 257, 300, 1000)]
SHAPES += [(), (7, 0), (1, 8, 1), (3, 43), (16, 16), (2, 3, 4, 5), (2, 8, 4, 4)]
LARGE = [(16385,), (129, 255)]  # more than a chunk of the CPU kernel, and enough to wake its threads

OPTIONS = {
    "lr": [0.1, 0.0, 1.0, (0.1, torch.float32), (0.3, torch.float64), (0.3, torch.bfloat16), (2, torch.int64)],
    "momentum": [0.9, 0, 0.5],
    "dampening": [0, 0.5, 1.0],
    "nesterov": [False, True],
    "weight_decay": [0, 0.1],
    "maximize": [False, True],
    "calibration": [1.0, 0, 0.25, 4],
    "lipschitz": [None, 0.7, 0.0],
    "bound_decay": [0.99, 0.0, 0.5, 1],
    "rounding": ["stochastic", "nearest"],
    "seed": [0, 5, 2**32, 2**64 - 1],
}
# Refused for a new group, but not by a step: see csgd_cuda/options.py.
ODD = {
    "lr": [-1e-19, -0.1, (-0.1, torch.float32)],
    "momentum": [-0.5],
    "weight_decay": [-0.1],
}
INVALID = {
    "lr": [float("inf"), float("nan"), (-float("inf"), torch.float32), ([0.1, 0.2], torch.float32)],
    "momentum": [float("nan")],
    "dampening": [float("inf")],
    "weight_decay": [float("nan")],
    "calibration": [float("inf")],
    "lipschitz": [-1.0],
    "bound_decay": [1.5],
    "rounding": ["up"],
    "seed": [-1, 2**64, 1.5],
    "differentiable": [True],
    "first_index": [-1, 2**32, 1.5],
}
# Of the first group; the others follow with room for their parameters.
FIRST_INDICES = [None, 40, 2**31 - 1, 2**32 - 1000]
INDICES_OF_A_GROUP = 20
# grad_scale and found_inf of a step; GradScaler sums found_inf over devices.
SCALES = [(2.0, 0.0), (1024.0, 0.0), (None, 0.0), (2.0, None), (0.0, 1.0), (1.0, 2.0), (None, 1.0)]
CHANGES = [(name, value) for options in (OPTIONS, ODD) for name, values in options.items() for value in values]
BAD_CHANGES = [(name, value) for name, values in INVALID.items() for value in values]

some = st.integers(0, 11)  # of the parameters or groups, counted round and round
seeds = st.integers(0, 2**16)
layouts = st.sampled_from(LAYOUTS)
kinds = st.sampled_from(["heavy", "heavy", "heavy", "special", "zero", "tiny"])
shapes = st.integers(0, 59).flatmap(lambda k: st.sampled_from(LARGE if k == 37 else SHAPES))
tensors = st.lists(st.tuples(shapes, layouts, st.sampled_from(DTYPES), seeds), min_size=1, max_size=3)


def of_new_group(group):
    """Nesterov where the constructor takes it; a change of options may come to it with others, too."""
    return {**group, "nesterov": group["nesterov"] and group["momentum"] > 0 and group["dampening"] == 0}


options = st.fixed_dictionaries(
    {name: st.sampled_from(values) for name, values in OPTIONS.items() if name != "lr"}
).map(of_new_group)

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
