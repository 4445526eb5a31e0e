# SPDX-License-Identifier: Apache-2.0
"""A thread that runs one call after another in their order, so that exchanges go on while backward computes.

Collectives of one process group must be launched in the same order on all ranks, or they deadlock or, worse, mix up.
Chains of callbacks would launch the next collective of whichever bucket is ready, in another order on each rank. A
single thread, and a process group that is used nowhere else, keep the order of the calls.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

_Task: TypeAlias = "tuple[Callable[[], Tensor], torch.futures.Future[Tensor | Exception]]"
_Tasks: TypeAlias = "queue.SimpleQueue[_Task | None]"


def private_gloo_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A new process group of the same ranks, with the same timeout; every rank of the group must call it."""
    given: Any = group or dist.group.WORLD
    timeout = given._get_backend(torch.device("cpu")).options._timeout  # there is no public way to read it
    ranks = dist.get_process_group_ranks(given)
    own: dist.ProcessGroup = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=True)
    return own


class WorkerThread:
    """Runs calls in a thread of its own, which starts with the first and ends with this object."""

    def __init__(self) -> None:
        self._tasks: _Tasks = queue.SimpleQueue()
        self._started = False

    def submit(self, call: Callable[[], Tensor]) -> torch.futures.Future[Tensor]:
        """A future of what ``call`` returns. Where it raises, that call and all later ones end in its exception."""
        if not self._started:
            # A daemon: a rank that ends in an exception must close its connections, not wait here for the others.
            threading.Thread(target=_run, args=(self._tasks,), name="csgd_cuda exchange", daemon=True).start()
            weakref.finalize(self, self._tasks.put, None)
            self._started = True
        done: torch.futures.Future[Tensor | Exception] = torch.futures.Future()
        future = done.then(_result)
        self._tasks.put((call, done))
        return future


def _run(tasks: _Tasks) -> None:
    failure: Exception | None = None
    while (task := tasks.get()) is not None:
        call, done = task
        result: Tensor | Exception
        try:
            result = call() if failure is None else failure  # after a failure the ranks are no longer in step
        except Exception as error:
            result = failure = error
        done.set_result(result)
        del task, call, done, result  # nothing is kept alive while waiting for the next


def _result(done: torch.futures.Future[Tensor | Exception]) -> Tensor:
    """Raises in a callback: DistributedDataParallel ignores what ``Future.set_exception`` sets."""
    result = done.value()
    if isinstance(result, Exception):
        raise result
    return result
