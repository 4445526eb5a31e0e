# SPDX-License-Identifier: Apache-2.0
"""hard_threshold_: exactly k survivors, ties by index, the same bits on every backend, errors that change nothing."""

import math
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csgd_cuda import hard_threshold_

from ..helpers import BACKENDS, DTYPES, assert_same_bits, heavy_tailed, threads

# Around a GPU thread's eight, the lanes of a norm (32), a pass of a CUDA block (2048), the CPU's grain (32768).
SIZES = [0, 1, 7, 8, 9, 31, 32, 33, 255, 257, 1000, 2047, 2048, 2049, 32767, 32768, 32769, 70000]
EDGES = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 2.0, 1e-40, -1e-310]


def magnitude(value):
    """In the order of magnitudes: NaN above Inf."""
    return (1, 0.0) if math.isnan(value) else (0, abs(value))


def expected_survivors(values, keep, mask=None):
    """Which of a flat list of numbers survive, by sorting them in Python."""
    alive = [True] * len(values) if mask is None else mask
    order = sorted(range(len(values)), key=lambda i: (alive[i], magnitude(values[i]), -i), reverse=True)
    kept = set(order[:keep])
    return [i in kept and alive[i] for i in range(len(values))]


def thresholded(tensors, survivors):
    """The tensors with +0 where no element survives; survivors: one flat list over all."""
    flat = iter(survivors)
    return [
        torch.where(torch.tensor([next(flat) for _ in range(t.numel())], dtype=torch.bool).view(t.shape), t, 0.0)
        for t in tensors
    ]


def on_every_backend(params, keeps, momentum_buffers=(), masks=(), **options):
    """Thresholds copies on each backend; all results must have the same bits. Returns those of the first, on the CPU:
    (params, momentum_buffers, masks)."""
    results = []
    for device, fused in BACKENDS:
        copies = [[t.detach().to(device, copy=True) for t in tensors] for tensors in (params, momentum_buffers, masks)]
        hard_threshold_(copies[0], keeps, momentum_buffers=copies[1], masks=copies[2], fused=fused, **options)
        results.append(copies)
    for backend, other in zip(BACKENDS[1:], results[1:], strict=True):
        for a, b in zip(results[0], other, strict=True):
            for k, (x, y) in enumerate(zip(a, b, strict=True)):
                assert_same_bits(x, y, f"{backend}, tensor {k}")
    return [[t.cpu() for t in tensors] for tensors in results[0]]


@st.composite
def cases(draw):
    """Tensors of few different values, k, masks or none."""
    dtype = draw(st.sampled_from(DTYPES))
    values = st.sampled_from(EDGES) if draw(st.booleans()) else st.floats(width=16)
    lists = draw(st.lists(st.lists(values, max_size=40), min_size=1, max_size=4))
    tensors = [torch.tensor(row, dtype=torch.float64).to(dtype) for row in lists]
    total = sum(map(len, lists))
    masks = [torch.tensor([draw(st.booleans()) for _ in row], dtype=torch.bool) for row in lists]
    return tensors, draw(st.integers(0, total + 1)), masks if draw(st.booleans()) else []


@settings(max_examples=150)
@given(cases())
def test_exactly_the_largest_survive(case):
    tensors, keep, masks = case
    momentum = [torch.full_like(t, 3.0) for t in tensors]
    for across in (False, True):
        keeps = [keep] if across else [keep] * len(tensors)
        params, buffers, new_masks = on_every_backend(tensors, keeps, momentum, masks, across=across)
        flat = [t.double().tolist() for t in tensors]
        alive = [m.tolist() for m in masks] if masks else [[True] * len(row) for row in flat]
        if across:
            expected = expected_survivors([*chain(*flat)], keep, [*chain(*alive)])
        else:
            expected = [*chain(*(expected_survivors(row, keep, m) for row, m in zip(flat, alive, strict=True)))]
        for new, old in zip(params, thresholded(tensors, expected), strict=True):
            assert_same_bits(new, old)
        for new, old in zip(buffers, thresholded(momentum, expected), strict=True):
            assert_same_bits(new, old)
        if masks:
            assert [*chain(*(m.tolist() for m in new_masks))] == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", SIZES)
