# SPDX-License-Identifier: Apache-2.0
"""benchmarks.prune and bench_threshold: what they write, what they skip, what they refuse."""

import csv

import pytest
import torch

from benchmarks import bench_threshold
from benchmarks.prune.__main__ import main


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SHORT = ["--limit", "96", "--batch-size", "32", "--epochs", "2", "--seeds", "0", "1", "--sparsities", "0", "0.75"]


def test_every_method_prunes_to_the_sparsity_and_a_second_call_makes_no_run(tmp_path, monkeypatch, capsys):
    assert main([*SHORT, "--out", str(tmp_path)]) == 0
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 + 2 * 4 * 2  # dense, and structures x methods
    for row in rows:
        assert float(row["zeros"]) >= float(row["sparsity"])
        assert float(row["difference"]) <= 1e-5
        assert (row["structure"] == "filter") == (float(row["exported"]) < 0.5 * float(row["weights"]))
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text.count("\n| ") == 2 + 1 + 2 * 4  # the head, dense, the others
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    monkeypatch.setattr("benchmarks.prune.__main__.train", None)
    assert main([*SHORT, "--out", str(tmp_path)]) == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(("options", "message"), [
    (["--sparsities", "1"], r"--sparsities must be in [0, 1), got 1.0."),
    (["--epochs", "0"], "--epochs must be 1 or more, got 0."),
    (["--data", "letters"], "letters"),
])  # fmt: skip
def test_errors_are_one_sentence(options, message, tmp_path, capsys):
    assert main([*options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_threshold_benchmark_writes_a_table(tmp_path):
    assert bench_threshold.main(["--sizes", "100", "400", "--repeat", "3", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "threshold-cpu.md").read_text(encoding="utf-8")
    assert text.count("| hard_threshold_ |") == 2
    assert "python benchmarks/bench_threshold.py --sizes 100 400 --repeat 3" in text


def test_threshold_benchmark_refuses_what_it_cannot_measure(tmp_path, capsys):
    assert bench_threshold.main(["--sparsity", "1", "--out", str(tmp_path)]) == 2
    assert "--sparsity must be between 0 and 1" in capsys.readouterr().err
