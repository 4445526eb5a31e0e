# SPDX-License-Identifier: Apache-2.0
"""DTensors: given the same gradients, any number of processes, split in any way, makes the bits of one process."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import STATE_NAMES, assert_same_bits, heavy_tailed, make_params
from .launch import run

STEPS = 4
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "seed": 2**63 + 5}
# A shape, and how it is split over each dimension of the mesh: unevenly, with nothing for some ranks, or not at all.
ONE_DIMENSION = [
    ((50, 7), [Shard(0)]), ((3, 4, 10), [Shard(1)]), ((1,), [Shard(0)]), ((64, 65), [Shard(1)]),
    ((2, 300), [Replicate()]), ((7, 33), [Shard(1)]), ((5, 2), [Shard(1)]), ((0, 4), [Shard(0)]), ((9000,), [Shard(0)]),
]  # fmt: skip
TWO_DIMENSIONS = [
    ((50, 7), [Shard(0), Shard(1)]), ((50, 7), [Shard(1), Shard(0)]), ((6, 5, 9), [Shard(1), Shard(2)]),
    ((50, 7), [Shard(0), Shard(0)]), ((3, 4, 10), [Replicate(), Shard(1)]), ((3, 4, 10), [Shard(2), Replicate()]),
    ((300,), [Replicate(), Replicate()]), ((3, 3), [Shard(0), Shard(0)]),
]  # fmt: skip


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def everything(params, optimizer):
    """Whole tensors of all that a step changes: [(name, tensor)]."""
    states = optimizer.state_dict()["state"]
    out = [(f"param {k}", whole(param.detach())) for k, param in enumerate(params)]
    return out + [(f"{name} {k}", whole(states[k][name])) for k in states for name in STATE_NAMES if name in states[k]]


def assert_same_everything(a, b, what):
    assert [name for name, _ in a] == [name for name, _ in b]
    for (name, x), (_, y) in zip(a, b, strict=True):
        assert_same_bits(x, y, f"{what}: {name}")


def gradients(shapes, dtype, step):
    generator = torch.Generator().manual_seed(100 + step)
    return [heavy_tailed(shape, generator, dtype) * 10.0**k for k, shape in enumerate(shapes)]


def stepped(kinds, dtype, mesh, **options):
    """What steps make of the parameters of these kinds; split over ``mesh``, or not where that is None."""
    shapes = [shape for shape, _ in kinds]

    def split(tensors):
        pairs = zip(tensors, kinds, strict=True)
        return [t if mesh is None else distribute_tensor(t, mesh, placements) for t, (_, placements) in pairs]

    params = [torch.nn.Parameter(t) for t in split(p.detach() for p in make_params(shapes, dtype))]
    options = dict(options)
    optimizer_class = options.pop("optimizer", CSGD)
    optimizer = optimizer_class(params, **{**(OPTIONS if optimizer_class is CSGD else {"lr": 0.1}), **options})
    for step in range(STEPS):
        for param, grad in zip(params, split(gradients(shapes, dtype, step)), strict=True):
            param.grad = grad
        optimizer.step()
    return everything(params, optimizer)


def compiled_steps(rank):
    """What step() and compiled step() make of DTensors."""
    mesh, results = init_device_mesh("cpu", (2,)), []
    for compiled in (False, True):
        params = [torch.nn.Parameter(distribute_tensor(torch.ones(n, 3), mesh, [Shard(0)])) for n in (5, 4)]
        optimizer = CSGD(params, **OPTIONS)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for k in range(STEPS):
            for param, grad in zip(params, gradients([p.shape for p in params], torch.float32, k), strict=True):
                param.grad = distribute_tensor(grad, mesh, [Shard(0)])
            step()
        results.append(everything(params, optimizer))
    return results


def test_compiled_step_makes_the_same_bits():
    for rank, (expected, got) in enumerate(run(2, compiled_steps)):
        assert_same_everything(expected, got, f"rank {rank}")


VARIANTS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float64, nesterov": (torch.float64, {"nesterov": True}),
    "float16, reference": (torch.float16, {"fused": False}),
    "float32, reference": (torch.float32, {"fused": False}),
    "known constant": (torch.float32, {"lipschitz": 0.5}),
    "no momentum": (torch.float32, {"momentum": 0}),
    "AdamW, bfloat16": (torch.bfloat16, {"optimizer": CalibratedAdamW}),
    "AdamW, float64": (torch.float64, {"optimizer": CalibratedAdamW, "weight_decay": 0.1}),
}


def stepped_in_all_ways(rank, kinds, mesh_shape):
    mesh = None if mesh_shape is None else init_device_mesh("cpu", mesh_shape)
    return {name: stepped(kinds, dtype, mesh, **options) for name, (dtype, options) in VARIANTS.items()}


@pytest.mark.parametrize("mesh_shape", [(1,), (2,), (3,), (4,), (2, 2), (1, 3)], ids=str)
def test_any_split_makes_the_bits_of_one_process(mesh_shape):
    kinds = ONE_DIMENSION if len(mesh_shape) == 1 else TWO_DIMENSIONS
    expected = stepped_in_all_ways(0, kinds, None)
    for rank, got in enumerate(run(torch.Size(mesh_shape).numel(), stepped_in_all_ways, kinds, mesh_shape)):
        for name in VARIANTS:
            assert_same_everything(expected[name], got[name], f"rank {rank}, {name}")


def test_bounds_differ_between_the_parts_of_a_parameter():
    """Or the test above would not see whether the bound is that of the whole."""
    grad = gradients([(50, 7)], torch.float32, 1)[0]
    assert len({part.abs().amax().item() for part in grad.chunk(4)}) == 4


def channels_last_steps(rank):
    """A parameter of channels_last memory, whole and in two parts, and the error where its parts are not."""
    mesh = init_device_mesh("cpu", (2,))
    param = torch.arange(6 * 8 * 3 * 3.0).view(6, 8, 3, 3).to(memory_format=torch.channels_last)

    def split(tensor):
        part = tensor.chunk(2)[rank].clone()
        return DTensor.from_local(part, mesh, [Shard(0)], shape=param.shape, stride=param.stride())

    expected, got = torch.nn.Parameter(param.clone()), torch.nn.Parameter(split(param))
    for p, grad in ((expected, param + 1), (got, split(param + 1))):
        optimizer = CSGD([p], lr=0.1, lipschitz=1e3)
        p.grad = grad
        optimizer.step()
    try:
        CSGD([torch.nn.Parameter(distribute_tensor(param, mesh, [Shard(0)]))], lr=0.1)
    except TypeError as error:
        return got.full_tensor(), expected.detach(), str(error)


def test_channels_last_is_counted_in_memory_order_or_refused():
    """torch's distribute_tensor makes the parts contiguous."""
    for got, expected, error in run(2, channels_last_steps):
        assert_same_bits(got, expected)
        assert "parameter 0 is a DTensor whose shard is laid out in memory otherwise than the whole" in error


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 5, 3)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.out = torch.nn.Linear(20, 7)


