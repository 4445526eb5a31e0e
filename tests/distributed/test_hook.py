# SPDX-License-Identifier: Apache-2.0
"""The communication hook: what comes out, on which ranks, after how many bytes. Each launch serves several checks."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from csgd_cuda.distributed import CalibratedHookState, calibrated_hook, codes

from ..conftest import need_kernel
from ..helpers import assert_same_bits, heavy_tailed
from .launch import Given, draws_of, exchanged, run, with_hook

SHAPES = [(1,), (7,), (3, 5), (1001,), (40, 21), (0,), (64, 65)]
NUMELS = [torch.Size(shape).numel() for shape in SHAPES]
SEED = 2**63 + 11


def given_gradients(rank, step, dtype=torch.float32, shapes=SHAPES):
    """Of one rank: of very different sizes over the parameters, and over the ranks; the first is zero on all."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    grads = [heavy_tailed(shape, generator) * 10.0**k * (1 + rank) for k, shape in enumerate(shapes, start=-4)]
    return [(grad * (k > 0)).to(dtype) for k, grad in enumerate(grads)]


def outputs(rank, dtype, steps, bucket_cap_mb, break_after=None, **options):
    """The exchanged gradients of each step; with a new model and a loaded state after ``break_after`` steps."""
    model, state = with_hook(SHAPES, dtype, bucket_cap_mb, seed=SEED, **options)
    out = []
    for step in range(steps):
        if step == break_after:
            saved = state.state_dict()
            model, state = with_hook(SHAPES, dtype, bucket_cap_mb)
            state.load_state_dict(saved)
        out += exchanged(model, given_gradients(rank, step, dtype))
    return {"grads": out, "state": state.state_dict()}


def outputs_of_all_kinds(rank, dtype):
    names = [f"of.{k}" for k in (1, 4)]
    return {
        "plain": outputs(rank, dtype, 3, 25),
        "small buckets": outputs(rank, dtype, 3, 0.001),
        "resumed": outputs(rank, dtype, 3, 25, break_after=2),
        "skipped": outputs(rank, dtype, 2, 25, skip=names, skip_below=16),
        "reference": outputs(rank, dtype, 3, 25, fused=False),
        "planes": outputs(rank, dtype, 3, 25, compact=True),
        "planes, small buckets": outputs(rank, dtype, 3, 0.001, compact=True, fused=False),
        "clipped": outputs(rank, dtype, 2, 25, clip=1.5),
        "clipped reference": outputs(rank, dtype, 2, 25, clip=1.5, fused=False),
        "blocks": outputs(rank, dtype, 3, 25, block=32),
        "blocks, small buckets": outputs(rank, dtype, 3, 0.001, block=32),
        "blocks reference": outputs(rank, dtype, 3, 25, block=32, fused=False),
        "blocks, clipped": outputs(rank, dtype, 2, 25, block=7, clip=1.5),
        "blocks and resumed": outputs(rank, dtype, 3, 0.001, break_after=2, block=32),
        "clipped and resumed": outputs(rank, dtype, 2, 0.001, break_after=1, clip=1.5),
    }


CASES = [(1, torch.float32), (2, torch.float32), (3, torch.float32), (4, torch.float32), (3, torch.bfloat16),
         (2, torch.float16)]  # fmt: skip


pytestmark = pytest.mark.xdist_group("hook")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} ranks, {case[1]}")
def got(request):
    """(world size, dtype, what each rank got)."""
    world_size, dtype = request.param
    return world_size, dtype, run(world_size, outputs_of_all_kinds, dtype)


def assert_same_outputs(a, b, what):
    assert len(a["grads"]) == len(b["grads"])
    for k, (x, y) in enumerate(zip(a["grads"], b["grads"], strict=True)):
        assert_same_bits(x, y, f"{what}, step {k // len(SHAPES)}, parameter {k % len(SHAPES)}")


def test_all_ranks_get_the_same_bits(got):
    _, _, ranks = got
    for kind, other in itertools.product(ranks[0], ranks[1:]):
        assert_same_outputs(ranks[0][kind], other[kind], kind)


def test_buckets_do_not_matter(got):
    """DistributedDataParallel itself orders them anew after its first step."""
    for kind, small in (("plain", "small buckets"), ("blocks", "blocks, small buckets")):
        assert_same_outputs(got[2][0][kind], got[2][0][small], small)


