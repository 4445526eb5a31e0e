# SPDX-License-Identifier: Apache-2.0
"""The experiment of the paper's layer: what its filters are, what it writes, what it refuses."""

import csv
import json

import pytest
import torch
from torch import nn

from csgd_cuda import GCConv2d
from csgd_cuda.layers.branches import FilterBranches
from experiments import models
from experiments.__main__ import main
from experiments.gclayer.filters import FILTERS, Filtered, with_base_filters
from experiments.gclayer.report import points

SHAPE = models.Shape(3, (16, 16), 10)


def built(filters: str, network: str = "resnet20", seed: int = 1) -> nn.Module:
    method = Filtered("sgd", None, filters)
    model = models.build(method.network(network), seed, SHAPE)
    method.calibrate(model, seed)
    return model


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("network", ["vgg-small", "resnet20"])
def test_gc_has_about_as_many_weights_as_the_network_of_half_the_width(network):
    plain, half, gc = (weights(built(filters, network)) for filters in ("plain", "half", "gc"))
    assert plain > 3.5 * half
    assert half < gc < 1.05 * half


@pytest.mark.parametrize("filters", [name for name in FILTERS if name.startswith("gc")])
def test_base_filters_start_with_the_variance_of_the_filters_they_replace(filters):
    plain, changed = built("plain"), built(filters)
    pairs = zip(plain.modules(), changed.modules(), strict=True)
    compared = [(a, b) for a, b in pairs if isinstance(b, GCConv2d)]
    assert len(compared) == 19
    for a, b in compared:
        assert b.filters().shape == a.weight.shape
        torch.testing.assert_close(b.filters().std(), a.weight.std())


@pytest.mark.parametrize("filters", FILTERS)
def test_the_seed_alone_decides_the_filters(filters):
    state = torch.get_rng_state()
    first, again, other = (list(built(filters, seed=seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_factors_that_are_not_trained_get_no_step():
    model = built("gc-fixed")
    (optimizer,) = Filtered("csgd", 0.25, "gc-fixed").optimizers(model, 0.1, 0, 1, momentum=0.9)
    before = [m.factors.clone() for m in model.modules() if isinstance(m, GCConv2d)]
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert all(map(torch.equal, before, [m.factors for m in model.modules() if isinstance(m, GCConv2d)]))


def test_drawn_keeps_the_weights_of_the_plain_network():
    plain, drawn = built("plain"), built("drawn")
    assert sum(isinstance(m, FilterBranches) for m in drawn.modules()) == 19
    state = drawn.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_a_bias_and_the_geometry_stay():
    model = with_base_filters(nn.Sequential(nn.Conv2d(4, 8, (3, 1), stride=2, padding=1)), branches=2)
    assert model(torch.randn(1, 4, 9, 9)).shape == nn.Conv2d(4, 8, (3, 1), 2, 1)(torch.randn(1, 4, 9, 9)).shape
    assert model[0].bias is not None


def test_points_says_how_many_standard_errors_a_difference_is():
    assert points((1.5, 0.5)) == "+1.50 ± 0.50 (3.0)"
    assert points((-1.5, float("nan"))) == "-1.50"
    assert points(None) == ""


QUICK = "--limit 96 --holdout 32 --epochs 1 --lrs 0.05 --workers 1"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("gclayer")
    arguments = f"gclayer {QUICK} --seeds 0 1 --filters plain half gc drawn --out {out}".split()
    assert main(arguments) == 0
    return out / "report", arguments


def test_the_table_compares_every_kind_with_plain_and_half(report):
    text = (report[0] / "table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    head, rows = rows[0], rows[2:] if set(rows[1][0]) == {"-"} else rows[1:]
    assert len(rows) == 8
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        assert bool(cells["to plain"]) == (not cells["filters and optimizer"].startswith("plain,") or "half" in row[0])
        assert bool(cells["to half"]) == ("half" not in row[0])
        assert cells["folded"] == ("72,666" if "half" in row[0] else "288,170")
    assert "Every folded network gave the bits of the trained one: yes." in text


def test_the_csv_has_a_line_for_each_training(report):
    with (report[0] / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert {row["filters"] for row in rows} == {"plain", "half", "gc", "drawn"}
    assert (report[0] / "accuracy.png").stat().st_size > 10_000


def test_the_same_command_trains_nothing_twice(report, capsys):
    assert main(report[1]) == 0
    assert "0 runs trained, 16 were finished before" in capsys.readouterr().out


def test_logs_name_the_filters(report):
    logs = [json.loads(path.read_text()) for path in report[0].parent.glob("*.json")]
    assert {log["settings"]["filters"] for log in logs} == {"plain", "half", "gc", "drawn"}
    assert all(log["results"]["same"] for log in logs)


def test_logs_of_a_newer_version_are_refused_by_name(report, monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(FILTERS, "drawn")
    assert main(["report", str(report[0].parent), "--out", str(tmp_path)]) == 2
    assert "a log has the filters 'drawn', which this version does not have" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--filters nothing", "--filters: invalid choice: 'nothing'"),
        ("--model lenet", "--model: invalid choice: 'lenet'"),
        ("--shrink 3", "--shrink 3: does not divide the 8 x 8 pixels of digits"),
        ("--shrink 0", "--shrink: '0' is not a whole number of at least 1"),
    ],
)
def test_refuses_what_cannot_work(arguments, words, capsys, tmp_path):
    assert main(["gclayer", *QUICK.split(), *arguments.split(), "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
