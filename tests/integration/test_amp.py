# SPDX-License-Identifier: Apache-2.0
"""torch.amp: the loss scale, a power of two, must leave no trace in the bits; a skipped step neither."""

import copy
import math
import pickle

import pytest
import torch

from csgd_cuda import CSGD

from ..conftest import need_kernel
from ..helpers import DTYPES, TORCH_CLASS
from .helpers import (
    assert_same_training,
    buffer_dtypes,
    loss_of,
    loss_went_down,
    make_data,
    make_model,
    make_optimizer,
    plainly_trained,
)


def scaled_loop(model, optimizer, scaler, data, poison=(), before_step=None):
    """Returns the losses; in the batches of ``poison`` the scaled loss overflows."""
    losses = []
    for k, (x, y) in enumerate(data):
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        scaler.scale(loss * (math.inf if k in poison else 1.0)).backward()
        if before_step:
            scaler.unscale_(optimizer)
            before_step()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


# In float16 a scaled gradient is rounded on another grid near zero, so bits cannot be equal there.
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.float16], ids=str)
def test_loss_scale_leaves_no_trace(dtype, fused, optimizer_class):
    data = make_data(dtype=dtype)
    model = make_model(dtype)
    optimizer = make_optimizer(optimizer_class, model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    losses = scaled_loop(model, optimizer, scaler, data)
    assert scaler.get_scale() == 2.0**14
    assert loss_went_down(losses)
    assert_same_training((model, optimizer), plainly_trained(optimizer_class, data, dtype, fused=fused))


def test_skipped_batches_leave_no_trace(fused, optimizer_class):
    """Not in the step count, and so not in the random draws of the later steps."""
    data = make_data()
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    poison = (0, 5, 6)  # the first one before there is any state
    scaled_loop(model, optimizer, scaler, data, poison)
    assert scaler.get_scale() == 2.0**7
    clean = [batch for k, batch in enumerate(data) if k not in poison]
    assert_same_training((model, optimizer), plainly_trained(optimizer_class, clean, fused=fused))


def test_scale_is_undone_by_the_step_or_before_it_with_the_same_bits(optimizer_class):
    """With fused=True by the step, unless scaler.unscale_ was called; else by scaler.step."""
    need_kernel(torch.device("cpu"))
    data, results = make_data(), []
    for fused, before_step in ((True, None), (True, lambda: None), (None, None), (None, lambda: None)):
        model = make_model()
        optimizer = make_optimizer(optimizer_class, model, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scaled_loop(model, optimizer, scaler, data, poison=(3,), before_step=before_step)
        results.append((model, optimizer))
    for other in results[1:]:
        assert_same_training(results[0], other)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_hooks_see_scaled_gradients_only_where_those_of_torch_do(options, optimizer_class):
    """A hook that clips must get them without the scale, and so must code that logs them after the step. With
    fused=True they still have the scale, as with torch's optimizers, whose kernels unscale them in place; ours do
    not."""
    if options.get("fused"):
        need_kernel(torch.device("cpu"))

    def clip(optimizer, *_):
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)

    seen, momentum = [], {"momentum": 0.9} if optimizer_class is CSGD else {}
    for cls, own in ((TORCH_CLASS[optimizer_class], {}), (optimizer_class, {"calibration": 0.0})):
        param = torch.zeros(3, requires_grad=True)
        optimizer = cls([param], lr=0.5, **options, **momentum, **own)
        optimizer.register_step_pre_hook(clip)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale((param * 5).sum()).backward()
        scaler.step(optimizer)
        buffer = optimizer.state[param][optimizer_class.direction.buffers[0]]
        seen.append((param.detach(), buffer, param.grad))
    (*theirs, their_grad), (*ours, our_grad) = seen
    torch.testing.assert_close(ours, theirs)
    assert (buffer.norm() > 0.05) == (not options.get("fused"))  # else the norm of 1 was divided by the scale
    torch.testing.assert_close(our_grad, their_grad * (1024.0 if options.get("fused") else 1.0))


@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "copy", "pickle"]
)
def test_copies_leave_the_scale_to_the_step_or_not_as_the_original(copy_of, fused, optimizer_class):
    if fused:
        need_kernel(torch.device("cpu"))
    optimizer = make_optimizer(optimizer_class, make_model(), fused=fused)
    assert optimizer._step_supports_amp_scaling is bool(fused)
    assert copy_of(optimizer)._step_supports_amp_scaling is bool(fused)
    optimizer._step_supports_amp_scaling = not fused
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._step_supports_amp_scaling is (not fused)


def test_one_scaler_serves_two_optimizers(optimizer_class):
    """An overflow in one optimizer's gradients skips that one only, as with torch.optim.SGD."""
    data, results = make_data(batches=4), []
    for poisoned in (None, 2):
        models = [make_model(seed=k) for k in range(2)]
        optimizers = [make_optimizer(optimizer_class, model) for model in models]
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for k, (x, y) in enumerate(data):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                factor = math.inf if k == poisoned and model is models[1] else 1.0
                scaler.scale(loss_of(model, x, y) * factor).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        results.append(list(zip(models, optimizers, strict=True)))
    assert_same_training(results[0][0], results[1][0])
    steps = [int(next(iter(optimizer.state.values()))["step"]) for _, optimizer in results[1]]
    assert steps == [4, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains(dtype, fused, optimizer_class):
    """Parameters and state stay float32, the products are of low precision; a scaler as in any AMP recipe."""
    data = make_data(batches=30)
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            output = model(x)
            assert output.dtype is dtype
            loss = torch.nn.functional.mse_loss(output.float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert loss_went_down(losses)
    assert buffer_dtypes(optimizer) == {torch.float32}


def test_float16_parameters_train_under_a_scaler(fused, optimizer_class):
    """torch refuses to unscale float16 gradients; with fused=True our step does it in float32, inside the step."""
    data = make_data(batches=30, dtype=torch.float16)
    model = make_model(torch.float16)
    optimizer = make_optimizer(optimizer_class, model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    if not fused:
        with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
            scaled_loop(model, optimizer, scaler, data)
        return
    assert loss_went_down(scaled_loop(model, optimizer, scaler, data))


def test_scaler_and_optimizer_resume_together(optimizer_class):
    data, results = make_data(), []
    for pause in (None, 7):
        model = make_model()
        optimizer = make_optimizer(optimizer_class, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        scaled_loop(model, optimizer, scaler, data[:pause], poison=(4,))
        if pause:
            saved = copy.deepcopy([thing.state_dict() for thing in (model, optimizer, scaler)])
            model = make_model(seed=9)
            optimizer = optimizer_class(model.parameters(), lr=1.0)
            scaler = torch.amp.GradScaler("cpu")
            for thing, state in zip((model, optimizer, scaler), saved, strict=True):
                thing.load_state_dict(state)
            scaled_loop(model, optimizer, scaler, data[pause:])
        results.append((model, optimizer))
    assert_same_training(*results)
