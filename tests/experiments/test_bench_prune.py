# SPDX-License-Identifier: Apache-2.0
"""benchmarks.prune: what it writes, what it skips, what it refuses."""

import csv

import pytest

from benchmarks.prune.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert "threads of a training: 1;" in text
    assert {row["threads"] for row in rows} == {"1"}
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    monkeypatch.setattr("benchmarks.prune.__main__.train", None)
    assert main([*SHORT, "--out", str(tmp_path)]) == 0
    assert text in capsys.readouterr().out


def test_runs_from_before_threads_were_recorded_are_read(tmp_path, capsys):
    short = [*SHORT[:-3], "--sparsities", "0", "--out", str(tmp_path)]
    assert main(short) == 0
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(row[: rows[0].index("threads")] for row in rows)
    assert main(short) == 0
    assert "threads of a training: unknown;" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "message"), [
    (["--threads", "0"], "--threads must be 1 or more, got 0."),
    (["--sparsities", "1"], r"--sparsities must be in [0, 1), got 1.0."),
    (["--epochs", "0"], "--epochs must be 1 or more, got 0."),
    (["--data", "letters"], "letters"),
])  # fmt: skip
def test_errors_are_one_sentence(options, message, tmp_path, capsys):
    assert main([*options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_interrupted_it_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.prune.__main__.train", interrupted)
    assert main([*SHORT, "--out", str(tmp_path)]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "benchmarks.prune: interrupted; the same command goes on after the last finished run."