def test_planes_of_bits_give_the_bits_of_words(got):
    for kind in ("planes", "planes, small buckets"):
        assert_same_outputs(got[2][0]["plain"], got[2][0][kind], kind)


def test_kernels_and_reference_exchange_the_same_bits(got):
    need_kernel(torch.device("cpu"))
    for kind, reference in (("plain", "reference"), ("clipped", "clipped reference"), ("blocks", "blocks reference")):
        assert_same_outputs(got[2][0][kind], got[2][0][reference], reference)


def test_resumed_exchange_gives_the_same_bits(got):
    first = got[2][0]
    assert_same_outputs(first["plain"], first["resumed"], "resumed")
    assert first["plain"]["state"] == first["resumed"]["state"]
    assert first["plain"]["state"]["step"] == 3
    assert_same_outputs(first["clipped"], first["clipped and resumed"], "clipped and resumed")
    assert_same_outputs(first["blocks"], first["blocks and resumed"], "blocks and resumed")


def coded_by_hand(world_size, dtype, step, parameter, clip=None):
    """(T / W, the sum of all codes, the sum of all clipped values) from each rank's gradient, without any exchange."""
    grads = [given_gradients(rank, step, dtype)[parameter].flatten() for rank in range(world_size)]
    sizes = [grad.abs().max().to(torch.float32) for grad in grads]
    if clip is not None:
        rms = [(grad.to(torch.float64).square().mean().sqrt() * clip).to(torch.float32) for grad in grads]
        sizes = [torch.minimum(a, b) for a, b in zip(sizes, rms, strict=True)]
    unit = codes.unit_of(torch.stack(sizes).max(), world_size, dtype)
    total, clipped = torch.zeros(2, grads[0].numel(), dtype=torch.float64)
    for rank, grad in enumerate(grads):
        beyond = grad.to(torch.float64).abs() > unit * world_size
        which = {"seed": SEED, "step": torch.tensor(step), **draws_of(rank, parameter)}
        total += codes.encode(grad * ~beyond, unit * world_size, **which).to(torch.float64) - 1
        clipped += grad * beyond
    return unit, total, clipped


def test_mean_is_that_of_the_codes_exactly(got):
    world_size, dtype, ranks = got
    for step, k in itertools.product(range(3), range(len(SHAPES))):
        if not NUMELS[k]:
            continue
        unit, total, _ = coded_by_hand(world_size, dtype, step, k)
        result = ranks[0]["plain"]["grads"][step * len(SHAPES) + k].flatten()
        assert torch.equal(result.to(torch.float64), total * unit), f"step {step}, parameter {k}"
        assert (total.abs().max() > 0) == (k > 0)


def test_clipped_coordinates_arrive_as_they_are(got):
    world_size, dtype, ranks = got
    found = 0
    for step, k in itertools.product(range(2), range(len(SHAPES))):
        if not NUMELS[k]:
            continue
        unit, total, clipped = coded_by_hand(world_size, dtype, step, k, clip=1.5)
        found += int((clipped != 0).sum())
        result = ranks[0]["clipped"]["grads"][step * len(SHAPES) + k].flatten()
        expected = total * unit + clipped / world_size
        assert torch.equal(result, expected.to(dtype)), f"step {step}, parameter {k}"
    assert found > 100


def test_skipped_parameters_get_the_plain_mean(got):
    world_size, dtype, ranks = got
    for step, k in itertools.product(range(2), range(len(SHAPES))):
        mean = sum(given_gradients(r, step, dtype)[k].to(torch.float64) for r in range(world_size)) / world_size
        result = ranks[0]["skipped"]["grads"][step * len(SHAPES) + k]
        is_plain = k in (1, 4) or NUMELS[k] < 16
        assert torch.equal(result, mean.to(dtype)) == (is_plain or not mean.any())


