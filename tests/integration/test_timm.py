# SPDX-License-Identifier: Apache-2.0
"""The pieces of timm's training script: optimizer factory, scheduler, scaler, clipping, EMA, checkpoints."""

import copy

import pytest
import torch

from csgd_cuda import CSGD, CalibratedAdamW

from ..helpers import OPTIMIZERS, assert_same_bits
from .helpers import OPTIONS, assert_same_training, import_or_skip, loss_went_down, make_optimizer

timm = import_or_skip("timm")
timm_optim = pytest.importorskip("timm.optim")
timm_utils = pytest.importorskip("timm.utils")
timm_scheduler = pytest.importorskip("timm.scheduler")
from timm.loss import LabelSmoothingCrossEntropy  # noqa: E402
from timm.models import resume_checkpoint  # noqa: E402
from timm.optim import OptimInfo  # noqa: E402
from timm.optim._optim_factory import default_registry  # noqa: E402

CLASSES, EPOCHS, BATCHES = 4, 3, 6


pytestmark = pytest.mark.xdist_group("timm")


@pytest.fixture(autouse=True, scope="module")
def optimizers_are_registered():
    """As a user does it: then --opt csgd or --opt calibratedadamw, with timm's parameter groups."""
    default_registry.register(OptimInfo("csgd", CSGD, "Calibrated SGD", has_eps=False, has_momentum=True))
    default_registry.register(OptimInfo("calibratedadamw", CalibratedAdamW, "Calibrated AdamW", has_betas=True))


def tiny_network():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", pretrained=False, num_classes=CLASSES)


def pictures(epoch):
    """Noise whose mean tells the class."""
    generator = torch.Generator().manual_seed(100 + epoch)
    labels = torch.randint(CLASSES, (BATCHES, 16), generator=generator)
    x = torch.randn(BATCHES, 16, 3, 32, 32, generator=generator) + labels[..., None, None, None]
    return list(zip(x, labels, strict=True))


class Script:
    """train.py of timm, in small: everything that it would make from its arguments."""

    def __init__(self, optimizer_class, clip_mode="norm", **factory_options):
        self.model = tiny_network()
        self.optimizer = timm_optim.create_optimizer_v2(
            self.model, opt=optimizer_class.__name__.lower(), **OPTIONS[optimizer_class], **factory_options
        )
        self.scheduler = timm_scheduler.CosineLRScheduler(
            self.optimizer, t_initial=EPOCHS * BATCHES, warmup_t=4, warmup_lr_init=1e-3, t_in_epochs=False
        )
        self.scaler = timm_utils.NativeScaler(device="cpu")
        self.ema = timm_utils.ModelEmaV3(self.model, decay=0.9)
        self.criterion = LabelSmoothingCrossEntropy(0.1)
        self.clip_mode = clip_mode

    def run_epoch(self, epoch):
        self.model.train()
        meter, losses = timm_utils.AverageMeter(), []
        updates = epoch * BATCHES
        for x, labels in pictures(epoch):
            loss = self.criterion(self.model(x), labels)
            self.scaler(
                loss, self.optimizer, clip_grad=1.0, clip_mode=self.clip_mode, parameters=self.model.parameters()
            )
            self.optimizer.zero_grad()
            self.ema.update(self.model)
            updates += 1
            self.scheduler.step_update(num_updates=updates)
            meter.update(loss.item(), len(x))
            losses.append(loss.item())
        assert meter.avg == pytest.approx(sum(losses) / len(losses))
        return losses


@pytest.fixture(scope="module", params=OPTIMIZERS, ids=lambda optimizer_class: optimizer_class.__name__)
def whole_training(request):
    """(optimizer class, Script, losses), trained without a break."""
    script = Script(request.param)
    return request.param, script, [loss for epoch in range(EPOCHS) for loss in script.run_epoch(epoch)]


def test_training_script_lowers_the_loss_with_calibrated_steps(whole_training):
    optimizer_class, script, losses = whole_training
    assert type(script.optimizer) is optimizer_class
    assert loss_went_down(losses)
    assert 0 < min(script.optimizer.density().values()) < 0.9


