# SPDX-License-Identifier: Apache-2.0
"""The experiment of classification: learning rates, logs, what is skipped, errors; on the digits of scikit-learn."""

import csv
import itertools
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from csgd_cuda import GradientCalibration
from experiments import cli, grid, loop, methods
from experiments.__main__ import PROGRAMS, main, parser
from experiments.schedule import Schedule

ROOT = Path(__file__).parents[2]
TIMES = {"seconds"}


pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")


def arguments(out, *options):
    """A short training; later options win."""
    short = [
        "--limit",
        "96",
        "--holdout",
        "100",
        "--batch-size",
        "32",
        "--epochs",
        "1",
        "--seeds",
        "0",
        "--lrs",
        "0.05",
        "--workers",
        "1",
    ]
    return ["classification", *short, "--out", str(out), *map(str, options)]


def rows(out):
    """File name -> its rows, without times."""
    found = {}
    for path in sorted(Path(out).glob("*.csv")):
        with path.open(newline="") as file:
            found[path.name] = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule("constant", 3), [1, 1, 1, 1, 1, 1]),
        (Schedule("constant", 3, warmup=2), [0.25, 0.5, 0.75, 1, 1, 1]),
        (Schedule("step", 3, milestones=(1, 2)), [1, 1, 0.1, 0.1, 0.01, 0.01]),
        (Schedule("step", 3, milestones=(2,), warmup=1), [0.5, 1, 1, 1, 0.1, 0.1]),
        (Schedule("cosine", 3), [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]),
        (Schedule("cosine", 3, warmup=1), [0.5, 1, *((1 + math.cos(math.pi * i / 4)) / 2 for i in range(4))]),
    ],
)
def test_learning_rate_of_each_step(schedule, expected):
    assert [schedule.factor(step, 2) for step in range(6)] == pytest.approx(expected, rel=1e-12)


def test_the_optimizer_gets_the_learning_rates_of_the_schedule(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "set_lr", lambda optimizer, lr: seen.append(lr))
    options = "--epochs", 2, "--schedule", "step", "--milestones", 1, "--warmup", 1, "--methods", "sgd"
    assert main(arguments(tmp_path, *options)) == 0
    assert seen == pytest.approx([0.05 / 3, 0.1 / 3, 0.05, 0.005, 0.005, 0.005])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["output", "weight"])
def test_every_method_trains_and_logs_what_it_is(dtype, where, tmp_path):
    grid = "--methods", "sgd", "csgd", "layer", "--layer-where", where, "--calibrations", 0, 1, "--dtype", dtype
    assert main(arguments(tmp_path, *grid, "--epochs", 2)) == 0
    logged = rows(tmp_path)
    assert len(logged) == 5
    told = {(row[0]["method"], row[0]["calibration"]) for row in logged.values()}
    layer = f"layer-{where}"
    assert told == {("sgd", ""), ("csgd", "0.0"), ("csgd", "1.0"), (layer, "0.0"), (layer, "1.0")}
    for name, epochs in logged.items():
        assert [row["epoch"] for row in epochs] == ["1", "2"]
        for row in epochs:
            assert (row["lr"], row["seed"], row["dtype"], row["data"], row["model"]) == (
                "0.05", "0", dtype, "digits", "small",
            )  # fmt: skip
            assert 0 <= float(row["test_accuracy"]) <= 1
            assert 0 <= float(row["validation_accuracy"]) <= 1
        assert float(epochs[1]["train_loss"]) < float(epochs[0]["train_loss"])
        density = float(epochs[1]["density"])
        assert (density < 0.5) if "-c1" in name else (density > (0.9 if dtype == "float32" else 0.5)), name


