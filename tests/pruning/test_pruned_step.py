# SPDX-License-Identifier: Apache-2.0
"""The step's part in pruning: gradients that masks leave out, and counts that hard_threshold_ goes on from.

Both change nothing of what comes out: held against a step whose gradients were set to zero, and against a threshold
that counts by itself, bit for bit, on every backend.
"""

import re
import struct
from collections import Counter

import pytest
import torch

from csgd_cuda import csgd_, hard_threshold_
from csgd_cuda.pruned_step import BINS
from csgd_cuda.shards import ShardLayout

from ..conftest import need_kernel
from ..helpers import BACKENDS, DTYPES, LAYOUTS, assert_same_bits, edge_values, heavy_tailed, laid_out

# Around a GPU thread's eight, the CPU's tile (128), a pass of a CUDA block (2048), the CPU's chunk (16384) and two of
# them, from where on threads share them.
SIZES = [0, 1, 7, 8, 9, 127, 128, 129, 2047, 2048, 2049, 16383, 16384, 16385, 32768, 40001]
OPTIONS = [
    {"momentum": 0.0, "lipschitz": 0.5}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.5, "maximize": True, "calibration": 0.0, "rounding": "nearest"},
    {"momentum": 0.0, "weight_decay": 0.01, "scaled": True, "fresh_momentum": True},
]  # fmt: skip


class Call:
    """The tensors of a step on one device: gradients with NaN and Inf among them, masks with a third of False."""

    def __init__(self, shapes, dtype, device, options, layouts=("contiguous",)):
        generator = torch.Generator().manual_seed(len(shapes))
        self.options = {"lr": 0.1, **options}
        opmath = torch.float64 if dtype is torch.float64 else torch.float32
        layout = [layouts[k % len(layouts)] for k in range(len(shapes))]

        def place(values, k, at=0):
            return laid_out(values.to(device), layout[(k + at) % len(shapes)])

        self.params = [place(torch.randn(s, generator=generator).to(dtype), k) for k, s in enumerate(shapes)]
        self.grads = [place(edge_values(s, generator, dtype), k, 1) for k, s in enumerate(shapes)]
        self.masks = [place(torch.rand(s, generator=generator) < 0.67, k, 2) for k, s in enumerate(shapes)]
        momentum = self.options["momentum"] != 0
        self.momentum_buffers = [torch.ones_like(p) for p in self.params] if momentum else []
        self.steps = [torch.tensor(k % 2, device=device) for k in range(len(shapes))]
        fixed = "lipschitz" in options
        self.bounds = [] if fixed else [torch.tensor(0.5 * k, dtype=opmath, device=device) for k in range(len(shapes))]
        self.tallies = torch.zeros(len(shapes), 4, dtype=torch.int64, device=device)
        if self.options.pop("scaled", False):
            self.options["grad_scale"] = torch.tensor(3.0, device=device)

    def step(self, fused, **more):
        lists = (self.params, self.grads, self.momentum_buffers, self.steps, self.bounds)
        csgd_(*lists, tallies=self.tallies, fused=fused, **self.options, **more)
        return self

    def result(self):
        return [*self.params, *self.momentum_buffers, *self.steps, *self.bounds, self.tallies[:, 0]]


def digits(tensor, alive=None):
    """How often the first 11 bits of the keys occur, by the bits of one number after the other."""
    counts = Counter()
    double = tensor.dtype is torch.float64
    alive = [True] * tensor.numel() if alive is None else alive.reshape(-1).tolist()
    for value, is_alive in zip(tensor.reshape(-1).tolist(), alive, strict=True):
        if value != value:  # NaN: the quiet one
            first = (0x7FF8 if double else 0x7FC0) >> 5
        else:
            (bits,) = struct.unpack(">H", struct.pack(">d" if double else ">f", value)[:2])
            first = (bits & 0x7FFF) >> 5
        counts[1024 + first if is_alive else 0] += 1
    return [counts[k] for k in range(BINS)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_masked_gradients_count_as_zero_and_are_left_as_they_are(options, dtype):
    shapes = [(n,) for n in SIZES] + [(3, 4)] * 3
    results = []
    for device, fused in BACKENDS:
        call = Call(shapes, dtype, device, options)
        before = [grad.clone() for grad in call.grads]
        call.step(fused, masks=call.masks)
        for grad, old in zip(call.grads, before, strict=True):
            assert_same_bits(grad, old)
        results.append(call.result())
        zeroed = Call(shapes, dtype, device, options)
        hard_threshold_(zeroed.grads, None, masks=zeroed.masks, fused=fused)
        results.append(zeroed.step(fused).result())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["alive", "masked"])
