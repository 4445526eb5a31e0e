# SPDX-License-Identifier: Apache-2.0
"""The example program writes a report that is right, and learns."""

import csv
import json
import math
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from .common import train  # isort: skip


def test_report(arguments, tmp_path, capsys):
    assert train.main(arguments()) == 0
    out = tmp_path / "out"
    table = (out / "table.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert table in printed
    first = printed.splitlines()[0]
    assert "931 parameters: CSGD and torch.optim.SGD, 2 seeds, 2 epochs of 7 steps, on cpu with 1 thread." in first
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows] == ["optimizer", "-" * len(rows[1][0]), "CSGD", "torch.optim.SGD"]
    assert all("±" in cell for row in rows[2:] for cell in row[1:6])
    assert [row[6] for row in rows[2:]] == [load_backend(out), "torch for-loop"]
    assert "104 training and 40 test images of 8 x 8" in table
    for word in ("on cpu with 1 thread", "2 epochs, 2 seeds", "lr 0.05", "batch size 16"):
        assert word in table

    with (out / "curves.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["optimizer"], line["seed"], line["epoch"]) for line in lines] == [
        (name, seed, epoch) for name in ("csgd", "sgd") for seed in "01" for epoch in "12"
    ]
    for line in lines:
        assert 0 <= float(line["test_accuracy"]) <= 1
        assert 0 < float(line["density"]) <= 1
        assert float(line["ms_per_step"]) > 0
        assert math.isfinite(float(line["train_loss"]) + float(line["test_loss"]))
    mean = 50 * sum(float(line["test_accuracy"]) for line in lines[1:4:2])  # CSGD's last epochs, in per cent
    assert rows[2][1].startswith(f"{mean:.2f} ±")

    picture = (out / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
    assert width > 1000
    assert height > 400


def load_backend(out):
    """CSGD's backend as in the JSON file, after a look at the rest of it."""
    content = json.loads((out / "curves.json").read_text(encoding="utf-8"))
    assert content["settings"]["lr"] == 0.05
    names = list(content["parameters"])
    assert names[0] == "conv1.weight"
    assert names[-1] == "head.bias"
    for run in content["runs"]:
        assert [epoch["epoch"] for epoch in run["epochs"]] == [1, 2]
        assert all(len(epoch["density"]) == len(names) for epoch in run["epochs"])
        assert all(0 <= share <= 1 for epoch in run["epochs"] for share in epoch["density"])
    return content["runs"][0]["backend"]


def test_in_an_ascii_locale_and_into_head_the_report_is_whole(arguments, stripes, tmp_path):
    data = tmp_path / "gr\u00f6\u00dfe"  # in an ASCII locale this name has surrogates
    shutil.copytree(stripes, data)
    command = shlex.join([sys.executable, train.__file__, *arguments("--epochs", 1, "--data", data)])
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"Training a CNN with ")
    assert done.stdout.count(b"\n") == 1
    for word in (b"Traceback", b"Exception ignored"):
        assert word not in done.stderr
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"table.md", "curves.csv", "curves.json", "curves.png"}
    table = (out / "table.md").read_text(encoding="utf-8")
    assert data.name in table
    assert "\u00b1" in table


@pytest.mark.parametrize(
    "options", [["--optimizers", "sgd"], ["--optimizers", "csgd", "--seeds", "1", "--epochs", "1"]]
)
def test_report_on_one_optimizer(arguments, tmp_path, options):
    assert train.main(arguments(*options)) == 0
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert ("| CSGD " in table) == ("csgd" in options)
    assert ("| torch.optim.SGD " in table) == ("sgd" in options)
    assert "differs by" not in table


def test_a_training_that_diverges_is_reported(arguments, tmp_path):
    assert train.main(arguments("--lr", 1e30)) == 0
    content = json.loads((tmp_path / "out" / "curves.json").read_text(encoding="utf-8"))
    assert content["runs"][0]["epochs"][-1]["train_loss"] is None


def test_learns_the_digits_with_few_coordinates_moved(tmp_path):
    assert train.main(["--seeds", "1", "--epochs", "3", "--optimizers", "csgd", "--out", str(tmp_path)]) == 0
    with (tmp_path / "curves.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["test_accuracy"]) > 0.9
    assert float(last["density"]) < 0.4
