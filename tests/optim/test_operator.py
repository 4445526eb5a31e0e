# SPDX-License-Identifier: Apache-2.0
"""torch.ops.csgd_cuda: schema, fake implementation, torch.compile."""

import pytest
import torch

from csgd_cuda import csgd_, hard_threshold_
from csgd_cuda.distributed.shards import WHOLE
from csgd_cuda.optim.direction import ADAMW, SGD
from csgd_cuda.optim.options import operator_options, signed_seed

from ..conftest import need_kernel
from ..helpers import DTYPES, FUNCTIONS, USUAL_OPTIONS, assert_same_bits, make_params
from ..pairs import by_pairs


def operator_of(direction):
    return getattr(torch.ops.csgd_cuda, direction.operator).default


def arguments(dtype, device, direction=SGD, lipschitz=None, part="whole", **own):
    """The lists and the options of a direction's operator; ``own``: options of this direction."""
    defaults = {name: option.default for name, option in direction.options.items()}
    given = {**defaults, "lipschitz": lipschitz, **own}
    params = [p.detach() for p in make_params([(70,), (3, 4)], dtype, device)]
    opmath = torch.float64 if dtype is torch.float64 else torch.float32
    lists = (
        params,
        [torch.ones_like(p) for p in params],
        *([torch.zeros_like(p) for p in params] if direction.needs_buffers(given) else [] for _ in direction.buffers),
        [torch.zeros((), dtype=torch.int64, device=device) for _ in params],
        [torch.zeros((), dtype=opmath, device=device) for _ in params] if lipschitz is None else [],
        [0, 1],
        [10, 7, 20, 1, 7, *WHOLE] if part == "shard" else [],
    )
    options = {
        **operator_options(direction.options, given), **direction.fresh_argument(False), "seed": signed_seed(2**64 - 1),
        "lr": 0.1, "lr_tensor": None, "grad_scale": None, "found_inf": None, "check_only": False,
        "tallies": torch.zeros(2, 4, dtype=torch.int64, device=device),
    }  # fmt: skip
    return lists, options


KINDS = {"momentum": (SGD, {"momentum": 0.9}), "no momentum": (SGD, {}), "adamw": (ADAMW, {})}


@by_pairs(
    check_only=[False, True], part=["whole", "shard"], dtype=DTYPES, kind=KINDS, lipschitz=[None, 2.0],
)  # fmt: skip
def test_opcheck(check_only, dtype, kind, lipschitz, part, device):
    """Schema (what is mutated), fake implementation, and tracing, by torch's own checker."""
    need_kernel(device)
    direction, own = kind
    lists, options = arguments(dtype, device, direction, lipschitz, part, **own)
    torch.library.opcheck(operator_of(direction), lists, {**options, "check_only": check_only})


@pytest.mark.parametrize("structure", ["element", "filter"])
@pytest.mark.parametrize("across", [False, True])
def test_opcheck_of_the_threshold(structure, across, device):
    need_kernel(device)
    params = [torch.randn(6, 5, device=device), torch.randn(4, 3, device=device)]
    keeps = [3] if across else [2, 3]
    of_elements = structure == "element"
    options = {"structure": structure, "across": across, "found_inf": torch.zeros((), device=device)}
    masks = [torch.ones(p.shape if of_elements else p.shape[:1], dtype=torch.bool, device=device) for p in params]
    lists = (params, [torch.ones_like(p) for p in params], masks, keeps)
    torch.library.opcheck(torch.ops.csgd_cuda.hard_threshold_.default, lists, options)


def test_check_only_changes_nothing(device, optimizer_class):
    """Neither values nor versions, by which autograd would take the tensors for changed."""
    need_kernel(device)
    direction = optimizer_class.direction
    lists, options = arguments(torch.float32, device, direction)
    tensors = [t for tensors in lists[:-2] for t in tensors] + [options["tallies"]]
    before, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    operator_of(direction)(*lists, **{**options, "check_only": True})
    for a, b in zip(before, tensors, strict=True):
        assert_same_bits(a, b)
    assert [t._version for t in tensors] == versions


def test_check_only_raises_what_the_step_would_raise(device, optimizer_class):
    need_kernel(device)
    direction = optimizer_class.direction
    lists, options = arguments(torch.float32, device, direction)
    bounds = lists[-3]
    bounds[1] = bounds[0]
    for check_only in (True, False):
        with pytest.raises(ValueError, match="lipschitz_bounds must be a tensor of its own"):
            operator_of(direction)(*lists, **{**options, "check_only": check_only})


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_step_makes_the_bits_of_an_eager_one(backend, device, optimizer_class):
    """Step and model in one graph, without a break at the operator."""
    need_kernel(device)
    function = FUNCTIONS[optimizer_class]
    options = USUAL_OPTIONS[optimizer_class]

    def train_step(weight, x, *state):
        function([weight], [x], *([tensor] for tensor in state), **options)
        return weight.square().mean()

    results = []
    for train in (train_step, torch.compile(train_step, backend=backend, fullgraph=True)):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(16, 8, generator=generator).to(device)
        buffers = [torch.zeros(16, 8, device=device) for _ in optimizer_class.direction.buffers]
        state = (*buffers, torch.tensor(0, device=device), torch.tensor(0.0, device=device))
        for _ in range(3):
            train(weight, torch.randn(16, 8, generator=generator).to(device), *state)
        results.append((weight, *state))
    for eager, compiled in zip(*results, strict=True):
        assert_same_bits(eager, compiled)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_pruning_step_makes_the_bits_of_an_eager_one(backend, device):
    """The step and the threshold in one graph."""
    need_kernel(device)

    def train_step(weights, grads, masks, steps):
        csgd_(weights, grads, [], steps, [], lr=0.1, lipschitz=1.0)
        hard_threshold_(weights, [20], masks=masks, across=True)
        return weights[0] * 2

    results = []
    for function in (train_step, torch.compile(train_step, backend=backend, fullgraph=True)):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator).to(device) for shape in ((9, 8), (3, 5))]
        masks = [w > -0.5 for w in weights]
        steps = [torch.tensor(0, device=device) for _ in weights]
        for _ in range(3):
            grads = [torch.randn(w.shape, generator=generator).to(device) for w in weights]
            loss = function(weights, grads, masks, steps)
        results.append((*weights, *masks, *steps, loss))
    assert sum(int((w != 0).sum()) for w in results[0][:2]) == 20
    for eager, compiled in zip(*results, strict=True):
        assert_same_bits(eager, compiled)


def test_empty_call_does_nothing(device, optimizer_class):
    need_kernel(device)
    direction = optimizer_class.direction
    lists, options = arguments(torch.float32, device, direction)
    for check_only in (False, True):
        operator_of(direction)(*([] for _ in lists), **{**options, "check_only": check_only})


def test_build_info_is_complete(compiled):
    info = compiled.build_info()
    assert set(info) == {"torch", "cuda", "cuda_architectures", "compiler", "cpu_isa"}
    assert info["torch"] == torch.__version__.split("+")[0]
    assert info["cpu_isa"] in ("baseline", "avx2", "avx512")
