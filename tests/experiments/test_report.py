# SPDX-License-Identifier: Apache-2.0
"""The report of a comparison, on logs made by hand: every figure follows from them."""

import csv
import json
import math
import statistics

import pytest

from experiments.__main__ import main
from experiments.report import comparison, logs
from experiments.report.summary import Spread, Summary, Variant

COLUMNS = ["validation_accuracy", "validation_loss", "test_accuracy", "test_loss"]
SGD, CSGD, BF16 = Variant("sgd", None, "float32"), Variant("csgd", 0.25, "float32"), Variant("sgd", None, "bfloat16")


def settings(method, calibration, lr, seed, dtype="float32", epochs=2, model="small"):
    return {
        "task": "classification",
        "data": {"data": "made-up", "limit": None, "holdout": 5, "augment": False},
        "about": {"images": {"train": 1000, "validation": 5, "test": 10}, "image_size": [1, 8, 8]},
        "model": model,
        "recipe": {
            "epochs": epochs,
            "batch_size": 8,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "nesterov": False,
            "schedule": {"kind": "constant", "milestones": [], "warmup": 0},
        },
        "execution": {"device": "cpu", "dtype": dtype, "amp": False, "channels_last": False, "compile": False},
        "method": method,
        "calibration": calibration,
        "lr": lr,
        "seed": seed,
    }


def write(directory, variant, lr, seed, epochs, holdout=True, diverged=False, **options):
    """A run's two files; ``epochs``: (validation accuracy, test accuracy, train loss, density) for each."""
    directory.mkdir(exist_ok=True)
    name = f"{variant.method}-{variant.calibration}-{variant.dtype}-{lr}-{seed}"
    columns = COLUMNS if holdout else COLUMNS[2:]
    with (directory / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "lr", "epoch", "train_loss", *columns, "density", "seconds"])
        for i, (validation, test, loss, density) in enumerate(epochs):
            metrics = [validation, 1.0, test, 2.0][-len(columns) :]
            writer.writerow([variant.method, lr, i + 1, loss, *metrics, density, 3.0])
    content = {
        "settings": settings(variant.method, variant.calibration, lr, seed, variant.dtype, **options),
        "diverged": diverged,
        "environment": {"date": f"day {seed}", "command": "python -m experiments classification", "CPU": "a CPU"},
    }
    (directory / f"{name}.json").write_text(json.dumps(content))
    return directory / f"{name}.json"


@pytest.fixture
def grid(tmp_path):
    """SGD is best at 0.1 by validation, but at 0.2 by test; its best epoch is the first, and does not count."""
    directory = tmp_path / "logs"
    for seed, shift in enumerate((0.0, 0.02, 0.04)):
        write(directory, SGD, 0.05, seed, [(0.1, 0.1, 3.0, 1.0), (0.70, 0.70, 2.0, 1.0)])
        write(directory, SGD, 0.1, seed, [(0.99, 0.99, 3.0, 1.0), (0.80 + shift, 0.75 + shift, 1.0, 0.8)])
        write(directory, SGD, 0.2, seed, [(0.1, 0.1, 3.0, 1.0), (0.75, 0.95, 1.0, 1.0)])
        write(directory, CSGD, 0.1, seed, [(0.2, 0.3, 3.0, 0.2), (0.82, 0.76 + 2 * shift, 1.5, 0.1 + shift)])
        write(directory, CSGD, 0.2, seed, [(0.2, 0.3, 3.0, 0.2), (0.90, 0.74 - shift, 0.5, 0.1)])
    return directory


def experiment(*directories):
    return logs.Experiment.of(logs.read(list(map(str, directories))), comparison.VARIED)


def test_means_deviations_and_the_choice_of_the_learning_rate(grid):
    summary = Summary(experiment(grid))
    assert list(summary.cells) == [SGD, CSGD]
    assert summary.lrs == [0.05, 0.1, 0.2]
    assert summary.selected_by == "validation_accuracy"
    assert (summary.best_lr(SGD), summary.best_lr(CSGD)) == (0.1, 0.2)
    assert [summary.at_end_of_grid(v) for v in (SGD, CSGD)] == [False, True]
    result = summary.result(SGD)
    assert (result.mean, result.std, result.count) == (pytest.approx(0.77), pytest.approx(0.02), 3)
    assert summary.result(CSGD).mean == pytest.approx(0.72)
    assert summary.best(SGD).mean_over_epochs("density").mean == pytest.approx(0.9)
    assert summary.difference(SGD) is None
    difference, error = summary.difference(CSGD)
    assert difference == pytest.approx(-0.05)
    assert error == pytest.approx(0.04 / math.sqrt(3))  # of -1, -5 and -9 points


