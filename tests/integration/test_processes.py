# SPDX-License-Identifier: Apache-2.0
"""Optimizers in several processes: sent to one, shared with one, inherited by one."""

import pytest
import torch
import torch.multiprocessing as mp

from ..distributed.launch import forkserver
from .helpers import (
    OPTIONS,
    assert_same_training,
    make_data,
    make_model,
    make_optimizer,
    plainly_trained,
    train,
)

PAUSE, WAIT = 5, 60


def go_on(model, optimizer, data, answers):
    """In the other process: the rest of the training."""
    torch.set_num_threads(1)
    train(model, optimizer, data)
    answers.put({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    answers.join()  # shared memory must live until the parent has opened it


def in_another_process(method, model, optimizer, data):
    """What go_on answers there; the parent's copies are cloned from shared memory."""
    context = mp.get_context(method)
    answers = context.JoinableQueue()
    process = context.Process(target=go_on, args=(model, optimizer, data, answers))
    process.start()
    try:
        answer = answers.get(timeout=WAIT)
        checkpoint = {
            "model": {name: tensor.clone() for name, tensor in answer["model"].items()},
            "optimizer": torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, answer["optimizer"]),
        }
        answers.task_done()
        process.join(WAIT)
        assert process.exitcode == 0
    finally:
        process.kill()
    return checkpoint


def loaded(optimizer_class, checkpoint):
    model = make_model(seed=3)
    model.load_state_dict(checkpoint["model"])
    optimizer = make_optimizer(optimizer_class, model)
    optimizer.load_state_dict(checkpoint["optimizer"])
    return model, optimizer


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_optimizer_goes_on_in_another_process_with_the_same_bits(method, optimizer_class):
    """Sent there in the middle of a training (spawn), or inherited (fork); then back as a state_dict."""
    data = make_data()
    model = make_model()
    optimizer = make_optimizer(optimizer_class, model)
    train(model, optimizer, data[:PAUSE])
    checkpoint = in_another_process(method, model, optimizer, data[PAUSE:])
    assert_same_training(loaded(optimizer_class, checkpoint), plainly_trained(optimizer_class, data))


def step_shared(optimizer_class, model, data):
    torch.set_num_threads(1)
    train(model, make_optimizer(optimizer_class, model), data)


def test_steps_in_another_process_move_shared_parameters(optimizer_class):
    """Hogwild: the parameters lie in shared memory, each process has an optimizer of its own."""
    data = make_data()
    model = make_model().share_memory()
    process = forkserver.Process(target=step_shared, args=(optimizer_class, model, data))
    process.start()
    process.join(WAIT)
    assert process.exitcode == 0
    expected, _ = plainly_trained(optimizer_class, data)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert a.is_shared()
        assert torch.equal(a, b)


def hogwild(optimizer_class, model, seed, data):
    torch.set_num_threads(1)
    train(model, make_optimizer(optimizer_class, model, seed=seed, lr=OPTIONS[optimizer_class]["lr"] / 2), data)


def test_two_processes_train_one_model(optimizer_class):
    """Their writes race, so only the outcome is looked at: both have pushed the loss down."""
    data = make_data(40)
    model = make_model().share_memory()
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    before = (model(x) - y).square().mean().item()
    processes = [forkserver.Process(target=hogwild, args=(optimizer_class, model, k, data[k::2])) for k in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT)
        assert process.exitcode == 0
    assert (model(x) - y).square().mean().item() < 0.6 * before
