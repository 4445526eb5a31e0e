# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: Trainer with a custom optimizer, on a tiny GPT-2 made from its configuration."""

import sys

import pytest
import torch

from ..helpers import DOCS, code_of
from .helpers import (
    OPTIONS,
    assert_same_training,
    calibration_figures,
    import_or_skip,
    loss_went_down,
    make_optimizer,
)

if sys.version_info < (3, 11):
    pytest.skip("the pinned transformers needs Python 3.11", allow_module_level=True)
import_or_skip("transformers")
import transformers  # noqa: E402

VOCABULARY, LENGTH, BATCH, BATCHES, EPOCHS = 17, 12, 8, 6, 3
STEPS = BATCHES * EPOCHS


def tiny_gpt2():
    """Its output layer is tied to its token embedding."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def sequences():
    """Each token is the one before plus three, so that there is something to learn."""
    generator = torch.Generator().manual_seed(5)
    begin = torch.randint(VOCABULARY, (BATCH * BATCHES, 1), generator=generator)
    tokens = (begin + 3 * torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in tokens]


class InOrder(transformers.Trainer):
    """So that a loop by hand sees the same batches."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class StopAfter(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step
        return control


def make_trainer(optimizer_class, folder, *, by_class=False, callbacks=None, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH,
        learning_rate=OPTIONS[optimizer_class]["lr"], lr_scheduler_type="linear", max_grad_norm=1.0, use_cpu=True,
        report_to=[], disable_tqdm=True,
        **{"logging_steps": 1, "save_strategy": "no", "warmup_steps": 3, **options},
    )  # fmt: skip
    model = tiny_gpt2()
    chosen = (
        {"optimizer_cls_and_kwargs": (optimizer_class, OPTIONS[optimizer_class])}
        if by_class
        else {"optimizers": (make_optimizer(optimizer_class, model), None)}
    )
    return InOrder(model, arguments, train_dataset=sequences(), callbacks=callbacks, **chosen)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(trainer):
    """(model, the optimizer itself): Accelerate wraps it."""
    return trainer.model, getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def plain_loop(optimizer_class, groups_of=torch.nn.Module.parameters):
    model = tiny_gpt2()
    optimizer = make_optimizer(optimizer_class, groups_of(model))
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 3, STEPS)
    data = sequences()
    model.train()
    for k in range(STEPS):
        rows = data[BATCH * (k % BATCHES) :][:BATCH]
        tokens = torch.stack([row["input_ids"] for row in rows])
        # The Trainer has the model sum the loss, and divide it by the number of labels.
        count = torch.tensor(BATCH * LENGTH)
        model(input_ids=tokens, labels=tokens, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, optimizer


def test_trainer_gives_the_bits_of_a_plain_loop(tmp_path, optimizer_class):
    """An optimizer that was handed in; clipping and a schedule with warm-up by the Trainer; tied weights."""
    trainer = make_trainer(optimizer_class, tmp_path)
    trainer.train()
    assert loss_went_down(losses_of(trainer))
    assert trainer.model.lm_head.weight is trainer.model.transformer.wte.weight
    assert_same_training(trained(trainer), plain_loop(optimizer_class))


def groups_of_the_trainer(model):
    """With weight decay, and without: biases and layer norms."""
    groups = [{"params": [], "weight_decay": 0.01}, {"params": [], "weight_decay": 0.0}]
    for name, param in model.named_parameters():
        groups[name.endswith("bias") or ".ln_" in name]["params"].append(param)
    return groups


def test_trainer_makes_the_optimizer_from_its_class(tmp_path, optimizer_class):
    """optimizer_cls_and_kwargs: the Trainer groups the parameters with and without weight decay."""
    trainer = make_trainer(optimizer_class, tmp_path, by_class=True, weight_decay=0.01)
    trainer.train()
    assert loss_went_down(losses_of(trainer))
    _, optimizer = trained(trainer)
    assert type(optimizer) is optimizer_class
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    given = {name: value for name, value in OPTIONS[optimizer_class].items() if name in ("momentum", "betas")}
    assert all(given.items() <= group.items() for group in optimizer.param_groups)
    assert_same_training(trained(trainer), plain_loop(optimizer_class, groups_of_the_trainer))


@pytest.mark.parametrize("stop", [2 * BATCHES, BATCHES + 2], ids=["after an epoch", "mid-epoch"])
def test_checkpoint_of_the_trainer_resumes_with_every_bit(stop, tmp_path, optimizer_class):
    """resume_from_checkpoint, by another Trainer with another model."""
    first = make_trainer(optimizer_class, tmp_path, save_strategy="steps", save_steps=stop, callbacks=[StopAfter(stop)])
    first.train()
    assert first.state.global_step == stop
    second = make_trainer(optimizer_class, tmp_path)
    with torch.no_grad():
        next(second.model.parameters()).zero_()
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert second.state.global_step == STEPS
    assert_same_training(trained(second), plain_loop(optimizer_class))


def test_accumulation_and_bfloat16_autocast_train(tmp_path, optimizer_class):
    trainer = make_trainer(optimizer_class, tmp_path, gradient_accumulation_steps=2, bf16=True, warmup_steps=0)
    trainer.train()
    assert loss_went_down(losses_of(trainer))
    model, optimizer = trained(trainer)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {int(state["step"]) for state in optimizer.state.values()} == {STEPS // 2}


def test_callback_of_the_docs_logs_density_and_bound_of_each_parameter(tmp_path, optimizer_class):
    (block,) = (code for code in code_of(DOCS / "logging.md") if "transformers" in code)
    exec(compile(block, "logging.md", "exec"), names := {})
    trainer = make_trainer(optimizer_class, tmp_path, logging_steps=3)
    trainer.optimizer = make_optimizer(optimizer_class, trainer.model.named_parameters())
    trainer.add_callback(names["LogCalibration"](trainer))
    trainer.train()
    logged = {e["step"]: e for e in trainer.state.log_history if any(name.startswith("density/") for name in e)}
    assert list(logged) == list(range(3, STEPS + 1, 3))
    _, optimizer = trained(trainer)
    figures = calibration_figures(optimizer)
    assert {name: logged[STEPS][name] for name in figures} == figures
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == list(logged)


@pytest.mark.parametrize(("options", "steps"), [
    ({"logging_strategy": "no"}, []), ({"logging_strategy": "epoch"}, [STEPS // 3, 2 * STEPS // 3, STEPS]),
], ids=["no", "epoch"])  # fmt: skip
def test_callback_of_the_docs_logs_when_the_trainer_does(options, steps, tmp_path, optimizer_class):
    (block,) = (code for code in code_of(DOCS / "logging.md") if "transformers" in code)
    exec(compile(block, "logging.md", "exec"), names := {})
    trainer = make_trainer(optimizer_class, tmp_path, logging_steps=3, **options)
    trainer.add_callback(names["LogCalibration"](trainer))
    trainer.train()
    for figure in ("density/0", "loss"):
        assert [e["step"] for e in trainer.state.log_history if figure in e] == steps