def test_k_survive_at_every_size(dtype, numel):
    generator = torch.Generator().manual_seed(numel)
    values = heavy_tailed((numel,), generator, dtype)
    ones = torch.ones(numel, dtype=torch.bool)
    for keep in {0, 1, numel // 10, numel - 1, numel} - {-1}:
        (param,), _, (mask,) = on_every_backend([values], [keep], [], [ones])
        assert int(mask.sum()) == min(keep, numel)
        assert_same_bits(param, torch.where(mask, values, 0.0))
        if 0 < keep < numel:
            assert values[mask].abs().min() >= values[~mask].abs().max()


def test_ties_go_to_the_lower_index_in_memory_order():
    for layout, survivors in ((torch.contiguous_format, [0, 1, 2]), (torch.channels_last, [0, 4, 1])):
        param = torch.ones(1, 2, 2, 2).to(memory_format=layout)
        (new,), _, _ = on_every_backend([param], [3])
        assert new.reshape(-1).nonzero().view(-1).tolist() == sorted(survivors), layout


def test_ties_across_tensors_go_to_the_first():
    params, _, _ = on_every_backend([torch.ones(5), -torch.ones(4), torch.ones(3)], [7], across=True)
    assert [p.tolist() for p in params] == [[1.0] * 5, [-1.0, -1.0, 0.0, 0.0], [0.0] * 3]


@pytest.mark.parametrize("structure", ["element", "filter", "2:4"])
def test_tensors_that_are_not_dense_are_thresholded_alone(structure):
    base = torch.randn(6, 16, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for device, fused in BACKENDS:
        copy, momentum = base.to(device, copy=True), torch.ones(16, 6, device=device).t()
        view = copy[:, :, 1]
        keeps = [] if structure == "2:4" else [3]
        hard_threshold_([view], keeps, momentum_buffers=[momentum], structure=structure, fused=fused)
        assert_same_bits(copy[:, :, ::2], base[:, :, ::2])
        assert torch.equal(view != 0, momentum != 0)
        results.append(copy)
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 5), (7, 3, 3, 3), (4, 40, 5), (5, 1, 3, 3), (1, 9), (3, 0), (0, 4), (9, 700)])
def test_filters_of_the_largest_norms_survive(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight *= torch.linspace(2, 0.1, max(1, shape[0]))[: shape[0]].to(dtype).view(-1, *[1] * (len(shape) - 1))
    mask = torch.ones(shape[0], dtype=torch.bool)
    keep = shape[0] // 2
    (new,), (momentum,), (new_mask,) = on_every_backend(
        [weight], [keep], [torch.ones_like(weight)], [mask], structure="filter"
    )
    assert int(new_mask.sum()) == keep
    norms = weight.double().flatten(1).norm(dim=1) if weight.numel() else torch.zeros(shape[0])
    if 0 < keep < shape[0]:
        assert norms[new_mask].min() >= norms[~new_mask].max()
    assert_same_bits(new, torch.where(new_mask.view(-1, *[1] * (len(shape) - 1)), weight, 0.0))
    assert torch.equal(momentum != 0, new_mask.view(-1, *[1] * (len(shape) - 1)).expand(shape))


def test_filters_across_tensors_and_layouts():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(8, 4, 3, 3, generator=generator)
    b = torch.randn(5, 6, generator=generator).t()  # dimension 0 is the fastest in memory
    for weights in ([a, b], [a.to(memory_format=torch.channels_last), b]):
        params, _, _ = on_every_backend(weights, [6], structure="filter", across=True)
        norms = torch.cat([w.flatten(1).double().norm(dim=1) for w in weights])
        survivors = torch.cat([p.flatten(1).any(dim=1) for p in params])
        assert int(survivors.sum()) == 6
        assert norms[survivors].min() > norms[~survivors].max()


def test_a_transposed_view_has_its_filters_along_the_other_dimension():
    weight = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = weight.clone()
    expected[:, weight.square().sum(dim=(0, 2, 3)).argsort()[:2]] = 0
    for fused in (False, None):
        new = weight.clone()
        hard_threshold_([new.transpose(0, 1)], [2], structure="filter", fused=fused)
        assert torch.equal(new, expected)


def test_filters_with_nan_survive_and_ties_go_to_the_first():
    weight = torch.ones(5, 3)
    weight[3, 1] = torch.nan
    (new,), _, _ = on_every_backend([weight], [3], structure="filter")
    assert new.ne(0).any(dim=1).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_two_of_each_four_survive(dtype, layout):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-3, 4, (6, 12, 3, 3), generator=generator).to(dtype).to(memory_format=layout)
    weight[0, 2, 1, 1] = torch.nan
    mask = torch.ones(weight.shape, dtype=torch.bool)
    (new,), _, (mask,) = on_every_backend([weight], [], [], [mask], structure="2:4")
    fours = weight.permute(0, 2, 3, 1).reshape(-1, 4).double().tolist()
    expected = torch.tensor([expected_survivors(four, 2) for four in fours])
    assert torch.equal(mask.permute(0, 2, 3, 1).reshape(-1, 4), expected)
    assert_same_bits(new, torch.where(mask, weight, 0.0))


