# SPDX-License-Identifier: Apache-2.0
"""The example program: resumes bit for bit, says what is wrong, and writes a report that is right."""

import csv
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from csgd_cuda import extension

from .helpers import assert_same_bits

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import train
from training import checkpoint, loop
from training.errors import UserError

PROGRAM = Path(train.__file__).resolve()
WIDTH = 3  # channels: the network has few parameters, its checkpoint few bytes
BATCH = 16


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other make so small a network slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """A tiny IDX data set that a network can learn: noisy images with a bright row, its number the label."""
    directory = tmp_path_factory.mktemp("stripes")
    generator = np.random.default_rng(0)
    for part, count in (("train", 104), ("t10k", 40)):
        labels = np.arange(count, dtype=np.uint8) % 4
        images = generator.integers(0, 100, (count, 8, 8), dtype=np.uint8)
        images[np.arange(count), 2 * labels] += 150
        for kind, array in (("images", images), ("labels", labels)):
            header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (directory / f"{part}-{kind}-idx{array.ndim}-ubyte").write_bytes(header + array.tobytes())
    return directory


@pytest.fixture
def arguments(stripes, tmp_path):
    """Makes a command line for a short training; later options win."""

    def make(*options):
        common = ["--data", stripes, "--width", WIDTH, "--batch-size", BATCH, "--seeds", 2, "--epochs", 2]
        return [str(option) for option in (*common, "--out", tmp_path / "out", *options)]

    return make