def test_first_digits_are_counted(dtype, masked):
    shapes = [(n,) for n in SIZES]
    for device, fused in BACKENDS:
        call = Call(shapes, dtype, device, {"momentum": 0.9})
        plain = Call(shapes, dtype, device, {"momentum": 0.9})
        histograms = torch.ones(len(shapes), BINS, dtype=torch.int64, device=device)  # counts are added
        masks = call.masks if masked else []
        call.step(fused, masks=masks, histograms=histograms)
        plain.step(fused, masks=masks)
        for a, b in zip(call.result(), plain.result(), strict=True):
            assert_same_bits(a, b)
        for k, param in enumerate(call.params):
            expected = digits(param, masks[k] if masked else None)
            assert (histograms[k] - 1).tolist() == expected, f"{fused=}, {shapes[k]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_expanded_masks(dtype):
    """Parameters, gradients and masks laid out otherwise, not dense, or expanded from an entry for each filter."""
    shapes = [(6, 5, 4)] * 10
    for device, fused in BACKENDS:
        call = Call(shapes, dtype, device, {"momentum": 0.9}, LAYOUTS)
        masks = [*call.masks[:5], *(mask[:, :1, :1].expand(mask.shape) for mask in call.masks[5:])]
        zeroed = Call(shapes, dtype, device, {"momentum": 0.9}, LAYOUTS)
        for grad, mask in zip(zeroed.grads, masks, strict=True):
            grad.masked_fill_(~mask, 0)
        one = torch.zeros(1, BINS, dtype=torch.int64, device=device)
        call.step(fused, masks=masks, histograms=one)
        for a, b in zip(call.result(), zeroed.step(fused).result(), strict=True):
            assert_same_bits(a, b)
        rows = [digits(param, mask) for param, mask in zip(call.params, masks, strict=True)]
        assert one[0].tolist() == [sum(column) for column in zip(*rows, strict=True)]


def values(kind, numel, generator, dtype):
    if kind == "ties":
        return torch.randint(-2, 3, (numel,), generator=generator).to(dtype)
    if kind == "zeros":
        return torch.where(torch.rand(numel, generator=generator) < 0.8, -0.0, 1.5).to(dtype)
    return edge_values((numel,), generator, dtype) if kind == "specials" else heavy_tailed((numel,), generator, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["heavy tailed", "ties", "zeros", "specials"])
