# SPDX-License-Identifier: Apache-2.0
"""Where the elements of a shard lie in the whole parameter, and that a step of it draws there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csgd_cuda.distributed.shards import WHOLE, ShardLayout, layout_of_block

from ..helpers import DTYPES, assert_same_bits, heavy_tailed, step_operator


@st.composite
def blocks(draw):
    """(sizes, offsets, whole) of a block of a tensor with up to four dimensions."""
    whole = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    offsets = [draw(st.integers(0, n - 1)) for n in whole]
    return [draw(st.integers(1, n - o)) for n, o in zip(whole, offsets, strict=True)], offsets, whole


def cut(tensor, sizes, offsets):
    for k, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        tensor = tensor.narrow(k, offset, size)
    return tensor


def split_behind(sizes, whole):
    """How many dimensions are split where something consecutive ends there: after the first of more than one."""
    long = [k for k, n in enumerate(whole) if n > 1]
    return sum(sizes[k] < whole[k] for k in long[1:])


@given(blocks())
def test_layout_finds_every_element_of_a_block(block):
    sizes, offsets, whole = block
    positions = cut(torch.arange(torch.Size(whole).numel()).view(whole), sizes, offsets).flatten()
    layout = layout_of_block(sizes, offsets, whole)
    if layout is None:
        assert split_behind(sizes, whole) >= 3
    else:
        assert torch.equal(layout.positions(0, positions.numel(), positions.device), positions)


LAYOUTS = {
    "rows": ([37, 1, 51], [5, 0, 0], [101, 1, 51]),
    "rows that begin with a block of 8": ([40, 8], [16, 0], [100, 8]),
    "one row": ([1, 5000], [1, 0], [3, 5000]),
    "columns": ([9, 11, 5], [0, 0, 3], [9, 11, 17]),
    "wide columns": ([6, 300], [0, 8], [6, 1200]),
    "single columns": ([403, 1], [0, 6], [403, 7]),
    "pairs of columns": ([203, 2], [0, 7], [203, 9]),
    "middle": ([7, 3, 33], [0, 2, 0], [7, 9, 33]),
    "middle and columns": ([7, 3, 10], [0, 2, 5], [7, 9, 33]),
    "all three": ([3, 3, 10], [4, 2, 5], [7, 9, 33]),
}


def stepped(params, grads, shards, fused, device="cpu"):
    """What three steps make of parameters with index 3, bounds fixed: [(parameter, momentum buffer)]."""
    params, grads = (
        [tensor.clone(memory_format=torch.contiguous_format).to(device) for tensor in tensors]
        for tensors in (params, grads)
    )
    steps = [torch.zeros((), dtype=torch.int64, device=device) for _ in params]
    state = ([torch.zeros_like(p) for p in params], steps, [])
    options = {"lr": 0.1, "momentum": 0.9, "lipschitz": 0.5, "seed": 7, "indices": [3] * len(params)}
    for _ in range(3):
        step_operator(params, grads, *state, shards=shards, fused=fused, **options)
    return list(zip(params, state[0], strict=True))


def assert_step_of_a_shard_is_a_part(name, dtype, fused, device):
    sizes, offsets, whole = LAYOUTS[name]
    generator = torch.Generator().manual_seed(1)
    param, grad = (heavy_tailed(whole, generator, dtype) for _ in range(2))
    layout = layout_of_block(sizes, offsets, whole)
    part = stepped([cut(param, sizes, offsets)], [cut(grad, sizes, offsets)], [layout], fused, device)[0]
    for got, of_whole in zip(part, stepped([param], [grad], [], False)[0], strict=True):
        assert_same_bits(got, cut(of_whole, sizes, offsets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_step_of_a_shard_is_that_part_of_the_step_of_the_whole(name, dtype, fused, device):
    assert_step_of_a_shard_is_a_part(name, dtype, fused, device)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_instruction_set_steps_shards_alike(name, dtype, isa, compiled):
    usual = compiled.build_info()["cpu_isa"]
    if not compiled.set_cpu_isa(isa):
        pytest.skip(f"no {isa} here")
    try:
        assert_step_of_a_shard_is_a_part(name, dtype, True, "cpu")
    finally:
        compiled.set_cpu_isa(usual)


def test_positions_beyond_2_to_the_35(fused, device):
    """There the number of the Philox call takes more than 32 bits, in the middle of this shard."""
    begin = 2**35 - 100
    generator = torch.Generator().manual_seed(2)
    param, grad = (heavy_tailed((300,), generator) for _ in range(2))
    whole = stepped([param], [grad], [ShardLayout(begin, 300, 300, 1, 300)], False)[0]
    for first, last in ((0, 107), (107, 300)):
        layout = ShardLayout(begin + first, last - first, 300, 1, 300)
        part = stepped([param[first:last]], [grad[first:last]], [layout], fused, device)[0]
        for got, of_whole in zip(part, whole, strict=True):
            assert_same_bits(got, of_whole[first:last])


def test_whole_tensors_and_shards_of_several_lengths_go_in_one_call(fused, device):
    whole = [8, 24]
    generator = torch.Generator().manual_seed(3)
    param, grad = (heavy_tailed(whole, generator) for _ in range(2))
    kinds = [
        ([3, 24], [0, 0]), ([8, 24], [0, 0]), ([5, 24], [3, 0]), ([8, 7], [0, 0]), ([8, 24], [0, 0]), ([8, 17], [0, 7]),
        ([3, 24], [5, 0]),
    ]  # fmt: skip
    layouts = [WHOLE if sizes == whole else layout_of_block(sizes, offsets, whole) for sizes, offsets in kinds]
    params, grads = ([cut(tensor, *kind) for kind in kinds] for tensor in (param, grad))
    results = stepped(params, grads, layouts, fused, device)
    expected = stepped([param], [grad], [], False)[0]
    for kind, result in zip(kinds, results, strict=True):
        for got, of_whole in zip(result, expected, strict=True):
            assert_same_bits(got, cut(of_whole, *kind), str(kind))
