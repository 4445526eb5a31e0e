# SPDX-License-Identifier: Apache-2.0
"""examples/char_lm.py: what it writes, what it does not train again, what it counts, and what it refuses."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import char_lm

from ..helpers import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text_file(tmp_path):
    words = random.Random(0).choices(["so ", "it ", "is ", "not.\n"], k=600)
    path = tmp_path / "words.txt"
    path.write_text("".join(words), encoding="utf-8")
    return path


def arguments(text_file, *options):
    """A training of seconds; later options win."""
    out = text_file.parent / "out"
    sizes = {"steps": 16, "batch-size": 4, "context": 16, "width": 32, "layers": 1, "data": text_file, "out": out}
    grid = "--lrs", "0.001", "0.01", "--seeds", "0", "1", "--methods", "adamw-float32", "calibrated-0.25"
    return [f"--{name}={value}" for name, value in sizes.items()] + [*grid, *options]


def runs_of(out):
    return [json.loads(line) for line in (out / "runs.jsonl").read_text(encoding="utf-8").splitlines()]


def rows_of(out):
    """Cells of the rows of table.md, without header and rule."""
    lines = (out / "table.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]


def test_a_grid_is_trained_once_and_reported(text_file, capsys, monkeypatch):
    out = text_file.parent / "out"
    char_lm.main(arguments(text_file))
    runs = runs_of(out)
    assert len(runs) == 8
    assert {(run["method"], run["lr"], run["seed"]) for run in runs} == {
        (method, lr, seed) for method in ("adamw-float32", "calibrated-0.25") for lr in (0.001, 0.01) for seed in (0, 1)
    }
    for run in runs:
        steps, losses = zip(*run["curve"], strict=True)
        assert steps == (0, 2, 4, 6, 8, 10, 12, 14, 16)
        assert losses[-1] < losses[0] - 0.05  # of log(10) = 2.3 at the start
    float32, calibrated = rows_of(out)
    assert float32[0] == "AdamW, float32"
    assert calibrated[0] == "CalibratedAdamW, c = 0.25, bfloat16"
    # The loss shown first is the smaller one of the two learning rates, which falls faster in so few steps.
    for row in (float32, calibrated):
        assert row[1] == "0.01"
        assert row[2] == f"**{row[7]}**"
        assert row[6] != row[7]
    assert float32[3:5] == ["+0.0000 ± 0.0000", ""]
    assert 0 < float(calibrated[4]) < 100
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(char_lm, "train", None)
    before = (out / "table.md").read_bytes()
    char_lm.main(arguments(text_file))
    assert (out / "table.md").read_bytes() == before
    assert runs_of(out) == runs
    assert calibrated[2] in capsys.readouterr().out


def test_runs_with_other_settings_or_another_text_are_not_taken_for_those_asked_for(text_file):
    few = "--lrs", "0.01", "--seeds", "0", "--methods", "adamw-float32"
    char_lm.main(arguments(text_file, *few))
    char_lm.main(arguments(text_file, *few, "--steps", "8"))
    text_file.write_text(text_file.read_text(encoding="utf-8").upper(), encoding="utf-8")
    char_lm.main(arguments(text_file, *few))
    runs = runs_of(text_file.parent / "out")
    assert [run["settings"]["steps"] for run in runs] == [16, 8, 16]
    assert len({run["settings"]["data"] for run in runs}) == 2


def test_a_line_that_was_not_finished_is_made_again_and_other_damage_is_named(text_file):
    few = arguments(text_file, "--lrs", "0.01", "--seeds", "0")
    char_lm.main(few)
    path = text_file.parent / "out" / "runs.jsonl"
    runs = runs_of(path.parent)
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")  # as by a SIGKILL
    char_lm.main(few)
    assert [{**run, "seconds": 0} for run in runs_of(path.parent)] == [{**run, "seconds": 0} for run in runs]
    path.write_text("{\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        char_lm.main(few)
    assert f"{path} is damaged" in stop.value.code


def test_bytes_per_parameter_are_those_of_weights_and_both_means(text_file):
    """Besides them, torch counts the steps of a tensor in 4 bytes; CalibratedAdamW in 8, with a bound of 4."""
    char_lm.main(arguments(text_file, "--lrs", "0.01", "--seeds", "0", "--methods", *char_lm.METHODS))
    tensors = 2 + 12 + 2  # embedding and position, the block, the last norm
    for run in runs_of(text_file.parent / "out"):
        of_tensors = tensors * (4 if run["method"].startswith("adamw") else 12) / run["parameters"]
        of_elements = 12 if run["method"] == "adamw-float32" else 6
        assert run["bytes_per_parameter"] == pytest.approx(of_elements + of_tensors, rel=1e-12)
        calibrated = run["method"].startswith("calibrated")
        assert (run["density"] is not None) == calibrated
    shown = [row[5] for row in rows_of(text_file.parent / "out")]
    assert shown == [f"{run['bytes_per_parameter']:.2f}" for run in runs_of(text_file.parent / "out")]


def test_methods_differ_in_dtype_only_before_the_first_step(text_file, monkeypatch):
    """The same weights, rounded to the dtype, and the same batches for the same seed; the weights stay bfloat16."""
    models, batches, loss_of = [], [], char_lm.loss_of

    def recorded(model, tokens, starts):
        if torch.is_grad_enabled():
            models.append(model)
            batches.append(starts)
            if len(models) in (1, 2):
                first_weights.append([p.detach().clone() for p in model.parameters()])
        return loss_of(model, tokens, starts)

    first_weights = []
    monkeypatch.setattr(char_lm, "loss_of", recorded)
    options = "--lrs", "0.01", "--seeds", "3", "--steps", "1", "--methods", "adamw-float32", "calibrated-0"
    char_lm.main(arguments(text_file, *options))
    assert torch.equal(*batches)
    for exact, rounded in zip(*first_weights, strict=True):
        assert_same_bits(exact.to(torch.bfloat16), rounded)
    assert {dtype for p in models[1].parameters() for dtype in (p.dtype, p.grad.dtype)} == {torch.bfloat16}


def test_default_text_is_the_standard_library():
    text = char_lm.load_text(None, 128)
    assert 2_000_000 < len(text.train) + len(text.validation) < 4_000_000
    assert len(text.train) // len(text.validation) == 9
    assert int(text.train.max()) < text.vocabulary <= 256


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "no/such/file.txt"], "--data: no/such/file.txt cannot be read (No such file or directory)"),
        (["--context", "500"], "--context 500: a tenth of the text has only"),
        (["--width", "40"], "--width must be a multiple of 32"),
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--batch-size", "-1"], "--batch-size must be 1 or more, got -1"),
        (["--lrs", "0.1", "nan"], "--lrs must be finite and 0 or more, got nan"),
        (["--lrs", "-1"], "--lrs must be finite and 0 or more, got -1.0"),
        (["--methods", "adam"], "invalid choice: 'adam'"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(text_file, capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        char_lm.main(arguments(text_file, *options))
    assert stop.value.code != 0
    assert words in (stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err)
    assert not (text_file.parent / "out").exists()
