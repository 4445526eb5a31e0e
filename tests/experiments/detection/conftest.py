# SPDX-License-Identifier: Apache-2.0
"""What the tests of detection share."""

import pytest

from experiments import data
from experiments.detection import canvas
from experiments.task import DataOptions


@pytest.fixture(scope="session")
def digits():
    return data.load(DataOptions("digits"))


@pytest.fixture(scope="session")
def scenes(digits):
    return canvas.make_scenes(digits.train.images[:, 0].numpy(), digits.train.labels.numpy(), 3, 200)


@pytest.fixture(autouse=True)
def quick(one_thread):
    """All of it is small."""
