# SPDX-License-Identifier: Apache-2.0
"""No program loses a result by printing: not where the reader of a pipe leaves, nor on a terminal that has ASCII only.

Each program runs twice: with all of its output read, and into a pipe that takes ASCII and is closed after the first
line. Both must leave the same files. Programs that take long run so in the other tests of what they do.
"""

import io
import itertools
import sys
import time
from pathlib import Path

import pytest

from benchmarks import bench_exchange, bench_layer, bench_threshold
from experiments.__main__ import main as experiments
from tools import machine
from tools import output as tools_output
from tools.program import exit_status, lenient_output

from .pipe import PipeToHead, to_head

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import bench_step

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")


TINY = "--limit 48 --epochs 1 --batch-size 16 --workers 1"
# Program, arguments without --out, one of its files.
PROGRAMS = {
    "classification": (experiments, f"classification {TINY} --seeds 0 1", "report/lr.png"),
    "degraded": (
        experiments, f"degraded {TINY} --test-limit 12 --width 2 --levels 1 --seeds 0 1 --methods csgd",
        "report/summary.csv",
    ),
    "pruning": (
        experiments, f"pruning {TINY} --seeds 0 1 --sparsities 0 0.5 --structures filter --methods threshold",
        "report/accuracy.png",
    ),
    "network-model": (experiments, f"network-model {ROOT / 'experiments/results'}", "network-model.md"),
    "bench_step.py": (
        bench_step.main, "--lists flat --scale 0.001 --repeat 2 --peers sgd_foreach,csgd", "step-cpu-float32.png",
    ),
    "bench_layer.py": (bench_layer.main, "--size 8 --batch-size 2 --repeat 2", "layer-cpu-resnet20.md"),
    "bench_threshold.py": (bench_threshold.main, "--sizes 100 --repeat 2", "threshold-cpu.md"),
    "bench_exchange.py": (bench_exchange.main, "--numel 1000 --repeat 2", "exchange-cpu.md"),
}  # fmt: skip


@pytest.fixture
def same_time(monkeypatch):
    """A function; after each of its calls clocks tell the same times and the machine is described alike."""

    def start():
        ticks = itertools.count()
        monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 1000)
        about = {"CPU": "a CPU", "torch": "2", "threads": "1", "date": "today", "command": "x"}
        monkeypatch.setattr(machine, "describe", lambda *_: about)
        monkeypatch.setattr(machine.OtherProcesses, "share", lambda _: 0.0)

    return start


def files(directory):
    """Name -> bytes."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_reader_that_leaves_and_an_ascii_terminal_lose_no_result(name, tmp_path, same_time):
    main, arguments, one_of_them = PROGRAMS[name]

    def run(directory):
        same_time()
        return main([*arguments.split(), "--out", str(directory)])

    assert run(tmp_path / "read") == 0
    with to_head() as stdout:
        assert run(tmp_path / "left") == 0
    assert stdout.head.endswith(b"\n")
    whole = files(tmp_path / "read")
    assert one_of_them in whole
    assert files(tmp_path / "left") == whole


def test_what_ascii_lacks_is_printed_as_an_escape(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", None)  # as where it was closed before Python started
    with lenient_output():
        print("0.5 \u00b1 0.1")
        assert sys.stderr is None
    tools_output.say("\u00b5s")
    stdout.flush()
    assert stdout.buffer.getvalue() == b"0.5 \\xb1 0.1\n\\xb5s\n"


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (True, 0), (False, 1), ([], 0)])
def test_the_status_is_1_only_where_the_program_says_that_something_does_not_hold(returned, status):
    assert exit_status("program", "again", lambda: returned) == status


def test_a_path_that_cannot_be_used_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert exit_status("program", "again", lambda: (tmp_path / "file" / "folder").mkdir()) == 2
    said = capsys.readouterr().err
    assert said == f"program: error: {tmp_path}/file/folder: Not a directory; name another path.\n"

    def without_a_path():
        raise OSError("no GPU")

    with pytest.raises(OSError, match="no GPU"):
        exit_status("program", "again", without_a_path)


def test_the_status_is_that_of_the_program_when_the_reader_has_left(monkeypatch, capsys):
    def fail():
        print("a line", flush=True)
        raise KeyboardInterrupt

    for say in (lambda text: print(text, flush=True), tools_output.say):
        monkeypatch.setattr(sys, "stdout", PipeToHead())
        assert exit_status("program", "again", lambda say=say: [say(line) for line in "abc"]) == 0
    monkeypatch.setattr(sys, "stdout", PipeToHead())
    assert exit_status("program", "the rest comes later.", fail) == 130
    assert capsys.readouterr().err == "program: interrupted; the rest comes later.\n"