@pytest.mark.parametrize("structure", ["element", "filter", "2:4"])
def test_masks_alone_can_be_applied(structure):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(4 if structure == "filter" else (4, 8), generator=torch.Generator().manual_seed(1)) < 0.5
    (new,), _, (new_mask,) = on_every_backend([weight], None, [], [mask], structure=structure)
    assert torch.equal(new_mask, mask)
    assert_same_bits(new, torch.where(mask.view(4, -1), weight, 0.0))


@pytest.mark.parametrize("structure", ["element", "filter", "2:4"])
@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0, math.nan])
def test_overflow_changes_nothing(structure, found_inf, device, fused):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(device)
    new, momentum = weight.clone(), torch.ones_like(weight)
    mask = torch.ones(4 if structure == "filter" else (4, 8), dtype=torch.bool, device=device)
    flag = torch.tensor(found_inf, device=device)
    keeps = [] if structure == "2:4" else [2]
    options = {"structure": structure, "found_inf": flag, "fused": fused}
    hard_threshold_([new], keeps, momentum_buffers=[momentum], masks=[mask], **options)
    changed = found_inf == 0.0
    assert (not torch.equal(new, weight)) == changed
    assert bool((momentum == 0).any()) == changed
    assert bool((~mask).any()) == changed


def test_threads_do_not_matter(compiled):
    values = torch.randint(-50, 50, (300_000,), generator=torch.Generator().manual_seed(0)).float()
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(values.clone())
            hard_threshold_([results[-1]], [100_001], fused=True)
    assert int((results[0] != 0).sum()) == 100_001
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_autograd_is_told(device, fused):
    param = torch.ones(8, device=device)
    version = param._version
    hard_threshold_([param], [3], fused=fused)
    assert param._version > version


def test_it_can_be_compiled(compiled):
    def call(param):
        hard_threshold_([param], [3], fused=True)
        return param * 2

    param = torch.arange(8.0)
    assert torch.compile(call, backend="eager", fullgraph=True)(param).tolist() == [0, 0, 0, 0, 0, 10, 12, 14]


W = torch.ones(4, 8)
ERRORS = {
    "structure": ([W], [3], {"structure": "row"}, "structure must be 'element', 'filter' or '2:4', got 'row'"),
    "number of keeps": ([W, W], [3], {}, "keeps must have 2 entries, got 1"),
    "negative": ([W], [-1], {}, "keeps must be >= 0, got -1"),
    "across": ([W, W], [3, 3], {"across": True}, "keeps must have 1 entries, got 2"),
    "2:4 takes no k": ([W], [3], {"structure": "2:4"}, "keeps must have 0 entries, got 1"),
    "no masks": ([W], None, {}, "keeps must be given where there are no masks"),
    "filter of a vector": ([W, W[0]], [3, 3], {"structure": "filter"}, r"parameter 1 has shape \[8\]: .*filter"),
    "2:4 of 6": ([torch.ones(4, 6)], [], {"structure": "2:4"}, r"parameter 0 has shape \[4, 6\]: .*divisible by 4"),
    "2:4 of a vector": ([torch.ones(8)], [], {"structure": "2:4"}, "parameter 0 has shape .*dimension 1"),
    "integers": ([W.long()], [3], {}, "parameter 0 has dtype .*supports float32"),
    "mixed": ([W, W.double()], [3], {"across": True}, "parameter 1 has dtype .*all must be float64 or none"),
    "expanded": ([torch.ones(1, 8).expand(4, 8)], [3], {}, "parameter 0.*overlap itself"),
    "momentum": ([W], [3], {"momentum_buffers": [W.double()]}, "parameter 0: momentum_buffer has"),
    "masks": ([W], [3], {"masks": [W]}, "parameter 0: mask has"),
    "mask of filters": ([W], [3], {"masks": [W.bool()], "structure": "filter"}, "parameter 0: mask has shape"),
    "fewer masks": ([W, W], [3, 3], {"masks": [W.bool()]}, "masks must be empty or have 2 entries"),
    "found_inf": ([W], [3], {"found_inf": torch.zeros(2)}, "found_inf must be one Float"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument_and_change_nothing(case, fused):
    params, keeps, options, message = ERRORS[case]
    before = [p.clone() for p in params]
    with pytest.raises((ValueError, TypeError), match=message):
        hard_threshold_(params, keeps, fused=fused, **options)
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)


def test_no_tensors_is_no_work(fused):
    hard_threshold_([], [], fused=fused)
