# SPDX-License-Identifier: Apache-2.0
"""Exchanges run beside the backward pass: in the same order on all ranks, and their errors are raised."""

import gc
import random
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from csgd_cuda.distributed import CalibratedHookState, calibrated_hook
from csgd_cuda.distributed.worker_thread import WorkerThread

from ..helpers import assert_same_bits, heavy_tailed
from .launch import Given, exchanged, run

SHAPES = [(50 + 7 * k,) for k in range(20)]
TINY_BUCKETS = 0.0005  # MB: one or two parameters in a bucket


def model_with(hook):
    """A model whose buckets go to ``hook(state, bucket)``."""
    model = DistributedDataParallel(Given(SHAPES), bucket_cap_mb=TINY_BUCKETS)

    def annotated(state: CalibratedHookState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return hook(state, bucket)

    model.register_comm_hook(CalibratedHookState(model, seed=1), annotated)
    return model


def gradients(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return [heavy_tailed(shape, generator) for shape in SHAPES]


def backward_while_the_first_exchange_waits(rank):
    all_handed_over, seen = threading.Event(), []

    def hook(state, bucket):
        future = calibrated_hook(state, bucket)
        seen.append(future.done())
        if bucket.is_last():
            all_handed_over.set()
        return future

    model = model_with(hook)
    exchanged(model, gradients(rank, 0))
    all_handed_over.clear()
    seen.clear()
    collective = dist.all_to_all_single

    def waiting(*args, **kwargs):
        assert all_handed_over.wait(20), "backward waits for the exchange"
        return collective(*args, **kwargs)

    dist.all_to_all_single = waiting
    exchanged(model, gradients(rank, 1))
    return seen


def test_backward_goes_on_while_a_bucket_is_exchanged():
    for seen in run(2, backward_while_the_first_exchange_waits):
        assert len(seen) > 5
        assert not any(seen)


def restless_exchange(rank):
    """Ranks that linger at random, and other collectives of backward's own thread in between."""
    quiet = model_with(calibrated_hook)
    expected = [grad for step in range(3) for grad in exchanged(quiet, gradients(rank, step))]
    chance, launched = random.Random(rank), []

    def hook(state, bucket):
        time.sleep(chance.choice([0, 0, 0.01]))
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == dist.get_world_size()
        return calibrated_hook(state, bucket)

    restless = model_with(hook)
    for name in ("all_reduce", "all_to_all_single", "all_gather"):
        setattr(dist, name, lingering(getattr(dist, name), name, launched, chance))
    got = [grad for step in range(3) for grad in exchanged(restless, gradients(rank, step))]
    return {"expected": expected, "got": got, "launched": launched}


def lingering(collective, name, launched, chance):
    def call(first, *args, **kwargs):
        if threading.current_thread().name == "csgd_cuda exchange":
            launched.append((name, sum(t.numel() for t in first) if isinstance(first, list) else first.numel()))
            time.sleep(chance.choice([0, 0, 0.005]))
        return collective(first, *args, **kwargs)

    return call


@pytest.mark.parametrize("world_size", [2, 4])
def test_collectives_are_launched_in_one_order(world_size):
    ranks = run(world_size, restless_exchange)
    for rank in ranks:
        assert rank["launched"] == ranks[0]["launched"]
        assert len(rank["launched"]) > 3 * 3 * 5
        for expected, got, first in zip(rank["expected"], rank["got"], ranks[0]["got"], strict=True):
            assert_same_bits(expected, got)
            assert_same_bits(first, got)


def failing_exchange(rank):
    model = model_with(calibrated_hook)
    exchanged(model, gradients(rank, 0))

    def planted(*args, **kwargs):
        raise RuntimeError("a planted failure")

    dist.all_to_all_single = planted
    with pytest.raises(RuntimeError) as caught:
        exchanged(model, gradients(rank, 1))
    return str(caught.value)


def test_failure_of_an_exchange_ends_backward():
    for message in run(2, failing_exchange):
        assert "a planted failure" in message


def test_calls_run_in_order_and_end_with_the_first_failure():
    calls, done = WorkerThread(), []

    def call(k):
        time.sleep(0.001)
        done.append(k)
        if k == 5:
            raise ValueError("the sixth")
        return torch.tensor(k)

    futures = [calls.submit(lambda k=k: call(k)) for k in range(8)]
    assert [future.wait().item() for future in futures[:5]] == [0, 1, 2, 3, 4]
    for future in futures[5:]:
        with pytest.raises(RuntimeError, match="the sixth"):
            future.wait()
    assert done == [0, 1, 2, 3, 4, 5]


def test_thread_ends_with_its_owner():
    before = set(threading.enumerate())  # that of the test above may be ending
    calls = WorkerThread()
    assert set(threading.enumerate()) <= before
    calls.submit(lambda: torch.zeros(())).wait()
    (thread,) = set(threading.enumerate()) - before
    del calls
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
