# SPDX-License-Identifier: Apache-2.0
"""Ranks that were set up differently raise an error that names the difference and both values, on every rank."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from csgd_cuda import CSGD
from csgd_cuda.distributed import CalibratedHookState, calibrated_hook, check_ranks_agree

from .launch import Given, exchanged, run, with_hook

SHAPES = [(4, 5), (6,)]


def optimizers(rank):
    """{what differs on rank 1: an optimizer}"""
    odd = rank == 1

    def make(shapes=SHAPES, dtype=torch.float32, **options):
        params = [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        return CSGD(params, **{"lr": 0.1, "momentum": 0.9, **options})

    def stepped(steps, scale=1.0):
        optimizer = make()
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.full_like(param, scale)
        for _ in range(steps):
            optimizer.step()
        return optimizer

    two_groups = make()
    if odd:
        two_groups.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    return {
        "nothing": make(),
        "nothing, stepped": stepped(3),
        "seed": make(seed=2 if odd else 1),
        "calibration": make(calibration=0.5 if odd else 1.0),
        "lr": make(lr=torch.tensor(0.25 if odd else 0.5)),
        "shape": make([(4, 5), (7,)] if odd else SHAPES),
        "dtype": make(dtype=torch.bfloat16 if odd else torch.float32),
        "number": make(SHAPES[:1] if odd else SHAPES),
        "groups": two_groups,
        "step": stepped(3 if odd else 2),
        "no step": stepped(1 if odd else 0),
        "bound": stepped(1, 0.5 if odd else 1.0),
    }


OPTIMIZER_MESSAGES = {
    "nothing": None,
    "nothing, stepped": None,
    "seed": "seed of parameter group 0 is 1 on rank 0, but 2 on rank 1",
    "calibration": "calibration of parameter group 0 is 1.0 on rank 0, but 0.5 on rank 1",
    "lr": "lr of parameter group 0 is 0.5 on rank 0, but 0.25 on rank 1",
    "shape": "parameter 1 is float32 [6] on rank 0, but float32 [7] on rank 1",
    "dtype": "parameter 0 is float32 [4, 5] on rank 0, but bfloat16 [4, 5] on rank 1",
    "number": "the number of parameters in groups 0 to 0 is 2 on rank 0, but 1 on rank 1",
    "groups": "the number of parameter groups is 1 on rank 0, but 2 on rank 1",
    "step": "step of parameter 0 is 2 on rank 0, but 3 on rank 1",
    "no step": "step of parameter 0 is missing on rank 0, but 1 on rank 1",
    "bound": "lipschitz_bound of parameter 0 is 1.0 on rank 0, but 0.5 on rank 1",
}


def message_of(function, *args):
    try:
        function(*args)
    except (ValueError, TypeError) as error:
        return str(error)


def messages_about_optimizers(rank):
    return {name: message_of(check_ranks_agree, optimizer) for name, optimizer in optimizers(rank).items()}


def test_differing_optimizers_are_told_apart():
    for messages in run(3, messages_about_optimizers):
        assert messages == {
            name: expected and f"the ranks disagree: {expected}" for name, expected in OPTIMIZER_MESSAGES.items()
        }


class Renamed(Given):
    def named_parameters(self, *args, **kwargs):
        return [(name.replace("of.", "other."), param) for name, param in super().named_parameters(*args, **kwargs)]


def hooks(rank):
    """{what differs on rank 1: (model, state)}"""
    odd = rank == 1
    made = {
        "nothing": with_hook(SHAPES),
        "seed": with_hook(SHAPES, seed=int(odd)),
        "clip": with_hook(SHAPES, clip=2.0 if odd else None),
        "skip_below": with_hook(SHAPES, skip_below=7 if odd else 0),
        "skip": with_hook(SHAPES, skip=["of.1"] if odd else []),
        "block": with_hook(SHAPES, block=16 if odd else 32),
        "step": with_hook(SHAPES),
    }
    saved = made["step"][1].state_dict()
    made["step"][1].load_state_dict({**saved, "step": 5 if odd else 4})
    model = DistributedDataParallel((Renamed if odd else Given)(SHAPES))
    made["names"] = model, CalibratedHookState(model)
    model.register_comm_hook(made["names"][1], calibrated_hook)
    made["float64"] = with_hook(SHAPES, torch.float64)
    model = DistributedDataParallel(Given(SHAPES))
    made["another module"] = model, CalibratedHookState(Given(SHAPES))
    model.register_comm_hook(made["another module"][1], calibrated_hook)
    return made


HOOK_MESSAGES = {
    "nothing": None,
    "seed": "the ranks disagree: seed is 0 on rank 0, but 1 on rank 1",
    "clip": "the ranks disagree: clip is None on rank 0, but 2.0 on rank 1",
    "skip_below": "the ranks disagree: skip_below is 0 on rank 0, but 7 on rank 1",
    "skip": "the ranks disagree: skip is [] on rank 0, but ['of.1'] on rank 1",
    "block": "the ranks disagree: block is 32 on rank 0, but 16 on rank 1",
    "step": "the ranks disagree: step is 4 on rank 0, but 5 on rank 1",
    "names": "the ranks disagree: parameter 0 is of.0 float32 [4, 5] on rank 0, but other.0 float32 [4, 5] on rank 1",
    "float64": "of.0 is float64 [4, 5]; calibrated_hook codes gradients in float32, bfloat16 and float16: "
    "name it in skip",
    "another module": "a parameter of float32 [4, 5] is not one of the module the state was made with",
}


def messages_of_hooks(rank):
    grads = [torch.ones(shape) for shape in SHAPES]
    return {name: message_of(exchanged, model, grads) for name, (model, _) in hooks(rank).items()}


def test_differing_hooks_fail_at_the_first_step():
    for messages in run(2, messages_of_hooks):
        assert messages == HOOK_MESSAGES


def step_beside_a_lost_rank(rank, in_exchange):
    """What the others see where rank 1 ends between two steps, or after the first half of an exchange."""
    model, _ = with_hook(SHAPES)
    grads = [torch.ones(shape) for shape in SHAPES]
    exchanged(model, grads)
    if rank == 1:
        if not in_exchange:
            os._exit(0)
        dist.all_gather = lambda *args, **options: os._exit(0)
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        exchanged(model, grads)
    return {"message": str(caught.value), "seconds": time.monotonic() - begin}


@pytest.mark.parametrize("in_exchange", [False, True], ids=["between steps", "in an exchange"])
def test_lost_rank_ends_in_an_error_of_torch(in_exchange):
    first, _ = run(2, step_beside_a_lost_rank, in_exchange, lost=[1])
    assert "onnection" in first["message"]  # gloo: "Connection closed by peer", or reset
    assert first["seconds"] < 10  # long before the timeout of the group
