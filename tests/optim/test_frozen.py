# SPDX-License-Identifier: Apache-2.0
"""Parameters without requires_grad: of no concern to the optimizer, whatever they are."""

import pytest
import torch

from ..helpers import USUAL_OPTIONS, assert_same_snapshots, make_params, set_grads, snapshot


@pytest.mark.parametrize("dtype", [torch.uint8, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_frozen_parameter_may_have_any_dtype(dtype, device, fused, optimizer_class):
    """As in torch.optim.SGD: quantized weights beside trained adapters. Thawed with a gradient, the step refuses it."""
    frozen = torch.zeros(3, device=device).to(dtype)
    (trained,) = make_params([(4,)], torch.float32, device)
    optimizer = optimizer_class([frozen, trained], **USUAL_OPTIONS[optimizer_class], fused=fused)
    set_grads([trained], seed=0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert set(optimizer.state) == {trained}
    assert not frozen.view(torch.uint8).any()
    assert list(optimizer.density()) == [1]
    assert list(optimizer.lipschitz_bounds()) == [0, 1]
    frozen.grad = torch.zeros_like(frozen)
    before = snapshot([trained], optimizer)
    with pytest.raises(TypeError, match="parameter 0"):
        optimizer.step()
    assert_same_snapshots(before, snapshot([trained], optimizer))


def test_frozen_parameter_needs_no_kernel(fused, device, optimizer_class):
    """fused=True is about what is stepped; a frozen one may be where there is no kernel."""
    (trained,) = make_params([(4,)], torch.float32, device)
    optimizer = optimizer_class([torch.zeros(3, device="meta"), trained], fused=fused)
    set_grads([trained], seed=0)
    optimizer.step()
    assert optimizer.backend() == (f"{device.type} kernel" if fused else "reference")
