# SPDX-License-Identifier: Apache-2.0
"""The benchmark of one step: its lists are the architectures', and a tiny run writes a report that is right."""

import json
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from csgd_cuda import extension

from ..helpers import instruction_set

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_step
from step_bench import bars, gradients, report, run, timing
from step_bench.lists import LISTS, numel, scaled
from step_bench.peers import BASELINES, PEERS

PROGRAM = Path(bench_step.__file__).resolve()


@pytest.mark.parametrize(
    ("name", "device", "tensors", "elements"),
    [
        ("resnet50", "cpu", 161, 25_557_032),  # both as in torchvision
        ("vit_b16", "cuda", 152, 86_567_656),
        ("decoder_1b", "cuda", 147, 1_104_218_112),
        ("thousand", "cuda", 1000, 1_000_000),
        ("tiny161", "cpu", 161, 161 * 64),
        ("each161", "cpu", 161, 161 * 64),
        ("flat", "cpu", 1, 2**25),
        ("flat", "cuda", 1, 2**28),
    ],
)
def test_lists_are_the_architectures(name, device, tensors, elements):
    shapes = LISTS[name].shapes(device)
    assert (len(shapes), numel(shapes)) == (tensors, elements)
    smaller = scaled(shapes, 0.01)
    assert len(smaller) == tensors
    assert [len(shape) for shape in smaller] == [len(shape) for shape in shapes]
    assert tensors <= numel(smaller) < elements