def test_calibration_0_is_sgd_in_float32(tmp_path):
    grid = "--methods", "sgd", "csgd", "layer", "--layer-where", "weight", "--calibrations", 0
    assert main(arguments(tmp_path, *grid)) == 0
    losses = [float(row[0]["test_loss"]) for row in rows(tmp_path).values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_the_json_says_how_it_was_run(tmp_path):
    command = arguments(tmp_path, "--methods", "csgd", "--momentum", 0.5, "--nesterov", "--weight-decay", 1e-3)
    assert main(command) == 0
    content = json.loads((tmp_path / "digits_small_csgd-c1_lr0.05_float32_seed0.json").read_text())
    assert content["diverged"] is False
    recipe = content["settings"]["recipe"]
    assert (recipe["momentum"], recipe["nesterov"], recipe["weight_decay"]) == (0.5, True, 1e-3)
    assert content["settings"]["about"]["images"] == {"train": 96, "validation": 100, "test": 500}
    environment = content["environment"]
    assert {"CPU", "python", "torch", "csgd_cuda"} <= environment.keys()
    assert environment["command"].startswith("python -m experiments classification --limit 96")
    assert str(tmp_path) not in json.dumps(content)


def test_the_same_command_gives_the_same_figures(tmp_path):
    grid = "--methods", "sgd", "csgd", "layer", "--augment", "--schedule", "cosine"
    assert main(arguments(tmp_path / "a", *grid)) == 0
    assert main(arguments(tmp_path / "b", *grid, "--workers", 2)) == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert len(rows(tmp_path / "a")) == 3


def test_other_seeds_give_other_figures(tmp_path):
    assert main(arguments(tmp_path, "--methods", "sgd", "--seeds", 0, 1)) == 0
    first, second = rows(tmp_path).values()
    assert first[0]["train_loss"] != second[0]["train_loss"]


def test_finished_runs_are_skipped_and_unfinished_ones_start_again(tmp_path, capsys):
    assert main(arguments(tmp_path, "--methods", "sgd")) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()}
    assert main(arguments(tmp_path, "--methods", "sgd", "csgd")) == 0
    assert "1 runs trained, 1 were finished before" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    first = next(path for path in before if path.suffix == ".csv")
    whole = rows(tmp_path)[first.name]
    first.with_suffix(".json").unlink()
    first.write_text("epoch\n")
    assert main(arguments(tmp_path, "--methods", "sgd")) == 0
    assert rows(tmp_path)[first.name] == whole


def test_a_finished_run_with_other_settings_is_not_taken_for_this_one(tmp_path, capsys):
    assert main(arguments(tmp_path, "--methods", "sgd")) == 0
    refused(capsys, arguments(tmp_path, "--methods", "sgd", "--epochs", 2), "recipe.epochs: 1 there, 2 here")


def test_a_diverged_run_ends_and_says_so(tmp_path):
    assert main(arguments(tmp_path, "--methods", "sgd", "--lrs", 1e30, "--epochs", 4)) == 0
    (epochs,) = rows(tmp_path).values()
    assert len(epochs) < 4
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["diverged"] is True
    assert main(arguments(tmp_path, "--methods", "sgd", "--lrs", 1e30, "--epochs", 4)) == 0  # finished


@pytest.mark.parametrize("flag", ["--amp", "--channels-last", "--no-deterministic"])
def test_flags_train(flag, tmp_path):
    assert main(arguments(tmp_path, flag, "--methods", "csgd")) == 0
    assert float(next(iter(rows(tmp_path).values()))[0]["train_loss"]) < 3


def test_a_compiled_layer_calibrates_after_a_compiled_network_without_one(tmp_path, monkeypatch):
    plain_compile = torch.nn.Module.compile
    # dynamo alone, whose cache this is about; inductor takes half a minute
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: plain_compile(model, backend="eager"))
    assert main(arguments(tmp_path, "--compile", "--methods", "sgd", "layer")) == 0
    layer, sgd = (float(epochs[0]["density"]) for epochs in rows(tmp_path).values())
    assert layer < 0.5 < sgd


def refused(capsys, command, *words):
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]  # before it there may be a progress bar
    assert said.startswith("experiments: error: ")
    assert said.endswith(".")
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "adam"], ["--methods", "adam"]),
        (["--lrs", "fast"], ["--lrs", "'fast' is not a number of at least 0"]),
        (["--seeds", "-1"], ["--seeds"]),
        (["--epochs", "0"], ["--epochs", "whole number of at least 1"]),
        (["--schedule", "step"], ["--milestones", "--schedule step"]),
        (["--milestones", "1"], ["--milestones", "--schedule step"]),
        (["--schedule", "step", "--milestones", "1"], ["--milestones 1", "--epochs 1"]),
        (["--warmup", "1"], ["--warmup 1", "--epochs 1"]),
        (["--nesterov", "--momentum", "0"], ["--nesterov", "--momentum"]),
        (["--amp", "--dtype", "bfloat16"], ["--amp", "bfloat16"]),
        (["--device", "meta"], ["--device meta"]),
        (["--data", "svhn"], ["--data svhn", "digits"]),
        (["--data", "mnist"], ["--data mnist", "--data-dir"]),
        (["--data-dir", "somewhere"], ["--data-dir somewhere", "scikit-learn"]),
        (["--data", "imagefolder"], ["--data imagefolder", "--data-dir"]),
        (["--data", "cifar10", "--data-dir", "nowhere"], ["nowhere", "no such directory"]),
        (["--limit", "1250"], ["--limit", "1297"]),
        (["--model", "lenet"], ["--model lenet", "12 x 12"]),
        (["--model", "alexnet"], ["--model alexnet", "not among"]),
    ],
)
def test_what_cannot_work_is_said_before_training(options, words, tmp_path, capsys):
    refused(capsys, arguments(tmp_path / "out", *options), *words)
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_said(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused(capsys, arguments(tmp_path, "--device", "cuda"), "--device cuda", "use --device cpu")


def test_an_output_that_cannot_be_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused(capsys, arguments(tmp_path / "file" / "out"), "--out", "cannot be created")


def test_an_operation_that_is_not_deterministic_is_said(tmp_path, capsys, monkeypatch):
    def raises(*_):
        raise RuntimeError("some_backward does not have a deterministic implementation, but you set ...")

    monkeypatch.setattr(loop.Training, "train_epoch", raises)
    refused(capsys, arguments(tmp_path), "--no-deterministic", "some_backward")


def test_density_of_sgd_is_the_share_of_changed_coordinates():
    model = torch.nn.Linear(4, 2, bias=False)
    method = methods.Method("sgd")
    optimizer = method.optimizer(model, lr=1.0, seed=0, steps=1, momentum=0.0)
    model.weight.grad = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0]])
    sample = method.density_sample(model, [optimizer])
    optimizer.step()
    assert sample.share() == 2 / 8


