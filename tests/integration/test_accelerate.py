# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Accelerate: prepared training, accumulation, clipping, checkpoints, loss scaling."""

import math

import pytest
import torch

from .helpers import (
    OPTIONS,
    assert_same_training,
    buffer_dtypes,
    import_or_skip,
    loss_of,
    loss_went_down,
    make_data,
    make_model,
    make_optimizer,
    plainly_trained,
    train,
)

accelerate = import_or_skip("accelerate")
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402

GAMMA = 0.95


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Prepared:
    def __init__(self, optimizer_class, data, seed=0, **options):
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        model = make_model(seed=seed)
        optimizer = make_optimizer(optimizer_class, model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, GAMMA)
        x, y = (torch.stack(parts) for parts in zip(*data, strict=True))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=None)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )

    def run(self, begin=0, end=None, clip=None):
        losses = []
        for k, (x, y) in enumerate(self.loader):
            if not begin <= k < (math.inf if end is None else end):
                continue
            with self.accelerator.accumulate(self.model):
                loss = loss_of(self.model, x, y)
                self.accelerator.backward(loss)
                if clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def pair(self):
        return self.accelerator.unwrap_model(self.model), self.optimizer.optimizer


def plain_loop(optimizer_class, data, accumulate=1, clip=None):
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, GAMMA)
    train(model, optimizer, data, scheduler.step, accumulate, clip)
    return model, optimizer


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (1, 0.3), (3, 0.3)])
def test_prepared_training_gives_the_bits_of_a_plain_loop(accumulate, clip, optimizer_class):
    data = make_data(48)
    prepared = Prepared(optimizer_class, data, gradient_accumulation_steps=accumulate)
    losses = prepared.run(clip=clip)
    assert loss_went_down(losses)
    assert_same_training(prepared.pair(), plain_loop(optimizer_class, data, accumulate, clip))


def test_saved_state_resumes_with_every_bit(tmp_path, optimizer_class):
    """save_state in the middle of the training; load_state into another model and optimizer."""
    data = make_data(12)
    first = Prepared(optimizer_class, data)
    first.run(end=5)
    first.accelerator.save_state(tmp_path)
    second = Prepared(optimizer_class, data, seed=4)
    second.accelerator.load_state(tmp_path)
    second.run(begin=5)
    assert_same_training(second.pair(), plain_loop(optimizer_class, data))


def test_bfloat16_autocast_trains(optimizer_class):
    """mixed_precision="bf16": the model computes in bfloat16, parameters and state stay float32."""
    prepared = Prepared(optimizer_class, make_data(24), mixed_precision="bf16")
    assert loss_went_down(prepared.run())
    assert buffer_dtypes(prepared.optimizer.optimizer) == {torch.float32}


def test_overflow_is_skipped_and_leaves_no_trace(fused, optimizer_class):
    """Accelerate sees that a step was skipped, but not with fused=True, where the step itself skips, as in torch."""
    accelerate.Accelerator(cpu=True)
    data = make_data(8)
    model = make_model()
    inner = make_optimizer(optimizer_class, model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    skipped = []
    for k, (x, y) in enumerate(data):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x, y) * (math.inf if k == 3 else 1.0)).backward()
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
    assert skipped == [k == 3 and not fused for k in range(8)]
    assert scaler.get_scale() == 512.0
    assert_same_training((model, inner), plainly_trained(optimizer_class, data[:3] + data[4:]))


def test_optimizer_made_from_groups_is_prepared(optimizer_class):
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    groups = [{"params": model[0].parameters(), "calibration": 0.0}, {"params": model[2].parameters(), "lr": 0.001}]
    model, optimizer = accelerator.prepare(model, make_optimizer(optimizer_class, groups))
    assert [group["calibration"] for group in optimizer.param_groups] == [0.0, 0.25]
    assert [group["lr"] for group in optimizer.param_groups] == [OPTIONS[optimizer_class]["lr"], 0.001]