def test_gradients_follow_the_stored_quantiles():
    quantiles = gradients.Quantiles()
    assert gradients.FILE.stat().st_size <= 20_000
    assert all(a <= b for a, b in zip(quantiles.values, quantiles.values[1:], strict=False))
    drawn = [quantiles.draw(200_000, torch.Generator().manual_seed(seed), torch.float32) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    size = drawn[0].abs() / gradients.LARGEST
    assert size.max() <= 1
    assert abs(drawn[0].sign().mean()) < 0.02
    assert size.mean() == pytest.approx(quantiles.origin["mean"], rel=0.02)
    for k in (32, 64, 96):  # the quartiles
        assert (size < quantiles.values[k]).float().mean() == pytest.approx(k / 128, abs=0.01)


def test_quantiles_of_known_numbers():
    values = gradients._quantiles(torch.arange(1281.0).flip(0) / 1280)
    assert values[0] == 0
    assert values[64] == 0.5
    assert values[-1] == 1


def test_every_call_takes_its_samples_evenly_over_the_rounds():
    calls = dict.fromkeys("abc", lambda: 1.0)
    measured = timing.interleave(calls, {"a": 12, "b": 12, "c": 3}, 12, lambda: None)
    assert list(measured["a"]) == list(measured["b"]) == list(range(12))
    assert list(measured["c"]) == [0, 4, 8]


def test_no_call_always_goes_first():
    order = []
    calls = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    timing.interleave(calls, {"a": 20, "b": 20}, 20, lambda: None)
    assert all(set(order[i : i + 2]) == {"a", "b"} for i in range(0, 40, 2))
    assert set(order[::2]) == {"a", "b"}


@pytest.mark.parametrize("family", BASELINES)
def test_memory_decides_which_peers_are_measured_together(family):
    peers, baseline = [peer for peer in PEERS.values() if peer.family == family], BASELINES[family]
    assert run.batches(peers, 100, None, 0) == [peers]
    assert run.batches(peers, 100, 100_000, 0) == [peers]
    pairs = run.batches(peers, 100, 1000, 0)
    assert [pair[0].name for pair in pairs] == [baseline] * (len(peers) - 1)
    assert {pair[1].name for pair in pairs} == {peer.name for peer in peers} - {baseline}
    assert run.batches(peers, 100, 500, 0) is None


@pytest.mark.usefixtures("one_thread")
def test_a_tiny_run_writes_figures_and_a_table(tmp_path, capsys):
    command = [
        "--lists",
        "flat,tiny161,each161",
        "--scale",
        "0.001",
        "--repeat",
        "2",
        "--out",
        str(tmp_path / "results"),
    ]
    assert bench_step.main([*command, "--peers", "sgd_foreach,csgd,csgd_5,csgd_dense,csgd_off,reference,apex"]) == 0
    table = (tmp_path / "results" / "step-cpu-float32.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert str(tmp_path) not in table
    results = json.loads((tmp_path / "results" / "step-cpu-float32.json").read_text(encoding="utf-8"))
    assert set(results["lists"]) == {"flat", "tiny161", "each161"}
    assert {"date", "CPU", "torch", "python", "threads", "csgd_cuda", "command"} <= set(results["machine"])
    kernel = extension.why_no_kernel(torch.device("cpu")) is None
    for entry in results["lists"].values():
        check_list(entry, kernel)
    rows = results["lists"]["flat"]["rows"]
    assert rows["reference"]["density"] == pytest.approx(gradients.Quantiles().origin["mean"], rel=0.2)
    if kernel:
        assert rows["csgd"]["density"] == pytest.approx(rows["reference"]["density"], rel=0.2)
        assert rows["csgd_5"]["density"] == pytest.approx(0.05, rel=0.2)
        assert rows["csgd_dense"]["density"] == rows["csgd_off"]["density"] == 1


@pytest.mark.usefixtures("one_thread")
def test_a_tiny_run_of_adamw(tmp_path):
    command = ["--optimizer", "adamw", "--lists", "flat", "--scale", "0.001", "--repeat", "2", "--out", str(tmp_path)]
    assert bench_step.main(command) == 0
    assert "# One step of AdamW, cpu, float32" in (tmp_path / "step-adamw-cpu-float32.md").read_text(encoding="utf-8")
    (entry,) = json.loads((tmp_path / "step-adamw-cpu-float32.json").read_text(encoding="utf-8"))["lists"].values()
    check_rows(entry)
    rows = entry["rows"]
    assert rows["adamw_reference"]["density"] == pytest.approx(0.25, rel=0.1)
    if extension.why_no_kernel(torch.device("cpu")) is None:
        assert rows["adamw_25"]["density"] == pytest.approx(0.25, rel=0.1)
        assert rows["adamw_5"]["density"] == pytest.approx(0.05, rel=0.2)
        assert rows["adamw_dense"]["density"] == rows["adamw_off"]["density"] == 1
    assert bench_step.main([*command, "--peers", "csgd"]) == 2


def check_list(entry, kernel):
    rows = entry["rows"]
    assert "left_out" in rows["apex"]
    assert ("left_out" in rows["csgd"]) is not kernel
    check_rows(entry)


def check_rows(entry):
    rows = entry["rows"]
    assert entry["copy_gb_s"] > 0
    for name, row in rows.items():
        if "left_out" in row:
            continue
        assert row["ms"] > 0
        assert math.isclose(
            row["gb_s"], {"sgd": 20e-6, "adamw": 28e-6}[PEERS[name].family] * entry["elements"] / row["ms"]
        )
        assert math.isclose(row["share_of_copy"], row["gb_s"] / entry["copy_gb_s"])
        assert row["ratio"] == 1 if name in BASELINES.values() else row["ratio"] > 0
        assert row["launches"] is row["host_us"] is row["extra_mib"] is None


def test_figures_not_measured_are_a_dash():
    row = dict.fromkeys(("ratio", "ratio_quartiles", "launches", "host_us", "extra_mib", "density", "version"))
    row |= {"ms": 1.0, "gb_s": 2.0, "share_of_copy": 0.5, "samples_ms": [1.0]}
    entry = {"label": "one", "tensors": 1, "elements": 100_000, "notes": [], "rows": {"sgd_fused": row}}
    text = report.markdown(
        {"device": "cuda", "dtype": "float32", "optimizer": "sgd", "machine": {}, "notes": [], "lists": {"x": entry}}
    )
    line = next(line for line in text.splitlines() if line.startswith("| torch SGD fused"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "torch SGD fused", "1.00", "-", "-", "2.00", "50.0%", "-", "-", "-", "-", "1",
    ]  # fmt: skip


def reached(dtype, flat, resnet50, elements=2**28):
    """The last cells of the table of bars for made-up measurements on a GPU."""
    lists = {"flat": {"elements": elements, "rows": flat}, "resnet50": {"elements": 25_557_032, "rows": resnet50}}
    lines = bars.table({"device": "cuda", "dtype": dtype, "optimizer": "sgd", "lists": lists})
    return [[cell.strip() for cell in line.strip("|").split("|")][3:] for line in lines[2:]]


def test_bars_are_met_or_missed():
    off = {"ratio": 1.0}
    five = {"ratio": 0.79}
    baseline = {"host_us": 400.0}
    model = {"sgd_fused": baseline, "csgd": {"launches": 1, "host_us": 199.0}}
    flat = {"csgd_dense": {"share_of_copy": 0.9, "ratio": 1.04}, "csgd_off": off, "csgd_5": five}
    assert reached("float32", flat, model) == [
        ["90.0%", "met"], ["1.27", "met"], ["4.0%", "met"], ["1", "met"], ["49.8%", "met"],
    ]  # fmt: skip
    flat |= {"csgd_dense": {"share_of_copy": 0.89, "ratio": 1.06}, "csgd_5": {"ratio": 0.81}}
    model["csgd"] = {"launches": 2, "host_us": 201.0}
    assert [outcome for _, outcome in reached("float32", flat, model)] == ["MISSED"] * 5
    assert reached("bfloat16", flat, model) == [["89.0%", "met"]]
    flat["csgd_dense"]["share_of_copy"] = 0.79
    assert reached("bfloat16", flat, model) == [["79.0%", "MISSED"]]


def test_bars_without_their_figures_are_not_measured():
    model = {"sgd_fused": {"host_us": None}, "csgd": {"launches": None, "host_us": 199.0}}
    dense = {"csgd_dense": {"share_of_copy": 0.9, "ratio": 1.04}}
    flat = {**dense, "csgd_off": {"ratio": None}, "csgd_5": {"left_out": "no kernel"}}
    outcomes = [outcome for _, outcome in reached("float32", flat, model)]
    assert outcomes == ["met", *["not measured"] * 4]
    assert reached("bfloat16", dense, {}, elements=2**20) == [["-", "not measured"]]
    assert bars.table({"device": "cpu", "dtype": "bfloat16", "optimizer": "sgd", "lists": {}}) == []


def test_bars_of_small_tensors_on_a_cpu():
    bounds = {"tiny1": 1.0, "tiny10": 0.8, "tiny161": 0.4, "each161": 1.0}
    for factor, outcome in ((0.99, "met"), (1.01, "MISSED")):
        lists = {
            name: {"elements": numel(LISTS[name].shapes("cpu")), "rows": {"csgd": {"ratio": factor * bound}}}
            for name, bound in bounds.items()
        }
        lines = bars.table({"device": "cpu", "dtype": "float32", "optimizer": "sgd", "lists": lists})[2:]
        assert [line.strip("| ").split(" | ")[-1] for line in lines] == [outcome] * len(bounds)


@pytest.mark.parametrize("options", [["--lists", "nonsense"], ["--repeat", "0"], ["--scale", "-1"], ["--peers", "x"]])
def test_wrong_options_are_named(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_step.main(options)
    assert options[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(capsys):
    assert bench_step.main(["--device", "cuda"]) == 2
    assert "sees no CUDA GPU" in capsys.readouterr().err


def test_the_instruction_set_can_be_chosen(tmp_path, capsys):
    arguments = ["--lists", "tiny1", "--peers", "csgd", "--repeat", "1", "--cpu-isa"]
    with instruction_set("baseline"):  # restores what is usual here
        assert bench_step.main([*arguments, "baseline", "--out", str(tmp_path)]) == 0
        results = json.loads((tmp_path / "step-cpu-float32.json").read_text())
        assert "CPU kernel uses baseline" in results["machine"]["csgd_cuda"]
        with mock.patch.object(extension._C, "set_cpu_isa", return_value=False):
            assert bench_step.main([*arguments, "avx512", "--out", str(tmp_path)]) == 2
    assert "--cpu-isa avx512: this processor, or the extension, does not have it" in capsys.readouterr().err


def test_it_is_a_program():
    program = [sys.executable, str(PROGRAM), "--help"]
    assert "--scale" in subprocess.run(program, capture_output=True, text=True, check=True).stdout