def in_pairs(rank):
    """The gradient that pairs of ranks exchange, and what is said where the state is given another group."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = DistributedDataParallel(Given([(50,)]), process_group=pairs[rank // 2])
    model.register_comm_hook(CalibratedHookState(model), calibrated_hook)
    with pytest.raises(ValueError, match="process_group") as caught:
        CalibratedHookState(model, dist.group.WORLD)
    return exchanged(model, [torch.full((50,), 1.0 + rank // 2)])[0], str(caught.value)


def test_process_group_is_that_of_the_model():
    for rank, (grad, message) in enumerate(run(4, in_pairs)):
        assert grad.eq(1 + rank // 2).all()
        pair = [0, 1] if rank < 2 else [2, 3]
        assert message == f"process_group has the ranks [0, 1, 2, 3], but the DistributedDataParallel has {pair}"


def copied(rank):
    """What a model with the hook, its copies and its pickle hold, after a step; and what a copy of the state gives."""
    model, state = with_hook([(50,)])
    exchanged(model, [torch.ones(50)])
    copies = [copy.deepcopy(model), AveragedModel(model).module, pickle.loads(pickle.dumps(model))]
    other = DistributedDataParallel(copies[0].module)
    other.register_comm_hook(copies[0]._comm_hooks[0][1], calibrated_hook)
    pairs = [exchanged(m, given_gradients(rank, 1, shapes=[(50,)] * 2)[1:]) for m in (model, other)]
    return [c.module.of[0] for c in copies], pairs, state.step


def test_model_with_the_hook_can_be_copied():
    """For weights averaged over steps, torch.save of a model and the like."""
    for copies, (expected, got), step in run(2, copied):
        assert all(param.eq(0).all() for param in copies)
        assert_same_bits(expected[0], got[0])
        assert expected[0].any()
        assert step == 2


def gradient_with(rank, value):
    """One rank has ``value`` in one place of the first parameter."""
    model, _ = with_hook([(50,), (60,)])
    grads = [torch.ones(50), torch.ones(60)]
    if rank == 1:
        grads[0][3] = value
    return exchanged(model, grads)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradient_that_is_not_finite_is_so_on_all_ranks(value):
    for broken, sound in run(2, gradient_with, value):
        assert not broken.isfinite().any()
        assert torch.equal(sound, torch.ones(60))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be in"),
        ({"block": 0}, "block must be in 1 .*, got 0"),
        ({"block": 2.5}, "block must be None or an integer, got 2.5"),
        ({"block": 2**70}, "block must be in 1"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"clip": "4"}, "clip must be None or a finite number > 0, got '4'"),
        ({"compact": "yes"}, "compact must be True or False, got 'yes'"),
        ({"error_feedback": "yes"}, "error_feedback must be True or False, got 'yes'"),
        ({"skip": 3}, "skip must be a list of parameter names, got 3"),
        ({"clip": 0.0}, "clip must be None or a finite number > 0"),
        ({"clip": float("nan")}, "clip must be None or a finite number > 0"),
        ({"skip_below": -1}, "skip_below must be"),
        ({"skip": "of.0"}, "skip must be a list"),
        ({"skip": ["of.1"]}, "skip names 'of.1', which is not a parameter"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        CalibratedHookState(Given([(3,)]), **options)


def test_state_of_something_else_is_refused():
    state = CalibratedHookState(Given([(3,)]))
    with pytest.raises(ValueError, match="has no entry 'clip'"):
        state.load_state_dict({"step": 1, "seed": 0})
    saved = state.state_dict()
    for wrong, message in (({"step": "x"}, "step must be an integer"), ({"step": -3}, "step must be in 0")):
        with pytest.raises((ValueError, TypeError), match=message):
            state.load_state_dict({**saved, "seed": 7, **wrong})
    assert state.state_dict() == saved
    with pytest.raises(ValueError, match=r"skip names 'of\.9'"):
        state.load_state_dict({**state.state_dict(), "skip": ["of.9"]})


def test_saved_state_is_plain_python():
    """Numbers of numpy, as they come out of a sweep, included: torch.load refuses what is not plain."""
    state = CalibratedHookState(
        Given([(3,)]), seed=np.int64(3), block=np.int32(8), clip=np.float32(2), skip_below=np.uint8(1)
    )
    plain = {type(value) for value in state.state_dict().values()}
    assert plain == {int, float, list, bool, type(None)}


def test_state_of_an_earlier_version_has_no_error_feedback():
    state = CalibratedHookState(Given([(3,)]), compact=True, error_feedback=True)
    saved, new = state.state_dict(), ("compact", "error_feedback", "residuals")
    state.load_state_dict({name: value for name, value in saved.items() if name not in new})
    assert not any((state.compact, state.error_feedback))
