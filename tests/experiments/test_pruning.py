# SPDX-License-Identifier: Apache-2.0
"""The experiment of pruning: what it writes, what it skips, what it refuses."""

import csv
import json
import sys
from pathlib import Path

import pytest

from experiments import grid, loop
from experiments.__main__ import main
from experiments.pruning import methods
from experiments.pruning.methods import Pruned

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
SHORT = ["--limit", "96", "--batch-size", "32", "--epochs", "2", "--seeds", "0", "1", "--sparsities", "0", "0.75"]


def arguments(out, *options):
    """A short training; later options win."""
    return ["pruning", *SHORT, "--workers", "1", "--out", str(out), *options]


def test_every_method_prunes_to_the_sparsity_and_a_second_call_makes_no_run(tmp_path, monkeypatch, capsys):
    assert main(arguments(tmp_path)) == 0
    logs = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(logs) == 2 + 2 * 4 * 2  # dense, and structures x methods
    for log in logs:
        settings, results = log["settings"], log["results"]
        assert results["zeros"] >= settings["sparsity"]
        assert results["difference"] <= 1e-5
        assert (settings["structure"] == "filter") == (results["exported"] < 0.5 * results["weights"])
        assert (settings["structure"] == "filter") == (results["exported_flops"] < 0.5 * results["flops"])
    text = (tmp_path / "report" / "table.md").read_text(encoding="utf-8")
    assert text.count("\n| ") == 2 + 1 + 2 * 4  # the head, dense, the others
    assert "- threads: 1\n" in text
    assert (tmp_path / "report" / "accuracy.png").stat().st_size > 1000
    with open(tmp_path / "report" / "summary.csv", encoding="utf-8") as file:
        exported = [int(line["exported"]) for line in csv.DictReader(file)]
    assert sorted(exported) == sorted(log["results"]["exported"] for log in logs)
    capsys.readouterr()
    monkeypatch.setattr(grid, "train", None)
    assert main(arguments(tmp_path)) == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(("model", "structure"), [
    ("vgg-small", "filter"), ("resnet20", "filter"), ("resnet20", "cuttable"),
])  # fmt: skip
def test_filters_of_networks_that_are_no_chain_go(model, structure, tmp_path, capsys):
    """Of a ResNet those inside the blocks: about half of its weights read or make channels that a sum ties."""
    options = "--methods", "threshold", "one-shot", "--structures", structure, "--seeds", "0", "--model", model
    assert main(arguments(tmp_path, *options, "--limit", "64", "--sparsities", "0", "0.5", "--channels-last")) == 0
    logs = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    for results in (log["results"] for log in logs if log["settings"]["structure"] == structure):
        if structure == "cuttable":  # half of the layers, half of their filters
            assert results["zeros"] < 0.35
        else:
            assert results["zeros"] > 0.45
        assert results["difference"] <= 1e-5
        share = results["exported_flops"] / results["flops"]
        assert 0.2 < share < (0.35 if model == "vgg-small" else 0.6)
        assert results["seconds"] > 0 < results["exported_seconds"]
    text = capsys.readouterr().out
    assert f"network {model}" in text
    assert "times as fast" in text


def test_channels_that_torch_pruning_takes_out_are_trained_on_without(tmp_path, no_plots):
    """It puts other parameters into the network, which the optimizer must get."""
    pytest.importorskip("torch_pruning")
    options = "--methods", "torch-pruning", "--structures", "filter", "cuttable", "--seeds", "0", "--model", "resnet20"
    assert main(arguments(tmp_path, *options, "--limit", "32", "--sparsities", "0.5")) == 0
    for structure, low, high in (("filter", 0.2, 0.3), ("cuttable", 0.45, 0.55)):
        ((path),) = tmp_path.glob(f"*-{structure}-*.json")
        results = json.loads(path.read_text())["results"]
        assert low < results["exported"] / results["weights"] < high
        assert results["difference"] <= 1e-5


