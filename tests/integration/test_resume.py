# SPDX-License-Identifier: Apache-2.0
"""A training killed by SIGKILL, twice, in the middle of an epoch, ends with the bits of one that never was."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..helpers import DTYPES, assert_same_snapshots, snapshot
from .killable_training import BATCHES, EPOCHS, SAVE_EVERY, Training, parameters_of

ROOT = Path(__file__).parent.parent.parent


class Child:
    """The training in another process, a batch for each call of let."""

    def __init__(self, folder, start):
        command = [sys.executable, "-m", "tests.integration.killable_training", str(folder), str(start)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.first_batch = self._read("from")

    def _read(self, word):
        line = self.process.stdout.readline().split()
        assert line[:1] == [word], line
        return int(line[1])

    def let(self, batches):
        self.process.stdin.write("\n" * batches)
        self.process.stdin.flush()

    def wait_until_after(self, batch):
        while self._read("after") != batch:
            pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()


def run_and_kill(folder, start, *, at):
    """Kills the training after batch ``at``, at work on the two batches after it. Returns its first batch."""
    with Child(folder, start) as child:
        child.let(at + 2 - child.first_batch)
        child.wait_until_after(at)
        child.process.send_signal(signal.SIGKILL)
        assert child.process.wait(60) == -signal.SIGKILL
        return child.first_batch


@pytest.mark.parametrize("start", [0, 2**24 - 4, 2**32 - 4], ids=["0", "2^24", "2^32"])
def test_killed_training_resumes_with_every_bit(start, tmp_path):
    """In all dtypes at once, under torch.load(weights_only=True); the counted steps pass 2^24, and 2^32."""
    kills = (SAVE_EVERY + 1, BATCHES + SAVE_EVERY)
    assert all(at % BATCHES and (at + 2) // BATCHES == at // BATCHES for at in kills), "not mid-epoch"
    begun = [run_and_kill(tmp_path, start, at=at) for at in kills]
    with Child(tmp_path, start) as child:
        begun.append(child.first_batch)
        child.let(EPOCHS * BATCHES - child.first_batch)
        assert child.process.wait(60) == 0
    # From checkpoints, and not from the batch that was reached.
    assert begun[0] == 0
    assert 0 < begun[1] <= kills[0] + 2
    assert begun[1] < begun[2] <= kills[1] + 2
    assert all(batch % SAVE_EVERY == 0 for batch in begun)
    saved = torch.load(tmp_path / "final.pt", weights_only=True)
    resumed = Training()
    resumed.load_state_dict(saved)

    whole = Training(start)
    while not whole.finished():
        whole.run_batch()
    assert_same_snapshots(*(snapshot(parameters_of(t.models), t.optimizer) for t in (whole, resumed)))
    states = [whole.optimizer.state[param] for param in parameters_of(whole.models)]
    assert {int(state["step"]) for state in states} == {start + EPOCHS * BATCHES}
    assert {state["momentum_buffer"].dtype for state in states} == set(DTYPES)


def test_every_part_of_the_checkpoint_counts():
    """Without the state of the optimizer the bits would differ: the test above would notice a state that is lost."""
    whole = Training()
    for _ in range(3):
        whole.run_batch()
    saved = whole.state_dict()
    for name in ("step", "momentum_buffer", "lipschitz_bound"):
        state = {
            index: {key: torch.zeros_like(value) if key == name else value for key, value in entries.items()}
            for index, entries in saved["optimizer"]["state"].items()
        }
        results = []
        for optimizer in (saved["optimizer"], {**saved["optimizer"], "state": state}):
            training = Training()
            training.load_state_dict({**saved, "optimizer": optimizer})
            training.run_batch()
            results.append(snapshot(parameters_of(training.models), training.optimizer))
        with pytest.raises(AssertionError, match="differ"):
            assert_same_snapshots(*results)
