# SPDX-License-Identifier: Apache-2.0
"""With regrow=False the gradients of dropped weights count as 0 in the step, and ``.grad`` stays as it is.

Held against an optimizer without sparsity whose gradients are set to zero by hand, and H_k after its steps: bit for
bit, on every backend.
"""

import pytest
import torch

from csgd_cuda import CSGD, CalibratedAdamW, hard_threshold_

from ..helpers import BACKENDS, DTYPES, LAYOUTS, assert_same_bits, edge_values, laid_out, why_no_kernel

# Around a GPU thread's eight, the CPU's tile (128), a pass of a CUDA block (2048), the CPU's chunk (16384) and two of
# them, from where on threads share them.
SIZES = [0, 1, 7, 8, 9, 127, 128, 129, 2047, 2048, 2049, 16383, 16384, 16385, 32768, 40001]
OPTIONS = [
    {"momentum": 0.0, "lipschitz": 0.5}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.5, "maximize": True, "calibration": 0.0, "rounding": "nearest"},
    {"momentum": 0.0, "weight_decay": 0.01},
    {"optimizer": CalibratedAdamW, "weight_decay": 0.01}, {"optimizer": CalibratedAdamW, "dropped_momentum": "keep"},
]  # fmt: skip
STEPS = 3


def make_params(shapes, dtype, device, layouts=("contiguous",)):
    generator = torch.Generator().manual_seed(len(shapes))
    values = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]
    layout = [layouts[k % len(layouts)] for k in range(len(shapes))]
    return [laid_out(value, at).detach().requires_grad_() for value, at in zip(values, layout, strict=True)]


def grads_of(params, step, layouts=("contiguous",)):
    """Gradients with NaN and Inf among them."""
    generator = torch.Generator().manual_seed(step)
    values = [edge_values(tuple(p.shape), generator, p.dtype).to(p.device) for p in params]
    return [laid_out(value, layouts[(k + step) % len(layouts)]) for k, value in enumerate(values)]


def make_two_steps(optimizer, params):
    for step in range(2):
        for param, grad in zip(params, grads_of(params, step), strict=True):
            param.grad = grad
        optimizer.step()


def element_mask(mask, param):
    return mask if mask.shape == param.shape else mask.view(-1, *[1] * (param.dim() - 1)).expand_as(param)


def assert_regrow_is_the_step_with_zeroed_gradients(
    make, device, fused, structure="element", grad_layouts=("contiguous",), **options
):
    params, others = make(device), make(device)
    optimizer_class = options.pop("optimizer", CSGD)
    fused = fused and why_no_kernel(device) is None
    pruned = optimizer_class(params, lr=0.1, fused=fused, sparsity=0.5, regrow=False, structure=structure, **options)
    plain = optimizer_class(others, lr=0.1, fused=fused, **options)
    masks = [
        torch.ones(p.shape[:1] if structure == "filter" else p.shape, dtype=torch.bool, device=device) for p in others
    ]
    counts = [mask.numel() - round(0.5 * mask.numel()) if mask.numel() > 1 else mask.numel() for mask in masks]
    for step in range(STEPS):
        for param, other, mask, grad in zip(params, others, masks, grads_of(params, step, grad_layouts), strict=True):
            param.grad = grad
            other.grad = grad.clone().masked_fill_(~element_mask(mask, param), 0.0)
        given = [(param.grad, param.grad.clone()) for param in params]
        pruned.step()
        plain.step()
        names = optimizer_class.direction.buffers_for(plain.param_groups[0])
        keeps = [] if structure == "2:4" else counts
        detached = [p.detach() for p in others]
        hard_threshold_(detached, keeps, masks=masks, structure=structure, fused=fused)
        for name in names if options.get("dropped_momentum") != "keep" else ():
            for other, mask in zip(others, masks, strict=True):
                plain.state[other][name].masked_fill_(~element_mask(mask, other), 0.0)
        for param, (grad, copy) in zip(params, given, strict=True):
            assert param.grad is grad
            assert_same_bits(grad, copy)
        for param, other, mask in zip(params, others, masks, strict=True):
            assert_same_bits(param, other)
            assert_same_bits(pruned.state[param]["mask"], mask)
            for name, tensor in plain.state[other].items():
                assert_same_bits(pruned.state[param][name], tensor, name)
    assert pruned.density() == plain.density()
    return [*params, *(pruned.state[p]["mask"] for p in params)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_dropped_weights_count_as_zero_and_are_left_as_they_are(options, dtype):
    shapes = [(n, 1) for n in SIZES] + [(3, 4)] * 3
    results = [
        assert_regrow_is_the_step_with_zeroed_gradients(
            lambda device: make_params(shapes, dtype, device), device, fused, **options
        )
        for device, fused in BACKENDS
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", ["element", "filter", "2:4"])
def test_every_layout_of_parameters_and_gradients(structure, dtype):
    for device, fused in BACKENDS:
        assert_regrow_is_the_step_with_zeroed_gradients(
            lambda device: make_params([(6, 8, 4)] * 5, dtype, device, LAYOUTS), device, fused, structure, LAYOUTS,
            momentum=0.9,
        )  # fmt: skip


def test_the_gradient_is_given_back_after_an_error(device, fused):
    params = make_params([(4, 4), (4, 4)], torch.float32, device)
    optimizer = CSGD(params, lr=0.1, sparsity=0.5, regrow=False, fused=fused)
    make_two_steps(optimizer, params)
    grads = [param.grad for param in params]
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr must be a finite number"):
        optimizer.step()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    assert optimizer.param_groups[0]["threshold_step"] == 2


@pytest.mark.parametrize("found_inf", [1.0, float("nan")])
def test_a_step_that_is_skipped_drops_nothing(found_inf, device, fused):
    params = make_params([(30, 10), (5, 1)], torch.float32, device)
    optimizer = CSGD(params, lr=0.1, momentum=0.9, sparsity=0.5, regrow=False, threshold_every=2, fused=fused)
    make_two_steps(optimizer, params)
    state = [t for p in params for t in (p, *optimizer.state[p].values())]
    before = [t.detach().clone() for t in state]
    optimizer.found_inf = torch.tensor(found_inf, device=device)
    optimizer.step()
    for a, b in zip(state, before, strict=True):
        assert_same_bits(a, b)


def test_a_gradient_that_does_not_fit_is_named(device, fused):
    """A parameter that was converted, but not its gradient."""
    params = make_params([(4, 4), (4, 4)], torch.float32, device)
    optimizer = CSGD(params, lr=0.1, sparsity=0.5, regrow=False, fused=fused)
    make_two_steps(optimizer, params)
    grads = [param.grad for param in params]
    params[1].data = params[1].data.double()
    with pytest.raises(TypeError, match="parameter 1: gradient has dtype"):
        optimizer.step()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))


