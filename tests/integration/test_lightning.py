# SPDX-License-Identifier: Apache-2.0
"""Lightning's Trainer: the plain loop's bits, checkpoints, mixed precision, manual optimization, weight averaging."""

import warnings

import pytest
import torch

from ..conftest import need_kernel
from ..helpers import DOCS, code_of
from .helpers import (
    OPTIONS,
    assert_same_training,
    buffer_dtypes,
    calibration_figures,
    import_or_skip,
    loss_of,
    loss_went_down,
    make_data,
    make_model,
    make_optimizer,
    plainly_trained,
    train,
)

import_or_skip("pytorch_lightning")
import pytorch_lightning as pl  # noqa: E402
from pytorch_lightning.callbacks import StochasticWeightAveraging  # noqa: E402
from pytorch_lightning.plugins import MixedPrecision  # noqa: E402

EPOCHS, GAMMA = 3, 0.8
DATA = make_data(12)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


class Regression(pl.LightningModule):
    """``options``: of the optimizer."""

    def __init__(self, optimizer_class, seed=0, **options):
        super().__init__()
        self.model, self.losses = make_model(seed=seed), []
        self.optimizer_class, self.options = optimizer_class, options

    def training_step(self, batch, _):
        loss = loss_of(self.model, *batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = make_optimizer(self.optimizer_class, self.model, **self.options)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, GAMMA)]


class ByHand(Regression):
    """Manual optimization, as for a GAN."""

    automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, _)
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        return make_optimizer(self.optimizer_class, self.model)


