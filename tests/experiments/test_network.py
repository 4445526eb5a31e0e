# SPDX-License-Identifier: Apache-2.0
"""Exchanges on networks: command lines, the model's bytes against those counted, the report, and a network."""

import copy
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

from experiments.__main__ import main
from experiments.network import exchanges, measured, model, namespaces, report, stream, worker
from experiments.network.exchanges import ALONE, Exchange
from experiments.network.model import Costs, Workload
from tests.distributed import launch

from .pipe import to_head

ROOT = Path(__file__).parents[2]
PLAIN, CODES, POWER = (Exchange.of(name) for name in ("plain", "calibrated", "powersgd-1"))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["network", "--exchanges", "topk"], "'topk' is none of plain"),
        (["network", "--exchanges", "powersgd-0"], "powersgd-0"),
        (["network", "--exchanges", "calibrated-clip0"], "calibrated-clip0"),
        (["network", "--hosts", "0"], "--hosts"),
        (["network", "--rates", "nan"], "--rates"),
        (["exchanges", "--out", "OUT", "--world-size", "3"], "--batch-size 64"),
        (["exchanges", "--out", "OUT", "--data", "fashion-mnist"], "--data-dir"),
        (["network-model", "OUT", "--out", "OUT"], "network-hosts1.json"),
        ([], "NAME"),
    ],
)
def test_a_bad_command_line_ends_in_one_sentence_that_names_the_option(arguments, named, tmp_path, capsys):
    assert main([argument.replace("OUT", str(tmp_path)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("experiments: error: ")
    assert error.count("\n") == 1
    assert named in error


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda patch: patch.setattr(os, "geteuid", lambda: 1000), "root"),
        (lambda patch: (patch.setattr(os, "geteuid", lambda: 0), patch.setenv("PATH", "")), "iproute2"),
    ],
    ids=["no root", "no tools"],
)
def test_run_refuses_where_it_cannot_make_a_network(change, named, tmp_path, monkeypatch, capsys):
    change(monkeypatch)
    assert main(["network", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
    assert not (tmp_path / "out").exists()


def test_a_network_that_fails_half_way_is_taken_down(monkeypatch):
    deleted = []

    def run(command, **_):
        deleted.extend(command[3:] if command[:3] == ["ip", "netns", "delete"] else [])
        failed = "veth" in command
        return subprocess.CompletedProcess(command, int(failed), "", "Operation not permitted\n" if failed else "")

    monkeypatch.setattr(namespaces.subprocess, "run", run)
    with pytest.raises(namespaces.UserError, match="Operation not permitted"), namespaces.Network(2):
        pass
    assert sorted(name.split("-")[1] for name in deleted) == ["host0", "switch"]


def _model(shapes, exchange):
    """DistributedDataParallel with the exchange, after a step: in its final buckets."""
    torch.manual_seed(dist.get_rank())
    ddp = launch.DistributedDataParallel(launch.Given(shapes), bucket_cap_mb=0.02)
    return ddp, exchange.register(ddp)


def _step(ddp, shapes):
    ddp(list(map(torch.randn, shapes))).backward()
    ddp.zero_grad()


def _counted(rank, shapes):
    """(workload, bytes of a step as the hook's state counts them)."""
    ddp, state = _model(shapes, CODES)
    for _ in range(3):  # torch's logs name the buckets only then
        _step(ddp, shapes)
    before = state.bytes_sent
    _step(ddp, shapes)
    return worker.describe(ddp), state.bytes_sent - before


SHAPES = [[64, 50], [50], [70, 64], [7], [1000], [3, 5, 2, 2]]


@pytest.mark.parametrize("hosts", [2, 3])
def test_the_models_bytes_are_those_that_the_hook_counts(hosts):
    answers = launch.run(hosts, _counted, SHAPES)
    for description, counted in answers:
        workload = Workload(**description)
        assert len(workload.buckets) > 1, "one bucket hides what is rounded for each"
        assert sorted(k for bucket in workload.buckets for k in bucket) == list(range(len(SHAPES)))
        assert model.payload(CODES, workload, hosts) == counted


def _powersgd_counted(rank, shapes):
    """(workload, coordinates that PowerSGD's all-reduces were given in a step)."""
    ddp, _ = _model(shapes, POWER)
    for _ in range(exchanges.POWERSGD_START + 1):
        _step(ddp, shapes)
    handed, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **options: (
        handed.append(tensor.numel()) or all_reduce(tensor, *args, **options)
    )
    _step(ddp, shapes)
    dist.all_reduce = all_reduce
    return worker.describe(ddp), handed


def test_the_models_bytes_of_powersgd_are_those_of_its_all_reduces():
    description, handed = launch.run(1, _powersgd_counted, SHAPES)[0]
    workload = Workload(**description)
    assert len(handed) == 3 * len(workload.buckets)
    for hosts in (2, 5):
        assert model.payload(POWER, workload, hosts) == sum(model.ring_bytes(n, 4, hosts) for n in handed)


def test_the_models_time_is_the_sum_of_its_parts():
    workload = Workload([[1000, 1000]], [[0]])
    costs = Costs(step=1.0, exchange=0.25, latency=0.5)
    sent = 2 * 3 / 4 * 4e6 / stream.PAYLOAD_SHARE
    assert model.payload(PLAIN, workload, 4) == 6_000_000
    assert model.payload(Exchange.of("fp16"), workload, 4) == 3_000_000
    assert model.seconds(PLAIN, workload, 4, 1e6, costs) == pytest.approx(1.25 + 8 * sent / 1e6 + 6 * 0.5, rel=1e-12)
    # 50,000 words of 20 codes and 100,000 of 10 sums, cut in 4; and a bound of 4 bytes, which a ring pads to 4 hosts
    assert model.payload(CODES, workload, 4) == pytest.approx(3 / 4 * 150_000 * 4 + 2 * 3 * 4, rel=1e-3)


@pytest.mark.parametrize("hosts", [2, 64, 1024])
@pytest.mark.parametrize("other", [PLAIN, POWER], ids=lambda exchange: exchange.name)
def test_between_its_rates_and_only_there_an_exchange_is_faster(other, hosts):
    workload = Workload([[3000, 1000], [10]], [[0], [1]])
    for ours, theirs in ((0.9, 0.1), (0.1, 0.9), (0.1, 0.1)):
        costs, other_costs = Costs(0.1, ours, 1e-5), Costs(0.1, theirs, 1e-5)
        low, high = model.faster_between(CODES, other, workload, hosts, costs, other_costs)
        assert 0 <= low <= high
        for exponent in range(0, 60):
            rate = 10 ** (exponent / 4)
            case = workload, hosts, rate
            faster = model.seconds(CODES, *case, costs) < model.seconds(other, *case, other_costs)
            assert faster == (low < rate < high), f"at {rate:g} bit/s, {ours} against {theirs} s"


def _content(hosts, speedup=8.0):
    """A file of run: plain takes 0.8 s at 100 Mbit/s on the slowest host, calibrated ``speedup`` times less."""
    names = {"plain": (0.8, 1_250_000), "calibrated": (0.8 / speedup, 100_000), ALONE: (0.01, 0)}

    def one(rank, k):
        return {
            name: {"seconds": (1 + k) * seconds * (1 if rank == 0 else 0.5), "wire": wire, "payload": None}
            for name, (seconds, wire) in names.items()
        }

    def link(rank):
        return {"stream": {"one stream": 95.0 if rank == 1 else None, "all links": 94.0}, "latency_s": 2e-4}

    entry = {
        "mbit": 100.0 if hosts > 1 else 0.0,
        "link": [link(rank) for rank in range(hosts)],
        "rounds": [[one(rank, k) for rank in range(hosts)] for k in range(3)],
    }
    return {
        "hosts": hosts,
        "cores": 2,
        "machine": {"CPU": "an abacus", "torch": "2", "date": "today"},
        "settings": {"rates": [100.0], "exchanges": ["plain", "calibrated"], "rounds": 3, "batch_size": 1, "hidden": 4},
        "rates": [entry],
        "model": {"shapes": [[600, 1000], [5]], "buckets": [[0, 1]]},
    }


def test_figures_are_medians_over_the_rounds_of_the_slowest_host():
    results = measured.Results(_content(2))
    entry = results.entries[0]
    assert results.seconds(entry, "plain") == pytest.approx([0.8, 1.6, 2.4])
    assert results.speedup(entry, "calibrated").median == pytest.approx(8)
    row = measured.rows(results, entry)[2]
    assert row[:2] == ["calibrated", "100.0"]
    assert row[3:5] == ["12.5", "200"]


def _write(directory, *contents):
    for content in contents:
        (directory / f"network-hosts{content['hosts']}.json").write_text(json.dumps(content))
    return str(directory)


def test_the_report_has_every_table_and_a_picture(tmp_path, capsys):
    directory = _write(tmp_path, _content(1, speedup=1), _content(2), _content(4))
    assert main(["network-model", directory, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    text = (tmp_path / "out" / "network-model.md").read_text()
    assert "200 (8.00)" in text  # measured
    assert "0.100 (12.5)" in text  # frames
    assert text.count("| 100 Gbit/s |") == 2
    assert (tmp_path / "out" / "network-model.png").read_bytes().startswith(b"\x89PNG")


def test_the_check_shares_processors_as_the_hosts_do():
    alone, two, four = (measured.Results(_content(hosts, speedup=1)) for hosts in (1, 2, 4))
    checks = report.Measurements(alone, [two, four]).checks()
    by_hosts = {check.hosts: check for check in checks if check.exchange.name == "calibrated"}
    computing = 1.6 - 0.02
    for hosts, share in ((2, 1), (4, 2)):
        sent = 8 * by_hosts[hosts].bytes_predicted / stream.PAYLOAD_SHARE / 100e6
        waits = model.messages(CODES, two.workload, hosts) * 2e-4 / (2 * (hosts - 1))
        assert by_hosts[hosts].predicted == pytest.approx(0.02 + share * computing + sent + waits, rel=1e-9)


def _other_model(content):
    content["settings"]["hidden"] = 5


@pytest.mark.parametrize(
    ("spoil", "named"),
    [(_other_model, "other settings"), (lambda content: content.pop("rates"), "not a file that run wrote")],
)
def test_files_that_do_not_fit_are_refused_by_name(spoil, named, tmp_path, capsys):
    spoilt = copy.deepcopy(_content(2))
    spoil(spoilt)
    directory = _write(tmp_path, _content(1), spoilt)
    assert main(["network-model", directory, "--out", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_exchanges_are_registered_with_their_options():
    seen = []

    class Model:
        def register_comm_hook(self, state, hook):
            seen.append((state, hook.__name__))

    for name in ("plain", "fp16", "powersgd-4"):
        Exchange.of(name).register(Model(), seed=3)
    assert [name for _, name in seen] == ["fp16_compress_hook", "bucket_by_bucket"]
    assert isinstance(seen[1][0], PowerSGDState)
    assert (seen[1][0].matrix_approximation_rank, seen[1][0].start_powerSGD_iter) == (4, 2)


def test_the_name_of_an_exchange_has_the_options_of_the_hook():
    class Model(torch.nn.Module):
        def register_comm_hook(self, state, hook):
            assert hook.__name__ == "calibrated_hook"

    names = {"calibrated": (None, None, False, False), "calibrated-clip2.5-ef": (2.5, None, False, True)}
    names["calibrated-clip4-block32-compact-ef"] = 4.0, 32, True, True
    for name, options in names.items():
        state = Exchange.of(name).register(Model(), seed=3)
        assert (state.clip, state.block, state.compact, state.error_feedback) == options
    assert Exchange.of(name).label == "calibrated, clip 4, block 32, compact, error feedback"
    assert model.payload(Exchange.of("calibrated-compact"), Workload([[5]], [[0]]), 2) is None


def test_accuracy_trains_every_exchange_from_the_same_start_and_skips_what_is_finished(no_plots, tmp_path, capsys):
    command = [
        "exchanges",
        "--limit",
        "96",
        "--epochs",
        "1",
        "--seeds",
        "0",
        "--holdout",
        "100",
        "--out",
        str(tmp_path),
    ]
    with to_head() as stdout:  # which must lose nothing
        assert main([*command, "--exchanges", "calibrated"]) == 0
    assert stdout.head.startswith(b"Training 2 of 2 runs: small with ")
    logs = {path.name.split("_")[2]: list(csv.DictReader(path.open())) for path in tmp_path.glob("*.csv")}
    assert logs.keys() == {"sgd", "calibrated-w2"}
    assert 14 < float(logs["calibrated-w2"][0]["fewer_bytes"]) < 16
    assert float(logs["sgd"][0]["fewer_bytes"]) == 1
    assert "| plain bytes / bytes |" in (tmp_path / "report" / "table.md").read_text()
    assert (tmp_path / "report" / "bytes.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--exchanges", "calibrated"]) == 0
    assert "0 runs trained, 2 were" in capsys.readouterr().out


def _why_no_network():
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"no {' and '.join(missing)}"
    try:
        with namespaces.Network(1) as network:
            network.shape(100)
    except namespaces.UserError as error:
        return str(error)
    return None


def _namespaces():
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith(f"csgd{os.getpid()}-")}


def test_two_hosts_measure_each_other_and_leave_nothing_behind(tmp_path):
    if reason := _why_no_network():
        pytest.skip(reason)
    options = ["--hosts", "2", "--rates", "50", "--rounds", "1", "--hidden", "8", "--exchanges", "fp16", "calibrated"]
    with to_head() as stdout:  # which must lose nothing
        assert main(["network", *options, "--out", str(tmp_path)]) == 0
    assert stdout.head.startswith(b"Measuring 3 exchanges between 2 hosts at 50 Mbit/s")
    results = measured.read(tmp_path / "network-hosts2.json")
    entry = results.entries[0]
    plain, half, ours = (results.wire(entry, name) for name in ("plain", "fp16", "calibrated"))
    sent = model.payload(PLAIN, results.workload, 2)
    assert sent < plain < 1.5 * sent + 20_000
    assert ours < half < plain
    assert results.payload(entry, "calibrated") == model.payload(CODES, results.workload, 2)
    assert not _namespaces()
