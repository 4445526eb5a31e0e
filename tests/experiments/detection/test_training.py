# SPDX-License-Identifier: Apache-2.0
"""Detection, as a program: it learns, reports, and says what is missing."""

import importlib.util

import pytest
import torch

from csgd_cuda import CSGD
from experiments import __main__ as program
from experiments.detection.task import Detection
from experiments.models.batch_norm import keep_float32_statistics
from experiments.task import DataOptions, create
from tools.program import UserError

needs_pycocotools = pytest.mark.skipif(
    importlib.util.find_spec("pycocotools") is None, reason="pycocotools is not installed"
)


@needs_pycocotools
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_detector_learns_a_few_scenes_by_heart(digits, dtype):
    task = Detection(digits, 8, 1).to(torch.device("cpu"), dtype)
    task._splits = {"test": task.train_scenes(0, 0)}  # what it learns is what it is tested on
    model = keep_float32_statistics(task.build_model("fcos", 0).to(dtype))
    optimizer = CSGD(model.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(120):
        model.train()
        for inputs, targets in task.batches(0, epoch, 8):
            assert inputs.dtype == dtype
            optimizer.zero_grad()
            loss = task.loss(model, inputs, targets)
            assert loss.dtype == torch.float32
            loss.backward()
            optimizer.step()
    figures = task.evaluate(model)
    assert tuple(figures) == task.metrics
    assert figures["mAP50"] > 0.9


@needs_pycocotools
def test_the_program_trains_and_reports(tmp_path):
    what = ["detection", "--workers", "1", "--limit", "24", "--epochs", "1", "--seeds", "0"]
    assert program.main([*what, "--batch-size", "12", "--lrs", "0.02", "--out", str(tmp_path / "logs")]) == 0
    assert "mAP" in (tmp_path / "logs" / "report" / "table.md").read_text()


def test_other_networks_are_refused(digits):
    with pytest.raises(UserError, match="--model small: detection has fcos"):
        Detection(digits, 1, 1).build_model("small", 0)


def test_missing_pycocotools_is_said_before_the_training(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pycocotools"):
        create("detection", DataOptions("digits"))