def fully_sharded(rank, dtype, dimension, mesh_shape):
    """Parameters of fully_shard, stepped with given gradients: [(name, tensor)]."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    if mesh_shape is not None:
        names = ("replicate", "shard")[-len(mesh_shape) :]
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        placement = {} if dimension == 0 else {"shard_placement_fn": lambda p: Shard(min(dimension, p.dim() - 1))}
        fully_shard(model.out, mesh=mesh)
        fully_shard(model, mesh=mesh, **placement)
    params = list(model.parameters())
    optimizer = CSGD(params, **OPTIONS)
    for step in range(STEPS):
        for param, grad in zip(params, gradients([p.shape for p in params], dtype, step), strict=True):
            spread = isinstance(param, DTensor)
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if spread else grad
        optimizer.step()
    return everything(params, optimizer)


@pytest.mark.parametrize(
    ("mesh_shape", "dimension"), [((2,), 0), ((3,), 0), ((4,), 0), ((2, 2), 0), ((2,), 1)], ids=str
)
def test_fully_shard_makes_the_bits_of_one_process(mesh_shape, dimension):
    expected = fully_sharded(0, torch.bfloat16, 0, None)
    for rank, got in enumerate(
        run(torch.Size(mesh_shape).numel(), fully_sharded, torch.bfloat16, dimension, mesh_shape)
    ):
        assert_same_everything(expected, got, f"rank {rank}")


def above_tensor_parallel(rank, sizes):
    """[(got, expected)]: this rank's part of a layer split by both after steps, and the same part of one process.

    Which part it has is read from values that count the elements of the whole layer.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    layer = torch.nn.Linear(*sizes)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.arange(param.numel()).view(param.shape))
    whole = [torch.nn.Parameter(param.detach().clone()) for param in layer.parameters()]
    parallelize_module(layer, mesh["tensor"], ColwiseParallel())
    fully_shard(layer, mesh=mesh["data"])
    parts = list(layer.parameters())
    positions = [part.to_local().detach().long().flatten() for part in parts]
    optimizers = [CSGD(params, **OPTIONS) for params in (whole, parts)]
    for step in range(STEPS):
        grads = gradients([param.shape for param in whole], torch.float32, step)
        for param, part, at, grad in zip(whole, parts, positions, grads, strict=True):
            param.grad = grad
            local = grad.flatten()[at].view_as(part.to_local())
            part.grad = DTensor.from_local(
                local, part.device_mesh, part.placements, shape=part.shape, stride=part.stride()
            )
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[0].lipschitz_bounds() == optimizers[1].lipschitz_bounds()
    pairs = zip(whole, parts, positions, strict=True)
    return [(part.to_local().detach().flatten(), param.detach().flatten()[at]) for param, part, at in pairs]


@pytest.mark.parametrize("sizes", [(3, 7), (5, 16), (4, 1)], ids=str)
def test_fully_shard_above_tensor_parallel_makes_the_bits_of_one_process(sizes):
    """Both split the first dimension, the second by the parts of the first: its parts are no chunks of the whole."""
    ranks = run(4, above_tensor_parallel, sizes)
    for rank, pairs in enumerate(ranks):
        for got, expected in pairs:
            assert_same_bits(got, expected, f"rank {rank}")
    assert sum(got.numel() for pairs in ranks for got, _ in pairs) == (sizes[0] + 1) * sizes[1]