def assert_same(a, b, where="checkpoint"):
    """Containers with the same keys, numbers and raw bits; what was measured with a clock may differ."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert_same_bits(a, b, where)
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"ms_per_step"}:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("fused", ["auto", "no"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_epochs_are_two_and_two_more(arguments, tmp_path, dtype, fused):
    options = ["--dtype", dtype, "--fused", fused, "--lr-step", 3]
    whole, half, resumed = (tmp_path / name for name in ("whole.pt", "half.pt", "resumed.pt"))
    assert train.main(arguments(*options, "--epochs", 4, "--save", whole)) == 0
    assert train.main(arguments(*options, "--epochs", 2, "--save", half)) == 0
    assert train.main(arguments(*options, "--epochs", 4, "--resume", half, "--save", resumed)) == 0
    a, b = load(whole), load(resumed)
    assert_same(a, b)
    assert set(a["runs"]) == {"csgd-0", "csgd-1", "sgd-0", "sgd-1"}
    for run in a["runs"].values():
        assert len(run["history"]) == 4
        assert [epoch["lr"] for epoch in run["history"]] == pytest.approx([0.05, 0.05, 0.05, 0.005])
        assert {t.dtype for t in run["model"].values() if t.is_floating_point()} == {getattr(torch, dtype)}
        assert all("momentum_buffer" in state for state in run["optimizer"]["state"].values())


def test_resumes_in_a_process_of_its_own(arguments, tmp_path):
    """From another directory, by path, with nothing but the checkpoint in common."""
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    assert train.main(arguments("--epochs", 3, "--save", whole)) == 0
    for options in (["--epochs", 1, "--save", part], ["--epochs", 3, "--resume", part, "--save", part]):
        command = [sys.executable, str(PROGRAM), *arguments(*options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "100%" in done.stderr  # the progress bar
    assert_same(load(whole), load(part))


def test_resumes_where_an_interrupted_program_was(arguments, tmp_path, monkeypatch):
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    assert train.main(arguments("--save", whole)) == 0
    epochs = []
    real = loop.Trainer.train_epoch

    def interrupted(self, after_step):
        epochs.append(self.name)
        if len(epochs) == 4:
            raise KeyboardInterrupt
        real(self, after_step)

    monkeypatch.setattr(loop.Trainer, "train_epoch", interrupted)
    assert train.main(arguments("--save", part)) == 130
    monkeypatch.undo()
    assert [len(run["history"]) for run in load(part)["runs"].values()] == [2, 1]
    assert train.main(arguments("--resume", part, "--save", part)) == 0
    assert_same(load(whole), load(part))


def test_both_optimizers_get_the_same_start_and_batches(arguments, tmp_path):
    """Without calibration CSGD is SGD: only the same initialisation and order make the losses equal, too."""
    assert train.main(arguments("--calibration", 0, "--save", tmp_path / "c.pt")) == 0
    runs = load(tmp_path / "c.pt")["runs"]
    for seed in (0, 1):
        losses = [[e["train_loss"] for e in runs[f"{name}-{seed}"]["history"]] for name in ("csgd", "sgd")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert runs["csgd-0"]["history"][0]["train_loss"] != runs["csgd-1"]["history"][0]["train_loss"]


def test_every_epoch_has_an_order_of_its_own():
    orders = [torch.cat(loop._batches(100, 16, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert all(order.sort().values.equal(torch.arange(100)) for order in orders)
    assert all(not orders[i].equal(orders[j]) for i in range(4) for j in range(i))


def test_global_state_is_left_alone(arguments):
    before = torch.random.get_rng_state()
    assert train.main(arguments("--epochs", 1)) == 0
    assert torch.random.get_rng_state().equal(before)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.fixture
def saved(arguments, tmp_path):
    """A checkpoint of one epoch."""
    path = tmp_path / "saved.pt"
    assert train.main(arguments("--epochs", 1, "--save", path)) == 0
    return path


def refused(capsys, argv, *words):
    """Exit status 2 and one sentence on stderr with all these words in it."""
    capsys.readouterr()
    assert train.main([str(a) for a in argv]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert str(word) in message
    assert message.startswith("train.py: error: ")
    assert message.count("\n") == 1
    assert message.endswith(".\n")


def test_contradicting_resume_is_refused(arguments, saved, stripes, capsys):
    contradictions = [
        (["--lr", 0.1], "--lr 0.05 there and 0.1 here"),
        (["--lr-step", 2], "--lr-step 10 there and 2 here"),
        (["--momentum", 0], "--momentum 0.9 there and 0.0 here"),
        (["--weight-decay", 0.01], "--weight-decay 0.0 there and 0.01 here"),
        (["--calibration", 2], "--calibration 1.0 there and 2.0 here"),
        (["--seeds", 3], "--seeds 2 there and 3 here"),
        (["--batch-size", 8], "--batch-size 16 there and 8 here"),
        (["--width", 4], "--width 3 there and 4 here"),
        (["--dtype", "bfloat16"], "--dtype float32 there and bfloat16 here"),
        (["--fused", "no"], "--fused auto there and no here"),
        (["--optimizers", "csgd"], "--optimizers csgd,sgd there and csgd here"),
        (["--limit", 50], "--limit None there and 50 here"),
    ]
    for options, words in contradictions:
        refused(capsys, arguments("--resume", saved, *options), saved, words, "or start afresh")
    path = stripes / "t10k-labels-idx1-ubyte"
    labels = path.read_bytes()
    try:
        path.write_bytes(labels[:-1] + bytes([labels[-1] ^ 1]))
        refused(capsys, arguments("--resume", saved), saved, "--data", "checksum")
    finally:
        path.write_bytes(labels)


def test_resume_beyond_the_epochs_is_refused(arguments, tmp_path, capsys):
    assert train.main(arguments("--save", tmp_path / "x.pt")) == 0
    refused(capsys, arguments("--resume", tmp_path / "x.pt", "--epochs", 1), "already has 2 epochs", "--epochs 2")


def test_resume_with_nothing_left_reports_again(arguments, saved, tmp_path):
    table = (tmp_path / "out" / "table.md").read_text()
    (tmp_path / "out" / "table.md").unlink()
    assert train.main(arguments("--resume", saved, "--epochs", 1)) == 0
    assert (tmp_path / "out" / "table.md").read_text() == table


def test_damaged_checkpoint_is_refused(arguments, saved, tmp_path, capsys):
    content = saved.read_bytes()
    middle = len(content) // 2
    weights = next(leaf for leaf in tree_leaves(load(saved)) if isinstance(leaf, torch.Tensor) and leaf.numel() > 8)
    inside = content.index(weights.numpy().tobytes())  # elsewhere it may be padding
    damages = {
        "cut": content[:middle],
        "empty": b"",
        "garbage": bytes(range(256)) * 40,
        "flipped": content[:inside] + bytes([content[inside] ^ 1]) + content[inside + 1 :],
    }
    path = tmp_path / "damaged.pt"
    for damaged in damages.values():
        path.write_bytes(damaged)
        refused(capsys, arguments("--resume", path), path, "damaged, cut short or no checkpoint")
    refused(capsys, arguments("--resume", tmp_path / "none.pt"), "none.pt", "no such file")
    refused(capsys, arguments("--resume", tmp_path), tmp_path, "cannot be read")
    for other in (torch.ones(3), {"model": 1}, {"format": 1, "settings": 1}):
        torch.save(other, path)
        refused(capsys, arguments("--resume", path), path, "not a checkpoint of this program")
    torch.save({**load(saved), "format": 99}, path)
    refused(capsys, arguments("--resume", path), path, "checkpoint format 99")
    torch.save({**load(saved), "runs": {"csgd-0": {}}}, path)
    refused(capsys, arguments("--resume", path), path, "incomplete")


def test_any_damage_is_refused_or_harmless(saved, tmp_path):
    """Cut anywhere, or with any bit flipped, the file is refused, or it is read with the same content."""
    right = load(saved)
    settings = loop.Settings(**right["settings"])
    content = saved.read_bytes()
    path = tmp_path / "damaged.pt"
    generator = np.random.default_rng(1)
    for place in generator.integers(0, len(content), 150):
        flipped = bytearray(content)
        flipped[place] ^= 1 << generator.integers(8)
        for damaged in (content[:place], bytes(flipped)):
            path.write_bytes(damaged)
            try:
                runs = checkpoint.load(str(path), settings, 9)
            except UserError:
                continue
            assert_same(runs, right["runs"])


def test_save_is_atomic(saved, monkeypatch, tmp_path):
    before = saved.read_bytes()
    settings = loop.Settings(**load(saved)["settings"])

    def disk_full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(UserError, match=r"--save .*saved\.pt: .*No space left"):
        checkpoint.save(str(saved), settings, {})
    assert saved.read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", "-1"], ["--lr", "'-1'", "at least 0"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--momentum", "much"], ["--momentum", "'much'"]),
        (["--epochs", "0"], ["--epochs", "'0'", "whole number of at least 1"]),
        (["--batch-size", "1.5"], ["--batch-size", "'1.5'"]),
        (["--optimizers", "adam"], ["--optimizers", "'adam'"]),
        (["--optimizers", "csgd,csgd"], ["--optimizers", "'csgd,csgd'"]),
        (["--dtype", "float16"], ["--dtype", "'float16'"]),
        (["--device", "tpu"], ["--device tpu", "cuda:N"]),
        (["--device", "mps"], ["--device mps", "cuda:N"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["--save", "nowhere/x.pt"], ["--save nowhere/x.pt", "does not exist"]),
        (["--save", "."], ["--save .", "is a directory"]),
        (["--out", __file__], ["--out", __file__, "cannot be created"]),
    ],
)
def test_bad_option_is_named(arguments, capsys, options, words):
    refused(capsys, arguments(*options), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu_is_refused(capsys):
    refused(capsys, ["--device", "cuda"], "--device cuda: this PyTorch", "use --device cpu")


def test_results_that_cannot_be_written_are_named(arguments, tmp_path, capsys):
    (tmp_path / "out" / "curves.csv").mkdir(parents=True)
    capsys.readouterr()
    assert train.main(arguments("--epochs", 1)) == 2
    captured = capsys.readouterr()
    assert "| CSGD " in captured.out
    assert f"train.py: error: --out {tmp_path / 'out'}: cannot be written" in captured.err


def test_fused_without_a_kernel_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(extension, "why_no_kernel", lambda device: "the kernel is on holiday")
    capsys.readouterr()
    assert train.main(arguments("--fused", "yes")) == 2
    message = capsys.readouterr().err
    assert "train.py: error: --fused yes: " in message
    assert "the kernel is on holiday" in message


def test_report(arguments, tmp_path, capsys):
    assert train.main(arguments()) == 0
    out = tmp_path / "out"
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows] == ["optimizer", "-" * len(rows[1][0]), "CSGD", "torch.optim.SGD"]
    assert all("±" in cell for row in rows[2:] for cell in row[1:6])
    assert [row[6] for row in rows[2:]] == [load_backend(out), "torch for-loop"]
    for word in ("104 training and 40 test images of 8 x 8", "2 epochs, 2 seeds", "lr 0.05", "batch size 16"):
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
