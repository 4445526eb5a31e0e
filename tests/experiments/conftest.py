# SPDX-License-Identifier: Apache-2.0
"""What the tests of the experiments have in common."""

import pytest

from experiments.degraded import figures as figures_of_degraded
from experiments.pruning import report as report_of_pruning
from experiments.report import figures


@pytest.fixture
def no_plots(monkeypatch):
    """Reports are made without their plots, which take most of the time; the function that makes them again."""
    monkeypatch.setattr(figures, "draw_curves", lambda *_: None)
    monkeypatch.setattr(figures, "draw_lr", lambda *_: None)
    monkeypatch.setattr(figures_of_degraded, "draw_accuracy", lambda *_: None)
    monkeypatch.setattr(figures_of_degraded, "draw_samples", lambda *_: None)
    monkeypatch.setattr(report_of_pruning, "write", lambda *_: [])
