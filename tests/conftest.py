# SPDX-License-Identifier: Apache-2.0
"""Fixtures: every device there is, every backend on it; hypothesis with its seed shown, and one thread per process."""

import os
import random

import hypothesis
import pytest
import torch

from csgd_cuda import extension

from .helpers import DEVICES, OPTIMIZERS, why_no_kernel
from .rule import hooks

hypothesis.settings.register_profile(
    "csgd", deadline=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("csgd")


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="10,000 random sequences in test_stateful.py")


def pytest_configure(config):
    # A fresh seed for each run, but one that the report shows: --hypothesis-seed=N repeats it. All worker processes
    # of pytest-xdist take the seed of the process that started them.
    if config.getoption("hypothesis_seed", None) is None:
        of_controller = getattr(config, "workerinput", {}).get("hypothesis_seed")
        config.option.hypothesis_seed = of_controller or str(random.randrange(2**32))
    # Several processes with several threads each would wait for one another. Tests of threads set their number
    # themselves. The variable is for programs that tests start.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which need not be installed
def pytest_configure_node(node):
    node.workerinput["hypothesis_seed"] = node.config.option.hypothesis_seed


def pytest_collection_modifyitems(items):
    """Long tests first: one that began last would leave the other cores idle."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_report_header(config):
    return [f"hypothesis seed: {config.option.hypothesis_seed}", f"csgd_cuda: {extension.build_info()}"]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=[True, False], ids=["kernel", "reference"])
def fused(request, device):
    """True: the kernel of the device; False: the reference on it."""
    if request.param:
        need_kernel(device)
    return request.param


@pytest.fixture(params=OPTIMIZERS, ids=lambda optimizer_class: optimizer_class.__name__)
def optimizer_class(request):
    """Each of the calibrated optimizers."""
    return request.param


def need_kernel(device):
    reason = why_no_kernel(device)
    if reason is not None:
        pytest.skip(f"no kernel: {reason}")


@pytest.fixture
def compiled():
    """The module csgd_cuda._C."""
    need_kernel(torch.device("cpu"))
    return extension._C


@pytest.fixture(scope="session")
def rule_hooks():
    """The module of tests/rule/hooks, which calls parts of the compiled rule."""
    return hooks.load()


@pytest.fixture
def one_thread():
    """One thread, as in all tests, and again after a test whose program sets another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