def test_a_mask_made_between_the_steps_is_forgotten_with_regrow(device, fused):
    """threshold() makes masks, too: where dropped weights may come back, none of them drops weights later."""
    (param,) = make_params([(8, 8)], torch.float32, device)
    optimizer = CSGD([param], lr=0.1, fused=fused)
    (group,) = optimizer.param_groups
    generator = torch.Generator().manual_seed(0)

    def step():
        param.grad = torch.randn(8, 8, generator=generator).to(device)
        optimizer.step()
        return int((param == 0).sum())

    step()
    group.update(sparsity=0.5, regrow=False)
    optimizer.threshold()
    assert int((param == 0).sum()) == 32
    group.update(regrow=True, threshold_every=1000)
    left = [step() for _ in range(5)][-1]
    assert left < 32
    assert "mask" not in optimizer.state[param]
    group["regrow"] = False
    assert step() <= left


@pytest.mark.parametrize("structure", ["element", "filter", "2:4"])
@pytest.mark.parametrize("dropped", ["clear", "keep"])
def test_both_means_of_adamw_are_cleared_where_weights_are_dropped(dropped, structure, device, fused):
    """Also with regrow, where no mask is kept: those of all other entries stay, bit for bit."""
    options = {"sparsity": 0.5, "structure": structure, "dropped_momentum": dropped}
    results = []
    for each in ({}, options):
        params = make_params([(8, 4, 3), (7,)], torch.float32, device)
        optimizer = CalibratedAdamW(params, lr=0.0, fused=fused, **each)
        for param in params:
            param.grad = torch.linspace(1, 2, param.numel(), device=device).view(param.shape)
        optimizer.step()
        assert not any("mask" in state for state in optimizer.state.values())
        results.append((params, optimizer))
    (plain, of_plain), (pruned, of_pruned) = results
    gone = pruned[0] == 0
    assert int(gone.sum()) == pruned[0].numel() // 2
    for name in ("exp_avg", "exp_avg_sq"):
        expected = of_plain.state[plain[0]][name].clone()
        if dropped == "clear":
            expected[gone] = 0
        assert expected.any()
        assert_same_bits(of_pruned.state[pruned[0]][name], expected, name)
        assert_same_bits(of_pruned.state[pruned[1]][name], of_plain.state[plain[1]][name], name)
