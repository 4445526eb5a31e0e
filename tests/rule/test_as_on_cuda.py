# SPDX-License-Identifier: Apache-2.0
"""The reference has the bits of the rule on a GPU, too: it uses no operator of PyTorch that differs there."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from csgd_cuda import CSGD, calibrate_grad, hard_threshold_
from csgd_cuda.distributed import clip_and_block, codes, coding, exchange
from csgd_cuda.distributed.codes import SIGNIFICANT_BITS, most_ranks, unit_of
from csgd_cuda.distributed.shards import ShardLayout

from ..as_on_cuda import AsOnCuda
from ..helpers import (
    DTYPES,
    assert_same_bits,
    edge_values,
    heavy_tailed,
    laid_out,
    make_params,
    snapshot,
    step_operator,
)

REFERENCE = coding.choose_coding(torch.device("cpu"), False)


def assert_same_on_cuda(run, *given):
    """``run`` computes something with the reference, of copies of ``given``; returns tensors, in any structure."""
    expected = run(*copy.deepcopy(given))
    copies = copy.deepcopy(given)
    with AsOnCuda():
        got = run(*copies)
    expected, got = (tree_leaves(each) for each in (expected, got))
    assert len(expected) == len(got) > 0
    for k, (a, b) in enumerate(zip(expected, got, strict=True)):
        assert_same_bits(a, b, f"result {k}")
    return got


def awkward(shapes, dtype, seed):
    """Gradients for each shape, in the first steps without Inf and NaN, which would spread."""
    generator = torch.Generator().manual_seed(seed)
    return [(heavy_tailed if seed < 2 else edge_values)(shape, generator, dtype) for shape in shapes]


STEPS = [
    {"momentum": 0.9, "weight_decay": 0.01, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True, "maximize": True},
    {"lipschitz": 0.3, "calibration": 3.7, "rounding": "nearest"},
    {"lr": torch.tensor(0.3), "bound_decay": 0.9, "grad_scale": torch.tensor(3.0), "found_inf": torch.tensor(0.0)},
]
SHAPES = [(700,), (3, 5), (3, 5), (0,), (4, 6, 5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", STEPS, ids=list)
def test_step(dtype, options):
    def run(params, grads, options):
        of_amp = {name: options.pop(name, None) for name in ("grad_scale", "found_inf")}
        optimizer = CSGD(params, fused=False, seed=5, **{"lr": 0.1, **options})
        optimizer.grad_scale, optimizer.found_inf = of_amp.values()
        for of_step in grads:
            for param, grad in zip(params, of_step, strict=True):
                param.grad = grad
            optimizer.step()
        return [tensor for _, tensor in snapshot(params, optimizer)]

    params = make_params(SHAPES, dtype)
    params[-1] = laid_out(params[-1].detach(), "last dimension first").requires_grad_()
    assert_same_on_cuda(run, params, [awkward(SHAPES, dtype, step) for step in range(4)], options)


def test_step_of_a_shard():
    def run(param, grad, step, bound):
        shard = ShardLayout(offset=7, run_length=10, run_stride=30, group_runs=2, group_stride=90)
        step_operator([param], [grad], [], [step], [bound], shards=[shard], lr=0.1)
        return param, step, bound

    assert_same_on_cuda(run, *awkward([(6, 10)] * 2, torch.bfloat16, 0), torch.tensor(3), torch.tensor(0.7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"lipschitz": 0.3, "calibration": 3.7}, {"channel_dim": 1}], ids=str)
def test_layer(dtype, options):
    def run(grads, state):
        return [calibrate_grad(grad, **options, **state, fused=False) for grad in grads], state

    state = {"index": torch.tensor(3), "step": torch.tensor(0), "tally": torch.zeros(5, dtype=torch.int64)}
    if "lipschitz" not in options:
        channels = (7,) if options else ()
        state["lipschitz_bound"] = torch.zeros(channels, dtype=torch.float64)
        state["tally"] = torch.zeros(4 + (7 if options else 1), dtype=torch.int64)
    assert_same_on_cuda(run, [*awkward([(5, 7, 9)], dtype, 0), *awkward([(5, 7, 9)] * 2, dtype, 2)], state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", ["element", "filter", "2:4"])
def test_hard_threshold(dtype, structure):
    def run(params, buffers, masks):
        keeps = {"element": [50, 30], "filter": [3, 11], "2:4": []}[structure]
        options = {"structure": structure, "found_inf": torch.zeros(1), "fused": False}
        hard_threshold_(params, keeps, momentum_buffers=buffers, masks=masks, **options)
        return params, buffers, masks

    params, buffers = (awkward([(6, 8, 3), (40, 4)], dtype, seed) for seed in (2, 3))
    masks = [torch.arange(param.numel()).view(param.shape) % 5 > 0 for param in params]
    masks = [mask[(slice(None), *[0] * (mask.dim() - 1))] if structure == "filter" else mask for mask in masks]
    assert_same_on_cuda(run, params, buffers, [mask.clone() for mask in masks])


def many_sums(ranks):
    """Sums of codes, plus the number of ranks: each possible one in each place of a word, and others before many 0."""
    radix, places = 2 * ranks + 1, coding.digits_per_word(2 * ranks + 1)
    others = torch.randint(-radix, radix, (places, 2000), generator=torch.Generator().manual_seed(ranks)).clamp_(min=0)
    return torch.cat([torch.arange(radix).expand(places, -1), others], dim=1).reshape(1, -1)


def decoded(digits, ranks):
    return coding.unpack(coding.pack(digits, 2 * ranks + 1), 2 * ranks + 1, digits.shape[1])


@pytest.mark.parametrize("first", [1, 101, 201])
def test_sums_of_the_codes_of_up_to_300_ranks(first):
    for ranks in range(first, first + 100):
        digits = many_sums(ranks)
        (got,) = assert_same_on_cuda(decoded, digits, ranks)
        assert torch.equal(got.to(torch.int64), digits), f"{ranks} ranks"


SIZES = torch.tensor([0.0, torch.inf, 2.0**-149, 3e38, *range(1, 4001)])


@pytest.mark.parametrize("dtype", SIGNIFICANT_BITS, ids=str)
def test_bounds_of_up_to_300_ranks(dtype):
    for ranks in range(1, min(300, most_ranks(dtype)) + 1):
        assert_same_on_cuda(unit_of, SIZES, ranks, dtype)


class Alone:
    """The wire of one process in the place of ``world_size`` processes, which all have its gradients."""

    def __init__(self, world_size):
        self.world_size, self.rank = world_size, 0

    def largest(self, values):
        return values

    def from_all(self, tensor):
        return torch.stack([tensor] * self.world_size)

    def messages_from_all(self, message):
        return [message] * self.world_size

    def messages_between(self, messages):
        return [messages[self.rank]] * self.world_size

    def reduce_shards(self, shards, reduce):
        return torch.stack([reduce(torch.stack([row] * self.world_size)) for row in shards])


LENGTHS = [(1,), (500,), (77,), (20000,)]


@pytest.mark.parametrize("dtype", SIGNIFICANT_BITS, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 24, 75])
@pytest.mark.parametrize(
    "options", [{}, {"clip": 1.5}, {"block": 32}, {"clip": 1.5, "block": 32}, {"clip": 1.5, "compact": True}], ids=str
)
def test_exchange(options, ranks, dtype, monkeypatch):
    monkeypatch.setattr(clip_and_block, "_NORM_LANES", 5000)  # so that there are several numbers in each

    def run(grads):
        given = {"clip": None, "block": None, **options}
        exchange.average_as_codes(Alone(ranks), REFERENCE, grads, [*range(len(grads))], seed=7, step=3, **given)
        return grads

    assert_same_on_cuda(run, awkward(LENGTHS, dtype, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [1, 3, 10, 49])
def test_plain_average(ranks, dtype):
    def run(grads):
        exchange.average_plainly(Alone(ranks), grads)
        return grads

    assert_same_on_cuda(run, awkward(LENGTHS, dtype, 0))


def divided_by_number(values, divisor):
    return values / divisor


def test_a_division_by_a_number_is_found(monkeypatch):
    """By the sums of some numbers of ranks, and by the bounds of others."""
    monkeypatch.setattr(coding, "divided", divided_by_number)
    monkeypatch.setattr(codes, "divided", divided_by_number)
    differ = {decoded: [], unit_of: []}
    for ranks in range(1, 100):
        for run, *given in ((decoded, many_sums(ranks), ranks), (unit_of, SIZES, ranks, torch.float32)):
            try:
                assert_same_on_cuda(run, *given)
            except AssertionError:
                differ[run].append(ranks)
    assert differ[decoded][:5] == [24, 51, 53, 80, 93]
    assert differ[unit_of][:3] == [75, 77, 91]


OTHERWISE = {
    "alpha": lambda x: torch.add(x, x, alpha=3),
    "alpha in place": lambda x: x.sub_(x, alpha=3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.1),
    "addcdiv": lambda x: x.addcdiv_(x, x),
    "lerp": lambda x: torch.lerp(x, x, 0.3),
    "mean": lambda x: x.mean(),
    "sum": lambda x: x.sum(0),
    "norm": torch.linalg.vector_norm,
    "matrix product": lambda x: x @ x,
    "floor division": lambda x: x // 3,
    "remainder": lambda x: x % 3,
    "power": lambda x: x**0.3,
    "exp": torch.exp,
    "reciprocal": lambda x: 3 / x,
    "number and 16 bits": lambda x: x.bfloat16() * 0.3,
    "conversion beyond the range": lambda x: (x * 1e9).to(torch.int32),
    "of all tensors": lambda x: torch._foreach_add([x, x], [x, x]),
}


@pytest.mark.parametrize("operation", OTHERWISE)
def test_operators_that_differ_on_a_gpu_are_refused(operation):
    with pytest.raises(AssertionError), AsOnCuda():
        OTHERWISE[operation](torch.tensor([3.0, 5.0]))


class Mixed(TorchDispatchMode):
    """Notes the operators in which a float of the CPU meets tensors of the device meta, which stands for a GPU.

    On a GPU such a float is a number.
    """

    def __init__(self):
        super().__init__()
        self.found, self.calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.is_floating_point()}
        self.calls += "meta" in devices
        if len(devices) > 1 and func.overloadpacket.__name__ not in ("copy_", "_to_copy"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_float_of_the_cpu_meets_tensors_of_a_gpu():
    meta = torch.device("meta")
    params = make_params(SHAPES, torch.bfloat16, meta)
    optimizer = CSGD(params, lr=torch.tensor(0.1), momentum=0.9, weight_decay=0.1, sparsity=0.5, fused=False)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    for param in params:
        param.grad = torch.empty_like(param)
    state = {"index": torch.tensor(3, device=meta), "step": torch.tensor(0, device=meta)}
    grads = [torch.empty(n, device=meta) for (n,) in LENGTHS]
    with Mixed() as mixed:
        optimizer.step()
        calibrate_grad(params[0].grad, **state, lipschitz=0.3, fused=False)
        exchange.average_plainly(Alone(3), grads)
        units = unit_of(torch.stack([exchange._size(grad, 1.5) for grad in grads]), 3, torch.float32)
        for grad, unit in zip(grads, units, strict=True):
            clip_and_block.block_exponents(grad, 32, torch.empty(1, device=meta), unit, 3)
        words = REFERENCE.pack(torch.empty(sum(n for (n,) in LENGTHS), dtype=torch.uint8, device=meta), 3)
        REFERENCE.decode(REFERENCE.add(words).expand(3, -1), units, grads)
    assert mixed.calls > 100
    assert not mixed.found


def test_a_float_of_the_cpu_is_found():
    with Mixed() as mixed:
        torch.empty(3, device="meta") / torch.tensor(3.0)
    assert mixed.found == ["aten.div.Tensor"]
