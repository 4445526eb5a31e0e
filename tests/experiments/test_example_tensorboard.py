# SPDX-License-Identifier: Apache-2.0
"""The TensorBoard example writes what it says, as TensorBoard reads it."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The folder with the logs of a run."""
    out = tmp_path_factory.mktemp("logs")
    done = subprocess.run(
        [sys.executable, "examples/tensorboard_log.py", "--epochs", "2", "--out", str(out)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(("name", "rate"), [("csgd", 0.05), ("adamw", 0.003)])
def test_log_of_each_optimizer_holds_loss_rate_density_and_bounds(name, rate, logs):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(logs / name)).Reload()
    series = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    losses, rates = ([value for _, value in series[tag]] for tag in ("loss", "lr"))
    assert len(losses) == len(rates) == 2 * 29  # 1797 images, 64 at a time
    assert sum(losses[-5:]) < sum(losses[:5])
    assert rates[0] == pytest.approx(rate)
    assert 0 < rates[-1] < rates[0] / 40
    for kind in ("density", "lipschitz_bound"):
        of_kind = [points for tag, points in series.items() if tag.startswith(f"{kind}/")]
        assert len(of_kind) == 11  # 3 convolutions, 3 normalisations of 2, a linear layer of 2
        assert all([step for step, _ in points] == [0, 10, 20, 30, 40, 50] for points in of_kind)
        assert all(math.isfinite(value) and value >= 0 for points in of_kind for _, value in points)
    assert (
        series["density/conv3.weight"][0][1] > series["density/conv3.weight"][-1][1] > 0
    )  # all move in the first step
