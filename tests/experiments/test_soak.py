# SPDX-License-Identifier: Apache-2.0
"""The soak and the kills in short, and that both programs notice what they look for."""

import json
from collections import defaultdict

import pytest
import torch

from benchmarks import kills, long_training, soak

from ..distributed import launch
from ..helpers import DTYPES

assert kills.forkserver is launch.forkserver  # whose processes need not import torch
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:several optimizers"),  # of one test after another
]


def rows_of(text):
    """The cells of a page's table, without the head."""
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in cells] for cells in rows[2:]]


@pytest.mark.long
def test_short_soak_has_equal_bits_and_as_many_tensors_at_the_end(tmp_path, capsys, monkeypatch):
    """Compared once in each cycle of the training, at its end, when no group is there that comes and goes."""
    monkeypatch.setattr(soak, "processes", launch.forkserver)
    options = ["--steps", "183", "--every", str(long_training.CYCLE), "--threads", "1", "--out", str(tmp_path)]
    assert soak.main(options) == 0
    text = (tmp_path / "soak.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert str(tmp_path) not in text
    assert text.count("are equal at all 3 comparisons") == 2
    assert len(rows_of(text)) == 4
    assert all(cells[-1] == "yes" for cells in rows_of(text))
    for path in tmp_path.glob("*.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        assert run["readings"]["step"] == [61, 122, 183]
        assert len(set(run["readings"]["digest"])) == 3
        assert len(set(run["readings"]["tensors"])) == 1, path
        assert not soak.grew(run)
        assert min(run["wall_us"].values()) > 0
    # Finished runs are not made again.
    monkeypatch.setattr(soak, "processes", None)
    assert soak.main(options) == 0
    # A run whose memory grows is no success, and a damaged file is named.
    run["readings"]["resident_kib"] = [300_000, 340_000, 380_000]
    path.write_text(json.dumps(run), encoding="utf-8")
    assert soak.main(options) == 1
    assert capsys.readouterr().out.count("MEMORY GREW") == 1
    path.write_text("{", encoding="utf-8")
    assert soak.main(options) == 2
    assert f"{path}: is damaged" in capsys.readouterr().err


@pytest.mark.long
def test_memory_that_a_step_keeps_is_noticed(tmp_path, monkeypatch):
    kept, step = [], long_training.OPTIMIZERS["csgd"].step

    def leaking(self, *args):
        kept.append(bytearray(b"x" * 1_000_000))
        return step(self, *args)

    monkeypatch.setattr(long_training.OPTIMIZERS["csgd"], "step", leaking)
    monkeypatch.setattr(soak.signal, "signal", lambda *_: None)  # this process shall end by Ctrl-C
    path = tmp_path / "run.json"
    settings = {"optimizer": "csgd", "checkpoints": False, "steps": 60, "every": 20, "threads": 1}
    soak.measure(settings, {}, path)
    assert soak.grew(json.loads(path.read_text(encoding="utf-8")))


def test_reading_counts_tensors_that_stay():
    training, readings, kept = long_training.Training("csgd"), defaultdict(list), []
    for _ in range(3):
        soak.read(training, readings)
        kept += [torch.zeros(1) for _ in range(5)]
    assert [b - readings["tensors"][0] for b in readings["tensors"]] == [0, 5, 10]
    assert len(kept) == 15


def test_first_step_with_other_bits_is_named():
    runs = [{"readings": {"step": [10, 20, 30], "digest": list(digests)}} for digests in ("abc", "axy")]
    assert soak.first_difference(runs) == 20
    assert soak.first_difference(runs[:1] * 2) is None


def test_digest_takes_in_everything_that_a_checkpoint_holds():
    training = long_training.Training("adamw", DTYPES)
    for _ in range(26):
        training.run_batch()
    saved = training.state_dict()
    assert saved["heads"]
    digests = {long_training.digest(saved)}
    for name in saved:
        digests.add(long_training.digest({**saved, name: 0.5}))
    assert len(digests) == 1 + len(saved)
    before = long_training.digest(saved)
    training.optimizer.state[training.networks[0][0].weight]["step"] += 1
    assert long_training.digest(training.state_dict()) != before


def test_killed_trainings_lose_nothing(tmp_path, capsys):
    assert kills.main(["--kills", "3", "--every", "4", "--threads", "1", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "kills.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert [(cells[0], cells[1], cells[5], cells[6]) for cells in rows_of(text)] == [
        ("CSGD", "3", "0", "0"), ("CalibratedAdamW", "3", "0", "0"),
    ]  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "kills.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["optimizer"] for row in rows] == ["csgd"] * 3 + ["adamw"] * 3
    assert all(row["begun"] % 4 == row["batch"] % 4 == 0 for row in rows)


def test_checkpoint_that_is_older_than_the_last_finished_one_is_lost():
    assert kills.is_lost(found=10, saving=20, saved=20)
    assert not kills.is_lost(found=20, saving=20, saved=20)
    assert not kills.is_lost(found=10, saving=20, saved=10)  # killed before the file had its name
    assert not kills.is_lost(found=20, saving=20, saved=10)  # after it


def test_checkpoint_with_other_bits_is_found(tmp_path):
    work = kills.Work("csgd", tmp_path / "checkpoint.pt", every=2, until=4)
    training, rows = long_training.Training("csgd"), []
    for _ in range(4):
        training.run_batch()
        rows.append({"batch": training.batch, "digest": long_training.digest(training.state_dict())})
    kept = rows[1::2]
    assert kills.differences(kept, work) == []
    assert kills.differences([kept[0], {**kept[1], "digest": kept[0]["digest"]}], work) == [4]


@pytest.mark.parametrize("content", ["none", "torn", "whole"])
def test_state_of_a_save_that_did_not_end(content, tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    if content != "none":
        torch.save({"batch": 1}, long_training.part_of(checkpoint))
    if content == "torn":
        long_training.part_of(checkpoint).write_bytes(long_training.part_of(checkpoint).read_bytes()[:100])
    assert kills.state_of_part(checkpoint) == content
    assert not list(tmp_path.iterdir())