@pytest.mark.parametrize("masked", [False, True], ids=["alive", "masked"])
def test_thresholds_from_counts_are_those_without(kind, dtype, masked):
    """Per tensor and across, for k from none to all: a step with lr 0 counts values as they are."""
    generator = torch.Generator().manual_seed(7)
    sizes = [0, 1, 9, 300, 2049, 20000]
    tensors = [values(kind, n, generator, dtype) for n in sizes]
    masks = [torch.rand(n, generator=generator) < 0.5 for n in sizes] if masked else []
    for device, fused in BACKENDS:
        for across, keeps in (
            (False, [n // 10 for n in sizes]), (False, [max(n - 1, 0) for n in sizes]), (False, [0, 1, 9, 5, 1, 30000]),
            (True, [1]), (True, [5000]), (True, [sum(sizes) - 1]), (True, [sum(sizes)]),
        ):  # fmt: skip
            results = []
            for counted in (False, True):
                params, alive = ([t.to(device, copy=True) for t in each] for each in (tensors, masks))
                momentum = [torch.ones_like(p) for p in params]
                histograms = torch.zeros(len(keeps), BINS, dtype=torch.int64, device=device) if counted else None
                if counted:
                    steps = [torch.tensor(0, device=device) for _ in params]
                    grads = [torch.zeros_like(p) for p in params]
                    csgd_(params, grads, [], steps, [], lr=0.0, lipschitz=1.0, masks=alive, histograms=histograms,
                          fused=fused)  # fmt: skip
                given = None if histograms is None else histograms.clone()
                hard_threshold_(
                    params, keeps, momentum_buffers=momentum, masks=alive, across=across, histograms=histograms,
                    fused=fused,
                )  # fmt: skip
                assert given is None or torch.equal(given, histograms)
                results.append([*params, *momentum, *alive])
            for a, b in zip(*results, strict=True):
                assert_same_bits(a, b, f"{fused=} {across=} {keeps=}")


def test_kernels_go_on_from_the_counts(device):
    """They do not count anew: from counts that say that all is large, what is largest of all is not found."""
    need_kernel(device)
    param = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    histograms = torch.zeros(1, BINS, dtype=torch.int64, device=device)
    histograms[0, -1] = 4
    hard_threshold_([param], [1], histograms=histograms, fused=True)
    assert param.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_any_thread_and_instruction_set_counts_alike(compiled):
    results, threads, isa = [], torch.get_num_threads(), compiled.build_info()["cpu_isa"]
    try:
        for name in ("baseline", "avx2", "avx512"):
            if not compiled.set_cpu_isa(name):
                continue
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                call = Call([(100_001,), (40_000,)], torch.float32, "cpu", {"momentum": 0.9})
                histograms = torch.zeros(1, BINS, dtype=torch.int64)
                call.step(True, masks=call.masks, histograms=histograms)
                results.append([*call.result(), histograms])
    finally:
        torch.set_num_threads(threads)
        compiled.set_cpu_isa(isa)
    assert int(results[0][-1].sum()) == 140_001
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_makes_the_same_bits(dtype, compiled):
    isa, results = compiled.build_info()["cpu_isa"], []
    try:
        for name in ("baseline", "avx2", "avx512"):
            if compiled.set_cpu_isa(name):
                call = Call([(n,) for n in SIZES], dtype, "cpu", {"momentum": 0.9, "weight_decay": 0.1})
                histograms = torch.zeros(len(SIZES), BINS, dtype=torch.int64)
                results.append([*call.step(True, masks=call.masks, histograms=histograms).result(), histograms])
    finally:
        compiled.set_cpu_isa(isa)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("found_inf", [1.0, float("nan")])
def test_a_step_that_is_skipped_counts_nothing(found_inf, device, fused):
    call = Call([(300,), (5,)], torch.float32, device, {"momentum": 0.9})
    before = [t.clone() for t in call.result()]
    histograms = torch.zeros(2, BINS, dtype=torch.int64, device=device)
    flag = torch.tensor(found_inf, device=device)
    call.step(fused, masks=call.masks, histograms=histograms, found_inf=flag)
    hard_threshold_(call.params, [30, 1], histograms=histograms, found_inf=flag, fused=fused)
    assert not histograms.any()
    for a, b in zip(call.result(), before, strict=True):
        assert_same_bits(a, b)


COUNTS = torch.zeros(2, BINS, dtype=torch.int64)
MASK = torch.ones(4, dtype=torch.bool)
STEP_ERRORS = [
    ({"masks": [MASK]}, "masks must be empty or have 2 entries, one for each parameter, got 1"),
    ({"masks": [MASK, MASK[:3]]}, "parameter 1: mask has shape [3]"),
    ({"masks": [MASK, MASK.float()]}, "parameter 1: mask has shape [4]"),
    ({"masks": [MASK, MASK.to("meta")]}, "parameter 1: mask has shape [4]"),
    ({"histograms": COUNTS[:, 1:]}, "histograms must be a contiguous Long tensor on cpu of shape (2, 2048), a row for"),
    ({"histograms": COUNTS.int()}, "histograms must be a contiguous Long tensor"),
    ({"histograms": torch.zeros(3, BINS, dtype=torch.int64)}, "histograms must be a contiguous Long tensor"),
    ({"histograms": COUNTS.to("meta")}, "histograms must be a contiguous Long tensor"),
    ({"histograms": COUNTS.t().contiguous().t()}, "histograms must be a contiguous Long tensor"),
    ({"histograms": COUNTS, "shards": [ShardLayout(0, 4, 4, 1, 4)] * 2}, "shards must be empty where masks or"),
]


@pytest.mark.parametrize(("arguments", "message"), STEP_ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors_of_a_step_name_the_argument_and_change_nothing(arguments, message, fused):
    params = [torch.ones(4), torch.ones(4)]
    lists = ([torch.ones(4)] * 2, [], [torch.tensor(0), torch.tensor(0)], [])
    with pytest.raises(ValueError, match=re.escape(message)):
        csgd_(params, *lists, lr=0.1, lipschitz=1.0, fused=fused, **arguments)
    assert torch.stack(params).eq(1).all()
    assert not COUNTS.any()


def test_one_row_is_of_one_kind_of_digits(fused):
    params = [torch.ones(4), torch.ones(4, dtype=torch.float64)]
    steps = [torch.tensor(0), torch.tensor(0)]
    with pytest.raises(TypeError, match=r"parameter 1 has dtype .* all must be float64 or none"):
        csgd_(params, [torch.ones_like(p) for p in params], [], steps, [], lr=0.1, lipschitz=1.0, histograms=COUNTS[:1],
              fused=fused)  # fmt: skip
    assert not COUNTS.any()
    csgd_(params, [torch.ones_like(p) for p in params], [], steps, [], lr=0.1, lipschitz=1.0,
          histograms=torch.zeros_like(COUNTS), fused=fused)  # fmt: skip


THRESHOLD_ERRORS = [
    ({"histograms": COUNTS[:1]}, "histograms must be a contiguous Long tensor on cpu of shape (2, 2048), a row"),
    ({"histograms": COUNTS, "across": True, "keeps": [3]}, "of shape (1, 2048), a row for each of keeps"),
    ({"histograms": COUNTS, "structure": "filter"}, "histograms can be given for structure 'element' with keeps only"),
    ({"histograms": COUNTS, "keeps": None, "masks": [MASK.view(2, 2)] * 2}, "histograms can be given for structure"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), THRESHOLD_ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors_of_a_threshold_name_the_argument_and_change_nothing(arguments, message, fused):
    params = [torch.ones(2, 2), torch.ones(2, 2)]
    with pytest.raises(ValueError, match=re.escape(message)):
        hard_threshold_(params, **{"keeps": [1, 1], **arguments}, fused=fused)
    assert torch.stack(params).eq(1).all()