def test_the_table_shows_every_learning_rate_and_the_last_epoch(grid, tmp_path, capsys):
    assert main(["report", str(grid), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "table.md").read_text()
    assert text in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    head, _, sgd, csgd = rows[:4]
    assert head == [
        "method", "dtype", "seeds", "validation, lr 0.05", "validation, lr 0.1", "validation, lr 0.2", "lr chosen",
        "**test accuracy, %**", "to SGD float32, points", "train loss", "density, %",
    ]  # fmt: skip
    assert sgd == [
        "SGD", "float32", "3", "70.00 ± 0.00", "82.00 ± 2.00", "75.00 ± 0.00", "0.1", "**77.00 ± 2.00**", "-",
        "1.0000 ± 0.0000", "90.0 ± 0.0",
    ]  # fmt: skip
    assert csgd == [
        "CSGD, c = 0.25", "float32", "3", "-", "82.00 ± 0.00", "90.00 ± 0.00", "0.2†", "**72.00 ± 2.00**",
        "-5.00 ± 2.31", "0.5000 ± 0.0000", "15.0 ± 0.0",
    ]  # fmt: skip
    assert [row for k, row in enumerate(rows[4:]) if k != 1] == [
        ["method", "dtype", "lr 0.05", "lr 0.1", "lr 0.2"],
        ["SGD", "float32", "70.00 ± 0.00", "77.00 ± 2.00", "95.00 ± 0.00"],
        ["CSGD, c = 0.25", "float32", "-", "80.00 ± 4.00", "72.00 ± 2.00"],
    ]
    assert "99.00" not in text
    assert "test images had no part in it" in text
    assert text.count("- CPU: a CPU") == 1


def test_a_report_can_be_of_some_methods_and_dtypes(grid, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["report", str(grid), "--out", str(out), "--methods", "sgd", "--dtypes", "float32"]) == 0
    assert "c = 0.25" not in (out / "table.md").read_text()
    assert main(["report", str(grid), "--out", str(out), "--methods", "csgd"]) == 0
    text = (out / "table.md").read_text()
    assert "c = 0.25" in text
    assert "SGD" in text  # in float32, to compare with
    write(tmp_path / "other", CSGD, 0.1, 0, [(0.9, 0.9, 1.0, 1.0)] * 2)
    for option, name, there in (("--methods", "layer-weight", "csgd"), ("--dtypes", "float99", "float32")):
        assert main(["report", str(tmp_path / "other"), "--out", str(out), option, name]) == 2
        assert f"{option} {name}: no run has it; there are {there}." in capsys.readouterr().err
    assert main(["report", str(grid), "--out", str(out), "--methods", "csgd", "csdg"]) == 2
    assert "--methods csdg: no run has it" in capsys.readouterr().err


def test_the_csv_has_every_cell(grid, tmp_path):
    assert main(["report", str(grid), "--out", str(tmp_path / "report")]) == 0
    with (tmp_path / "report" / "summary.csv").open(newline="") as file:
        lines = {(row["method"], float(row["lr"])): row for row in csv.DictReader(file)}
    assert len(lines) == 5
    assert [key for key, row in lines.items() if row["chosen"] == "1"] == [("sgd", 0.1), ("csgd", 0.2)]
    cell = lines["csgd", 0.1]
    tests = [0.76, 0.80, 0.84]
    assert float(cell["test_accuracy_mean"]) == pytest.approx(statistics.fmean(tests))
    assert float(cell["test_accuracy_std"]) == pytest.approx(statistics.stdev(tests))
    assert float(cell["density_mean"]) == pytest.approx(statistics.fmean([0.15, 0.16, 0.17]) + 0.0)
    assert cell["test_accuracy_minus_sgd_float32"] == ""
    assert float(lines["csgd", 0.2]["test_accuracy_minus_sgd_float32"]) == pytest.approx(-0.05)


def test_plots_are_pictures(grid, tmp_path):
    assert main(["report", str(grid), "--out", str(tmp_path / "report")]) == 0
    for name in ("curves.png", "lr.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_without_held_out_images_the_table_says_that_the_test_images_chose(tmp_path):
    for lr, test in ((0.1, 0.5), (0.2, 0.7)):
        write(tmp_path / "logs", SGD, lr, 0, [(None, 0.9, 1.0, 1.0), (None, test, 1.0, 1.0)], holdout=False)
    summary = Summary(experiment(tmp_path / "logs"))
    assert summary.selected_by == "test_accuracy"
    assert summary.best_lr(SGD) == 0.2
    assert main(["report", str(tmp_path / "logs"), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "table.md").read_text()
    assert "on the TEST images themselves" in text
    assert "**70.00**" in text  # one seed: no deviation


def test_only_learning_rates_with_all_seeds_are_chosen(tmp_path):
    for seed in (0, 1):
        write(tmp_path / "logs", SGD, 0.1, seed, [(0.5, 0.5, 1.0, 1.0)] * 2)
    write(tmp_path / "logs", SGD, 0.2, 0, [(0.9, 0.9, 1.0, 1.0)] * 2)
    assert main(["report", str(tmp_path / "logs"), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "table.md").read_text()
    assert "90.00 (of 1)" in text
    assert "0.1†" in text


def test_a_diverged_run_counts_with_its_last_figures(tmp_path):
    whole = [(0.5, 0.5, 1.0, 1.0)] * 2
    write(tmp_path / "logs", SGD, 0.1, 0, whole)
    write(tmp_path / "logs", SGD, 0.1, 1, [(0.1, 0.1, math.nan, 1.0)], diverged=True)
    summary = Summary(experiment(tmp_path / "logs"))
    assert summary.result(SGD).mean == pytest.approx(0.3)
    assert main(["report", str(tmp_path / "logs"), "--out", str(tmp_path / "report")]) == 0
    assert "(1 diverged)" in (tmp_path / "report" / "table.md").read_text()


def test_dtypes_and_directories_come_together(tmp_path):
    write(tmp_path / "a", SGD, 0.1, 0, [(0.5, 0.5, 1.0, 1.0)] * 2)
    write(tmp_path / "b", BF16, 0.1, 0, [(0.4, 0.4, 1.0, 0.3)] * 2)
    summary = Summary(experiment(tmp_path / "a", tmp_path / "b"))
    assert list(summary.cells) == [SGD, BF16]
    assert summary.difference(BF16)[0] == pytest.approx(-0.1)
    assert math.isnan(summary.difference(BF16)[1])  # one seed each


def test_spread_of_infinite_values_is_unknown():
    assert math.isnan(Spread.of([1.0, math.inf]).mean)
    assert math.isnan(Spread.of([1.0]).std)


def refused(capsys, tmp_path, directories, *words):
    assert main(["report", *map(str, directories), "--out", str(tmp_path / "report")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("experiments: error: ")
    assert all(word in said for word in words), said
    assert not (tmp_path / "report").exists()


def test_runs_that_do_not_belong_together_are_refused(tmp_path, capsys):
    rows = [(0.5, 0.5, 1.0, 1.0)] * 2
    write(tmp_path / "a", SGD, 0.1, 0, rows)
    write(tmp_path / "b", SGD, 0.1, 1, rows, model="resnet20")
    refused(capsys, tmp_path, [tmp_path / "a", tmp_path / "b"], "model: small there, resnet20 here")
    write(tmp_path / "d", SGD, 0.1, 0, rows, model="resnet20")
    refused(capsys, tmp_path, [tmp_path / "a", tmp_path / "d"], "model: small there, resnet20 here")
    write(tmp_path / "c", SGD, 0.1, 0, rows)
    refused(capsys, tmp_path, [tmp_path / "a", tmp_path / "c"], "the same run as")


def test_broken_and_missing_logs_are_named(tmp_path, capsys):
    refused(capsys, tmp_path, [tmp_path / "nowhere"], "nowhere", "no such directory")
    (tmp_path / "logs").mkdir()
    refused(capsys, tmp_path, [tmp_path / "logs"], "no finished run")
    path = write(tmp_path / "logs", SGD, 0.1, 0, [(0.5, 0.5, 1.0, 1.0)])
    refused(capsys, tmp_path, [path.parent], path.with_suffix(".csv").name, "1 epochs instead of 2")
    path.with_suffix(".csv").write_text("epoch,train_loss,density\n1,x,1\n")
    refused(capsys, tmp_path, [path.parent], path.with_suffix(".csv").name, "not a log")
    path.write_text("{}")
    refused(capsys, tmp_path, [path.parent], path.name, "not a log of an experiment")


def test_unfinished_runs_are_left_out_and_counted(grid, tmp_path, capsys):
    (grid / "sgd-None-float32-0.2-2.json").unlink()
    assert len(logs.read([str(grid)])) == 14
    assert "1 runs are not finished and left out" in capsys.readouterr().err


def test_the_report_does_not_go_among_the_logs(grid, capsys):
    assert main(["report", str(grid), "--out", str(grid)]) == 2
    assert "--out" in capsys.readouterr().err