def fit(module, folder, epochs=EPOCHS, ckpt_path=None, logger=False, **options):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=logger, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **options,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(DATA, batch_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def pair(trainer):
    return trainer.lightning_module.model, trainer.optimizers[0]


def plain_loop(optimizer_class, accumulate=1, clip=None):
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, GAMMA)
    for _ in range(EPOCHS):
        train(model, optimizer, DATA, accumulate=accumulate, clip=clip)
        scheduler.step()
    return model, optimizer


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (1, 0.3), (3, 0.3)])
def test_trainer_gives_the_bits_of_a_plain_loop(accumulate, clip, tmp_path, optimizer_class):
    module = Regression(optimizer_class)
    trainer = fit(module, tmp_path, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    assert loss_went_down(module.losses)
    assert_same_training(pair(trainer), plain_loop(optimizer_class, accumulate, clip))


def test_checkpoint_of_the_trainer_resumes_with_every_bit(tmp_path, optimizer_class):
    first = fit(Regression(optimizer_class), tmp_path, epochs=1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    trainer = fit(Regression(optimizer_class, seed=6), tmp_path, ckpt_path=tmp_path / "first.ckpt")
    assert_same_training(pair(trainer), plain_loop(optimizer_class))


def test_manual_optimization_gives_the_bits_of_a_plain_loop(tmp_path, optimizer_class):
    trainer = fit(ByHand(optimizer_class), tmp_path)
    assert_same_training(pair(trainer), plainly_trained(optimizer_class, DATA * EPOCHS))


class Kept(pl.loggers.logger.DummyLogger):
    """Keeps what it is given to log."""

    def __init__(self):
        super().__init__()
        self.logged = {}

    def log_metrics(self, metrics, step=None):
        self.logged[step] = metrics


class Named(Regression):
    def configure_optimizers(self):
        return make_optimizer(self.optimizer_class, self.model.named_parameters())


def test_callback_of_the_docs_logs_density_and_bound_of_each_parameter(tmp_path, optimizer_class):
    (block,) = (code for code in code_of(DOCS / "logging.md") if "pytorch_lightning" in code)
    exec(compile(block, "logging.md", "exec"), names := {})
    logger, steps = Kept(), EPOCHS * len(DATA)
    callbacks = [names["LogCalibration"]()]
    trainer = fit(Named(optimizer_class), tmp_path, callbacks=callbacks, logger=logger, log_every_n_steps=6)
    logged = {step: figures for step, figures in logger.logged.items() if "density/0.weight" in figures}
    assert list(logged) == list(range(6, steps + 1, 6))
    _, optimizer = pair(trainer)
    assert logged[steps] == calibration_figures(optimizer)


class Two(ByHand):
    """One optimizer of the package for each of two layers, and one of torch."""

    def configure_optimizers(self):
        own = [make_optimizer(self.optimizer_class, self.model[k].parameters()) for k in (0, 2)]
        return [*own, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)]

    def training_step(self, batch, _):
        optimizers = self.optimizers()
        self.manual_backward(loss_of(self.model, *batch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(("module", "options", "steps"), [
    (Named, {"accumulate_grad_batches": 2, "log_every_n_steps": 2}, range(2, EPOCHS * len(DATA) // 2 + 1, 2)),
    (Named, {"accumulate_grad_batches": 3, "log_every_n_steps": 1}, range(1, EPOCHS * len(DATA) // 3 + 1)),
    (Named, {"log_every_n_steps": 0}, []),
    (Two, {"log_every_n_steps": 9}, range(9, EPOCHS * len(DATA) * 3 + 1, 9)),
], ids=["accumulated", "every step", "never", "several optimizers"])  # fmt: skip
def test_callback_of_the_docs_logs_each_step_and_each_layer_once(module, options, steps, tmp_path, optimizer_class):
    class Every(Kept):
        def log_metrics(self, metrics, step=None):
            if any(name.startswith("density/") for name in metrics):
                rows.append((step, metrics))

    (block,) = (code for code in code_of(DOCS / "logging.md") if "pytorch_lightning" in code)
    exec(compile(block, "logging.md", "exec"), names := {})
    rows = []
    callbacks = [names["LogCalibration"]()]
    trainer = fit(module(optimizer_class), tmp_path, callbacks=callbacks, logger=Every(), **options)
    assert [step for step, _ in rows] == list(steps)
    if module is Two:
        expected = {}
        for k, optimizer in enumerate(trainer.optimizers[:2]):
            expected |= {f"density/optimizer{k}/{name}": share for name, share in optimizer.density().items()}
            bounds = optimizer.lipschitz_bounds().items()
            expected |= {f"lipschitz_bound/optimizer{k}/{name}": bound for name, bound in bounds}
        assert rows[-1][1] == expected
        assert len(expected) == 2 * 2 * 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(("options", "clip"), [({}, None), ({}, 0.5), ({"fused": True}, None)], ids=str)
def test_mixed_precision_trains(options, clip, precision, tmp_path, optimizer_class):
    if options:
        need_kernel(torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if precision == "16-mixed" else None
    module = Regression(optimizer_class, **options)
    plugin = MixedPrecision(precision, "cpu", scaler)
    trainer = fit(module, tmp_path, plugins=[plugin], gradient_clip_val=clip)
    assert loss_went_down(module.losses)
    assert buffer_dtypes(trainer.optimizers[0]) == {torch.float32}


def test_clipping_under_mixed_precision_is_refused_for_fused_as_for_torch(tmp_path, optimizer_class):
    """Lightning cannot clip what the optimizer unscales by itself."""
    need_kernel(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="performs unscaling of gradients internally"):
        fit(
            Regression(optimizer_class, fused=True),
            tmp_path,
            plugins=[MixedPrecision("bf16-mixed", "cpu")],
            gradient_clip_val=0.5,
        )


def test_low_precision_parameters_train(tmp_path, optimizer_class):
    """precision="bf16-true": no float32 copies anywhere."""
    module = Regression(optimizer_class)
    trainer = fit(module, tmp_path, precision="bf16-true")
    assert {p.dtype for p in module.model.parameters()} == {torch.bfloat16}
    assert buffer_dtypes(trainer.optimizers[0]) == {torch.bfloat16}
    assert loss_went_down(module.losses)


def test_weight_averaging_callback(tmp_path, optimizer_class):
    module = Regression(optimizer_class)
    averaging = StochasticWeightAveraging(
        swa_lrs=0.2 * OPTIONS[optimizer_class]["lr"], swa_epoch_start=1, annealing_epochs=1
    )
    fit(module, tmp_path, epochs=4, callbacks=[averaging])
    assert loss_went_down(module.losses)
    x, y = (torch.cat(parts) for parts in zip(*DATA, strict=True))
    with torch.no_grad():
        assert loss_of(module.model, x, y) < loss_of(make_model(), x, y)