def test_training_script_gives_the_bits_of_a_plain_loop(whole_training):
    """timm's scaler, clipping, scheduler and EMA, against the gradients and rates set by hand."""
    optimizer_class, script, _ = whole_training
    model = tiny_network()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = make_optimizer(optimizer_class, [{"params": others, "weight_decay": 0.0}, {"params": decayed}])
    rates = Script(optimizer_class).scheduler
    ema = [value.clone() for value in model.state_dict().values()]
    criterion = LabelSmoothingCrossEntropy(0.1)
    for k, (x, labels) in enumerate(batch for epoch in range(EPOCHS) for batch in pictures(epoch)):
        for group in optimizer.param_groups:
            group["lr"] = rates._get_lr(k)[0]
        optimizer.zero_grad()
        criterion(model(x), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for average, value in zip(ema, model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, 0.1)
    assert_same_training((script.model, script.optimizer), (model, optimizer))
    for average, value in zip(ema, script.ema.module.state_dict().values(), strict=True):
        if average.is_floating_point():
            torch.testing.assert_close(average, value)


def test_checkpoint_of_timm_resumes_with_every_bit(whole_training, tmp_path):
    """CheckpointSaver and resume_checkpoint; the latter loads with weights_only=True."""
    optimizer_class, whole, _ = whole_training
    first = Script(optimizer_class)
    first.run_epoch(0)
    saver = timm_utils.CheckpointSaver(
        first.model, first.optimizer, amp_scaler=first.scaler, checkpoint_dir=tmp_path, recovery_dir=tmp_path
    )
    saver.save_checkpoint(epoch=0, metric=1.0)
    second = Script(optimizer_class)
    with torch.no_grad():
        next(second.model.parameters()).zero_()
    begin = resume_checkpoint(second.model, str(tmp_path / "last.pth.tar"), second.optimizer, second.scaler)
    assert begin == 1
    second.scheduler.step_update(begin * BATCHES)
    for epoch in range(begin, EPOCHS):
        second.run_epoch(epoch)
    assert_same_training((whole.model, whole.optimizer), (second.model, second.optimizer))


@pytest.mark.parametrize("mode", ["value", "agc"])
def test_other_ways_of_clipping(mode, optimizer_class):
    script = Script(optimizer_class, clip_mode=mode)
    assert loss_went_down([loss for epoch in range(EPOCHS) for loss in script.run_epoch(epoch)])


def test_layer_decay_scales_the_rate_of_each_group(optimizer_class):
    """timm puts lr_scale into the groups, and its scheduler multiplies by it."""
    script = Script(optimizer_class, layer_decay=0.5)
    groups = script.optimizer.param_groups
    assert len({group["lr_scale"] for group in groups}) > 2
    script.run_epoch(0)
    assert len({group["lr"] / group["lr_scale"] for group in groups}) == 1
    saved = copy.deepcopy(script.optimizer.state_dict())
    second = Script(optimizer_class, layer_decay=0.5)
    second.optimizer.load_state_dict(saved)
    assert [g["lr_scale"] for g in second.optimizer.param_groups] == [g["lr_scale"] for g in groups]


def test_lookahead_around_the_optimizer_resumes_with_every_bit(optimizer_class):
    """timm's wrapper keeps its slow weights in our state; they come back, and are no longer the checkpoint's."""

    def begin():
        model = tiny_network()
        return model, timm_optim.Lookahead(make_optimizer(optimizer_class, model), k=2)

    def go(model, optimizer, batches):
        for x, labels in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()

    batches = pictures(0)
    whole = begin()
    go(*whole, batches)
    model, optimizer = begin()
    go(model, optimizer, batches[:4])
    saved = optimizer.state_dict()
    slow = saved["state"][0]["lookahead_slow_buff"].clone()
    second_model, second = begin()
    second_model.load_state_dict(model.state_dict())
    second.load_state_dict(saved)
    go(second_model, second, batches[4:])
    for a, b in zip(whole[0].parameters(), second_model.parameters(), strict=True):
        assert_same_bits(a, b)
    assert_same_bits(slow, saved["state"][0]["lookahead_slow_buff"])
