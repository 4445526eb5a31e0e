# SPDX-License-Identifier: Apache-2.0
"""The cases of print_bits.cpp as the package computes them, from the arrays that the program wrote before it ran."""

import torch

from csgd_cuda import calibrate_grad, hard_threshold_
from csgd_cuda.distributed.coding import choose_coding
from csgd_cuda.optim.direction import ADAMW, SGD

from ..helpers import step_operator

SEED = 0xFEDCBA9876543210
DIRECTIONS = {
    "csgd": {
        "plain": {},
        "decay": {"weight_decay": 0.01},
        "momentum": {"momentum": 0.9},
        "momentum-decay": {"momentum": 0.9, "weight_decay": 0.01},
        "nesterov": {"momentum": 0.9, "nesterov": True},
        "nesterov-decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    },
    "adamw": {
        "plain": {"weight_decay": 0.0},
        "decay": {"weight_decay": 0.01},
        "no-eps": {"weight_decay": 0.0, "eps": 0.0},
    },
}
CALIBRATIONS = {
    "c=0": {"calibration": 0.0},
    "c=0.3": {"calibration": 0.3},
    "l=1e6": {"calibration": 1.0, "lipschitz": 1e6},
}
WAYS = {
    "whole": {},
    "shard": {"shards": [(2**35 + 5, 37, 50, 3, 1000)]},
    "scaled": {"grad_scale": torch.tensor([3.0]), "maximize": True, "lr": torch.tensor(0.01, dtype=torch.float64)},
}
SHAPES = {"one": (), "inner=1": (7 * 17, 20), "inner=7": (17, 20, 7)}
THRESHOLDED = ("data", "momentum_buffer")


def step(optimizer, arrays, fused, dtype, direction, rounding, calibration, way, fill):
    """Three steps, in the arrays."""
    buffers = [[array] for name, array in arrays.items() if name.startswith("buffer")]
    which = SGD if optimizer == "csgd" else ADAMW
    buffers = buffers or [[] for _ in which.buffers]
    options = {"lr": 0.1, "rounding": rounding, "seed": SEED, "indices": [7], "direction": which, "fused": fused}
    options |= DIRECTIONS[optimizer][direction] | CALIBRATIONS[calibration] | WAYS[way]
    bounds = [arrays["bound"]] if "bound" in arrays else []
    for _ in range(3):
        step_operator([arrays["param"]], [arrays["grad"]], *buffers, [arrays["step"]], bounds, **options)


def calibrated(arrays, fused, dtype, rounding, channels, calibration, fill):
    shape = SHAPES[channels]
    bounds = arrays.get("bounds")
    if bounds is not None and not shape:
        bounds = bounds.view(())
    state = {"index": arrays["index"], "step": arrays["step"], "lipschitz_bound": bounds, "tally": arrays["tally"]}
    options = {"rounding": rounding, "seed": SEED, "rank": 3, "channel_dim": 1, "fused": fused}
    grad = arrays["grad"].view(shape or -1)
    for out in ("out0", "out1"):
        arrays[out] = calibrate_grad(grad, **state, **CALIBRATIONS[calibration], **options).flatten()
    arrays["tally"][2:] = 0  # scratch space


def exchanged(arrays, fused, dtype, ranks, bound, fill):
    coding, ranks = choose_coding(torch.device("cpu"), fused), int(ranks)
    grad, bounds = arrays["grad"], arrays["bound"]
    codes = [
        coding.encode([grad], bounds[:1], [rank // 2], seed=SEED, step=5, antithetic=rank % 2 == 1)
        for rank in range(ranks)
    ]
    words = torch.stack([coding.pack(of_rank, ranks) for of_rank in codes])  # [from rank, to rank, word]
    sums = torch.stack([coding.add(words[:, to].contiguous()) for to in range(ranks)])
    arrays["decoded"] = torch.empty_like(grad)
    coding.decode(sums, bounds[1:], [arrays["decoded"]])
    arrays |= {"codes": torch.cat(codes), "words": words.flatten(), "sums": sums.flatten()}
    del arrays["own"], arrays["digits"]  # room for what lies between two operations


def thresholded(arrays, fused, dtype, structure, fill):
    count = 2 if structure == "together" else 1
    shape = (11, 12, 9) if structure in ("filter", "2:4") else (-1,)
    params, momentum_buffers = ([arrays[f"{name}{k}"].view(shape) for k in range(count)] for name in THRESHOLDED)
    masks = [torch.ones(param.shape, dtype=torch.bool) for param in params]
    if structure in ("together", "2:4"):  # of the last tensor
        masks[-1] = arrays[f"mask{count - 1}"].view(torch.bool).view(shape)
    keeps = [params[0].numel() // 3]
    if structure == "2:4":
        keeps = []
    elif structure == "filter":  # the program's channels are dimension 1
        params, momentum_buffers = ([t.transpose(0, 1) for t in tensors] for tensors in (params, momentum_buffers))
        masks, keeps = [arrays["mask0"].view(torch.bool)], [6]
        del arrays["norms"], arrays["kept_norms"]
    of_package = structure if structure in ("filter", "2:4") else "element"
    options = {"structure": of_package, "across": structure == "together", "fused": fused}
    hard_threshold_(params, keeps, momentum_buffers=momentum_buffers, masks=masks, **options)


def run(case, arrays, fused):
    """Runs a case of the program, by its name, in the arrays; those that the package does not compute are taken out."""
    name, *words = case.split()
    if name in DIRECTIONS:
        step(name, arrays, fused, *words)
        del arrays["tally"]  # of the optimizer's own
    else:
        {"calibrate_grad": calibrated, "exchange": exchanged, "hard_threshold": thresholded}[name](
            arrays, fused, *words
        )