def test_after_a_step_that_changes_the_parameters_the_optimizers_are_new(tmp_path, no_plots, monkeypatch):
    made, real = [], Pruned.optimizer
    monkeypatch.setattr(Pruned, "before_step", lambda self, model, step, steps: step == 3)
    monkeypatch.setattr(Pruned, "optimizer", lambda *args, **kwargs: made.append(real(*args, **kwargs)) or made[-1])
    options = "--methods", "one-shot", "--structures", "filter", "--seeds", "0", "--sparsities", "0.5"
    assert main(arguments(tmp_path, *options)) == 0
    first, second = made
    steps = [int(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]) for optimizer in made]
    assert first is not second
    assert steps == [3, 3]


def test_weights_are_pruned_when_half_of_the_steps_are_made(tmp_path, no_plots, monkeypatch):
    """One-shot: at once, and the others stay what they were; zeros that hard thresholding makes are there by then."""
    seen = []
    real_step = loop.Training._step

    def step(self, *args):
        weights = [p for p in self.model.parameters() if p.dim() == 4]
        masks = [b for name, b in self.model.named_buffers() if name.endswith("weight_mask")]
        zeros = masks or [(p != 0) for p in weights]
        seen.append(1 - sum(int(z.sum()) for z in zeros) / sum(z.numel() for z in zeros))
        return real_step(self, *args)

    monkeypatch.setattr(loop.Training, "_step", step)
    for method in ("one-shot", "threshold"):
        seen.clear()
        options = (
            "--methods",
            method,
            "--structures",
            "element",
            "--sparsities",
            "0.75",
            "--seeds",
            "0",
            "--epochs",
            "4",
        )
        assert main(arguments(tmp_path / method, *options)) == 0
        assert len(seen) == 12
        assert max(seen[:3]) == 0
        assert seen[7:] == pytest.approx([0.75] * 5, abs=0.01)
        assert (seen[5] > 0.3) == (method == "threshold")


def test_runs_of_an_earlier_version_are_read(tmp_path, capsys):
    """Each accuracy of its table, which was made by that version."""
    before = ROOT / "experiments" / "results" / "pruning" / "digits"
    assert main(["report", str(before), "--out", str(tmp_path)]) == 0

    def cells(path):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        return {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]}

    assert cells(tmp_path / "table.md") == cells(before / "table.md")
    assert len(cells(before / "table.md")) == 1 + 2 * 4 * 4
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "runs.csv").write_text("data,method\ndigits,threshold\n")
    assert main(["report", str(tmp_path / "old"), "--out", str(tmp_path / "new")]) == 2
    assert "runs.csv: not a log of this program" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    (["--threads", "0"], "--threads: '0' is not a whole number of at least 1"),
    (["--sparsities", "1"], "--sparsities: '1' is not a number from 0 to"),
    (["--epochs", "0"], "--epochs: '0' is not a whole number of at least 1"),
    (["--data", "letters"], "letters"),
    (["--model", "lenet"], "--model: invalid choice: 'lenet'"),
    (["--methods", "torch-pruning", "--structures", "element", "--sparsities", "0.5"], "prunes filters only; add"),
])  # fmt: skip
def test_errors_are_one_sentence(options, message, tmp_path, capsys):
    assert main(arguments(tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None)
    assert main(arguments(tmp_path, "--methods", "one-shot", "torch-pruning")) == 2
    assert "--methods torch-pruning: it is not installed; pip install torch-pruning." in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--calibration", "--lr"])
def test_runs_that_no_report_could_tell_apart_are_refused(option, tmp_path, no_plots, capsys):
    options = "--methods", "threshold", "--structures", "element", "--sparsities", "0.75", "--seeds"
    assert main(arguments(tmp_path, *options, "0")) == 0
    assert main(arguments(tmp_path, *options, "1", option, "0.5")) == 2
    assert f"{option.strip('-')}: " in capsys.readouterr().err.splitlines()[-1]


def test_interrupted_it_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "train", interrupted)
    assert main(arguments(tmp_path)) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "experiments: interrupted; the same command goes on after the last finished run."


def test_the_csv_has_a_row_for_each_epoch(tmp_path, no_plots):
    options = "--methods", "threshold", "--structures", "element", "--sparsities", "0.75", "--seeds", "0"
    assert main(arguments(tmp_path, *options)) == 0
    ((path),) = tmp_path.glob("*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(0 <= float(row["test_accuracy"]) <= 1 for row in rows)