def test_the_seed_of_a_run_seeds_the_calibration():
    model = torch.nn.Linear(4, 2)
    assert methods.Method("csgd", 1.0).optimizer(model, lr=1.0, seed=7, steps=1).param_groups[0]["seed"] == 7
    methods.Method("layer-output", 0.5).calibrate(model, seed=7)
    (layer,) = (m for m in model.modules() if isinstance(m, GradientCalibration))
    assert (layer.seed, layer.calibration) == (7, 0.5)


def test_it_runs_as_a_module_and_reports(tmp_path):
    command = [sys.executable, "-m", "experiments", *arguments(tmp_path / "logs", "--methods", "sgd", "--epochs", 2)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Training 1 of 1 runs: small with ")
    assert "1 at a time, threads of each: 1" in done.stdout.splitlines()[0]
    assert "1 runs trained" in done.stdout
    assert re.search(r"sgd, lr 0.05, seed 0: about \d\d:\d\d for 2 epochs", done.stderr)
    (log,) = (tmp_path / "logs").glob("*.json")
    assert json.loads(log.read_text())["environment"]["threads"] == "1"
    assert {path.name for path in (tmp_path / "logs" / "report").iterdir()} == {
        "table.md", "summary.csv", "curves.png", "lr.png",
    }  # fmt: skip
    assert (tmp_path / "logs" / "report" / "table.md").read_text() in done.stdout


def test_two_trainings_at_a_time_with_a_thread_each_by_default():
    def how(*options):
        args = parser(["classification"]).parse_args(["classification", "--out", "x", "--model", "vgg", *options])
        return cli.workers(args), cli.threads(args)

    assert how() == (2, 1)
    assert how("--workers", "3") == (3, 1)
    assert how("--workers", "1") == (1, None)
    assert how("--workers", "1", "--threads", "4") == (1, 4)
    assert how("--device", "cuda") == (1, None)


def test_the_time_of_a_run_is_predicted_after_its_first_epoch(tmp_path, monkeypatch):
    said = []
    ticks = itertools.count()
    monkeypatch.setattr(grid.time, "perf_counter", lambda: next(ticks))  # every reading of the clock is a second
    progress = grid.Progress(said.append)
    training = types.SimpleNamespace(rows=[{}], run=types.SimpleNamespace(
        recipe=types.SimpleNamespace(epochs=90), method=methods.Method("csgd", 0.25), lr=0.05, seed=1
    ))  # fmt: skip
    progress.epoch(training)
    training.rows.append({})
    progress.epoch(training)
    assert said == ["csgd-c0.25, lr 0.05, seed 1: about 01:30 for 90 epochs"]


def test_logs_of_another_experiment_are_not_mixed_with_these(tmp_path, capsys):
    assert main(arguments(tmp_path, "--methods", "sgd")) == 0
    refused(
        capsys, arguments(tmp_path, "--methods", "csgd", "--batch-size", 16), "recipe.batch_size: 32 there, 16 here"
    )
    assert not list(tmp_path.glob("*csgd*"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_explains_each_program(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"python -m experiments {name} " in said
    assert "--out" in said


def test_help_names_all_programs(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n    {name} " in said for name in PROGRAMS)
