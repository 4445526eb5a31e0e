# SPDX-License-Identifier: Apache-2.0
"""The experiment of degraded images: from the command line to the report, in pieces, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import grid
from experiments.__main__ import main
from experiments.degraded import report
from experiments.degraded.summary import Summary
from experiments.report.logs import Experiment, RunLog

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


def arguments(out, *more):
    """A tiny comparison on the digits; later options win."""
    tiny = "--limit 48 --test-limit 12 --epochs 1 --batch-size 16 --width 2 --levels 1 --seeds 0 --methods csgd"
    return ["degraded", *tiny.split(), "--workers", "1", "--out", str(out), *map(str, more)]


def assert_is_picture(path):
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) > 200
    assert len(np.unique(pixels)) > 20


def logs(out):
    """What each finished run has left, by file name."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))}


def test_one_command_trains_all_and_reports(tmp_path):
    out = tmp_path / "new" / "out"
    options = "--models", "film", "plane", "--methods", "csgd", "sgd", "--workers", "2"
    done = subprocess.run(
        [sys.executable, "-m", "experiments", *arguments(out, *options)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.startswith("Training 4 of 4 runs: film, plane with ")
    assert "2 at a time, threads of each: 1" in done.stdout.splitlines()[0]
    table = (out / "report" / "table.md").read_text(encoding="utf-8")
    assert table.strip() in done.stdout
    for words in ("| CSGD ", "| SGD ", "feature modulation", "input planes", "JPEG quality 5", "noise sigma 100"):
        assert words in table
    assert "python -m experiments degraded --limit 48" in table
    assert str(tmp_path) not in table
    assert len(logs(out)) == 4
    for log in logs(out).values():
        parameters, conditions = log["results"]["parameters"], log["results"]["conditions"]
        assert parameters["known"] == parameters["absent"] > parameters["estimator"] > 0
        assert [result["kind"] for result in conditions] == ["clean", "jpeg", "noise", "blur"]
        assert all(0 <= share <= 1 for result in conditions for share in result["accuracy"].values())
    for variant in ("csgd-film", "csgd-plane", "sgd-film", "sgd-plane"):
        assert_is_picture(out / "report" / f"accuracy-{variant}.png")
        assert_is_picture(out / "report" / f"samples-{variant}.png")


def test_in_pieces_or_at_once_gives_the_same_and_trains_nothing_twice(no_plots, tmp_path, monkeypatch):
    at_once, pieces = tmp_path / "a", tmp_path / "b"
    assert main(arguments(at_once, "--seeds", 0, 1)) == 0
    for seed in (1, 0):
        assert main(arguments(pieces, "--seeds", seed)) == 0
    figures = [{name: log["results"] for name, log in logs(out).items()} for out in (at_once, pieces)]
    assert figures[0] == figures[1]
    assert len(figures[0]) == 2
    tables = [
        (out / "report" / "table.md").read_text(encoding="utf-8").partition("```sh")[0] for out in (at_once, pieces)
    ]
    assert tables[0] == tables[1]
    monkeypatch.setattr(grid, "train", None)
    assert main(arguments(at_once, "--seeds", 0, 1)) == 0


def test_mixture_of_all_and_colour(tmp_path, capsys):
    """CIFAR's binary files, by the project's reader; a chain of two."""
    generator = np.random.default_rng(0)
    for i in range(1, 7):
        rows = generator.integers(0, 256, (12, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(12) % 10
        (tmp_path / ("test_batch.bin" if i == 6 else f"data_batch_{i}.bin")).write_bytes(rows.tobytes())
    options = "--data", "cifar10", "--data-dir", tmp_path, "--degradations", "jpeg", "blur", "--mixture", "chain"
    assert main(arguments(tmp_path / "out", *options)) == 0
    printed = capsys.readouterr().out
    assert "12 test images of 3 x 32 x 32" in printed
    assert "JPEG quality 5, blur sigma 3" in printed
    assert_is_picture(tmp_path / "out" / "report" / "samples-csgd-film.png")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--worst-quality", "0"], "--worst-quality: '0' is not a whole number from 1 to 95"),
        (["--worst-quality", "96"], "--worst-quality: '96' is not a whole number from 1 to 95"),
        (["--max-noise", "-1"], "--max-noise: '-1' is not a number from 0 to 255"),
        (["--max-noise", "nan"], "--max-noise: 'nan' is not a number from 0 to 255"),
        (["--max-blur", "10.5"], "--max-blur: '10.5' is not a number from 0 to 10"),
        (["--strengths", "0.5", "2"], "--strengths: '2' is not a number from 0 to 1"),
        (["--strengths", "1", "0"], "--strengths 1 0: "),
        (["--degradations", "fog"], "--degradations: invalid choice: 'fog'"),
        (["--data", "cifar10"], "--data cifar10: needs --data-dir"),
        (["--data", "letters"], "--data letters: not among digits"),
        (["--limit", "100000"], "--limit"),
        (["--test-limit", "3"], "--test-limit: '3' is not a whole number of at least 8"),
        (["--device", "tpu"], "--device tpu: not a device"),
        (["--calibration", "-1"], "--calibration: '-1'"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(tmp_path, capsys, options, words):
    assert main(arguments(tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("experiments: error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_logs_of_other_settings_are_not_mixed(no_plots, tmp_path, capsys):
    assert main(arguments(tmp_path)) == 0
    before = (tmp_path / "report" / "table.md").read_bytes()
    capsys.readouterr()
    assert main(arguments(tmp_path, "--max-blur", 2, "--seeds", 1)) == 2
    assert "data.mixture.worst.blur: 3.0 there, 2.0 here" in capsys.readouterr().err
    for option, named in (("--calibration", "data.calibration: 1.0"), ("--lr", "lr: 0.05")):
        assert main(arguments(tmp_path, option, 0.5, "--seeds", 1)) == 2
        assert f"{named} there, 0.5 here" in capsys.readouterr().err
    assert (tmp_path / "report" / "table.md").read_bytes() == before


def make_log(seed, accuracies, injection="film"):
    """accuracies: (text, kind, strength) -> known, estimated, absent, withheld."""
    names = "known", "estimated", "absent", "withheld"
    conditions = [
        {
            "text": text, "kind": kind, "strength": strength, "value": "", "vector": [strength],
            "accuracy": dict(zip(names, shares, strict=True)),
            "estimation_error": [0.25], "probe_error": [0.125], "shown": {},
        }
        for (text, kind, strength), shares in accuracies.items()
    ]  # fmt: skip
    settings = {
        "task": "degraded", "model": injection, "method": "csgd", "calibration": 1.0, "lr": 0.1, "seed": seed,
        "about": {"images": {"train": 10, "test": 100}, "image_size": [1, 8, 8]},
        "data": {
            "data": "made up", "width": 2, "levels": 1,
            "mixture": {
                "kinds": ["noise"], "how": "one", "strengths": [0, 1],
                "worst": {"quality": 5, "noise": 40.0, "blur": 3.0},
            },
        },
        "recipe": {
            "epochs": 2, "batch_size": 2, "momentum": 0.9, "weight_decay": 0.0, "nesterov": False,
            "schedule": {"kind": "cosine", "milestones": [], "warmup": 0},
        },
        "execution": {"dtype": "float32"},
    }  # fmt: skip
    results = {"parameters": {"known": 1234, "absent": 1234, "estimator": 567}, "conditions": conditions}
    losses = {"train_known_loss": 0.5 + 0.01 * seed, "train_absent_loss": 0.52}
    epochs = [{"train_known_loss": 9.0, "train_absent_loss": 0.0}, losses]
    environment = {"command": f"run {seed}", "CPU": "one", "date": str(seed)}
    return RunLog(f"{injection}-{seed}", settings, epochs, False, results, environment)


def row(table, *starts):
    """Cells of the one row of a Markdown text whose first cells are these."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    (found,) = (cells for cells in rows if tuple(cells[: len(starts)]) == starts)
    return found[len(starts) :]


def test_report_computes_means_deviations_and_paired_gains():
    clean, noisy = ("clean", "clean", 0.0), ("noise sigma 40", "noise", 1.0)
    runs = [
        make_log(1, {clean: (0.90, 0.80, 0.70, 0.1), noisy: (0.60, 0.58, 0.50, 0.1)}),
        make_log(0, {clean: (0.80, 0.80, 0.70, 0.3), noisy: (0.64, 0.54, 0.50, 0.1)}),
        make_log(0, {clean: (0.50, 0.50, 0.50, 0.5), noisy: (0.50, 0.50, 0.50, 0.5)}, "plane"),
    ]
    text = report.markdown(Summary(Experiment.of(runs, report.VARIED)))
    # Deviation of (0.9, 0.8): 7.07 points; of the means of both conditions, (0.75, 0.72): 2.12.
    assert row(text, "CSGD", "feature modulation") == [
        "2", "73.50 ± 2.12", "68.00 ± 1.41", "60.00 ± 0.00", "+13.50 ± 1.50", "+8.00 ± 1.00",
        "-0.0150 ± 0.0050", "1,234", "567",
    ]  # fmt: skip
    film, plane = text.split("**CSGD, feature modulation**")[1].split("**CSGD, input planes**")
    assert row(film, "clean") == [
        "85.00 ± 7.07", "80.00 ± 0.00", "70.00 ± 0.00", "+15.00 ± 5.00", "+10.00 ± 0.00", "20.00 ± 14.14",
        "0.250", "0.125",
    ]  # fmt: skip
    assert row(film, "noise sigma 40")[3:5] == ["+12.00 ± 2.00", "+6.00 ± 2.00"]
    assert row(plane, "clean")[:4] == ["50.00", "50.00", "50.00", "+0.00"]  # one seed: no deviation
    assert row(text, "CSGD, feature modulation", "known") == ["+15.00 ± 5.00", "+12.00 ± 2.00"]
    assert "run 1\nrun 0" in text
    assert text.count("- CPU: one") == 1


def test_help_explains_regimes(capsys):
    with pytest.raises(SystemExit):
        main(["degraded", "--help"])
    printed = capsys.readouterr().out
    for words in ("known", "estimated", "absent", "equal size", "--worst-quality", "Endo"):
        assert words in printed
