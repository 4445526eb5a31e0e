# SPDX-License-Identifier: Apache-2.0
"""The GPU suite rehearsed without a GPU: stand-ins for Python and Nvidia's tools, the real selection of tests."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import call_kernels
import count_bytes
import gpu_suite

from ..conftest import need_kernel

ROOT = gpu_suite.ROOT

# Output of ncu --csv, among the program's own lines and ncu's messages.
NCU = """==PROF== Connected to process 812 (/usr/bin/python3)
case,float32,1.0,4,1.0
case,bfloat16,0.05,2,0.56
==PROF== Disconnected from process 812
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","812","step_kernel(Launch, int)","dram__bytes_read.sum","byte","3,221,225,472"
"0","812","step_kernel(Launch, int)","dram__bytes_write.sum","byte","2,147,483,648"
"1","812","step_kernel(Launch, int)","dram__bytes_read.sum","byte","400"
"1","812","step_kernel(Launch, int)","dram__bytes_write.sum","byte","300"
"""


def test_bytes_of_each_kernel_are_read_from_ncus_table():
    read, written = count_bytes.METRICS
    cases, kernels = count_bytes.parse(NCU)
    assert cases == [["float32", "1.0", "4", "1.0"], ["bfloat16", "0.05", "2", "0.56"]]
    assert kernels == [{read: 12.0 * 2**28, written: 8.0 * 2**28}, {read: 400.0, written: 300.0}]
    with pytest.raises(ValueError, match="in Mbyte, not in bytes"):
        count_bytes.parse(NCU.replace('"byte","400"', '"Mbyte","400"'))


def test_a_table_of_ncu_becomes_bytes_per_parameter(monkeypatch, capsys):
    monkeypatch.setattr(count_bytes.shutil, "which", lambda name: "/usr/bin/ncu")
    done = subprocess.CompletedProcess([], 0, NCU, "")
    monkeypatch.setattr(count_bytes.subprocess, "run", lambda command, **options: done)
    monkeypatch.setattr(sys, "argv", ["count_bytes.py"])
    count_bytes.main()
    assert "| float32 | 1.0 | 100.0% | 12.00 | 8.00 | 20.00 | 20.00 |" in capsys.readouterr().out


REFUSALS = {
    "counters": "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access the Performance Counters",
    "profiler": "==ERROR== Failed to initialize the profiler: LibraryNotLoaded",
    "sanitizer": "========= Error: Device not supported. Please refer to the documentation",
}


@pytest.mark.parametrize("refusal", ["counters", "profiler"])
def test_count_bytes_says_that_it_may_not_count(refusal, monkeypatch):
    done = subprocess.CompletedProcess([], 1, REFUSALS[refusal], "")
    monkeypatch.setattr(count_bytes.subprocess, "run", lambda command, **options: done)
    with pytest.raises(SystemExit, match=f"^not measured, .*{REFUSALS[refusal][10:]}$"):
        count_bytes.counted("/usr/bin/ncu")


# Notes its command. What its environment names by a word of the command fails, is refused the GPU, or takes long.
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
for word in $FAILING; do case "$*" in *"$word"*) echo "$word is broken"; exit 3;; esac; done
for word in $REFUSED; do case "$*" in *"$word"*) echo "$REFUSAL"; exit 1;; esac; done
for word in $SLOW; do case "$*" in *"$word"*) sleep 60;; esac; done
echo "measured: 42"
"""


class Rehearsal:
    """The suite on a machine of stand-ins."""

    def __init__(self, folder, monkeypatch):
        self.bin, self.out, self._calls = folder / "bin", folder / "out", folder / "calls"
        self.bin.mkdir()
        for name in ("python", "nvcc", "ncu", "compute-sanitizer"):
            (self.bin / name).write_text(STAND_IN)
            (self.bin / name).chmod(0o755)
        self._environ = {"CALLS": str(self._calls), "PATH": f"{self.bin}:/usr/bin:/bin"}
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(gpu_suite.sys, "executable", str(self.bin / "python"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu_suite, "machine", lambda torch: {"gpu": "a stand-in"})

    def run(self, *arguments, **environ):
        """The exit status of the suite."""
        for name, value in {**self._environ, "FAILING": "", "REFUSED": "", "SLOW": "", **environ}.items():
            self._monkeypatch.setenv(name, value)
        return gpu_suite.main(["--out", str(self.out), *arguments])

    def results(self):
        """{name: result} of the report."""
        return {part["part"]: part["result"] for part in self.report()["parts"]}

    def report(self):
        return json.loads((self.out / "gpu-suite.json").read_text())

    def calls(self):
        """What was called, without its arguments."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [" ".join(line.split()[:2]) for line in lines]


@pytest.fixture
def rehearsal(tmp_path, monkeypatch):
    return Rehearsal(tmp_path, monkeypatch)


BENCHMARKS = [f"benchmark {what}" for what in ("float32", "bfloat16", "AdamW float32", "AdamW bfloat16")]
FIRST_CALL = ["build", "kernels", "bits", *BENCHMARKS, "bytes moved", "tests"]
SANITIZED = [f"sanitizer {tool}" for tool in ("memcheck", "racecheck", "initcheck", "synccheck")]


def test_the_first_call_is_all_but_the_sanitizers(rehearsal, capsys):
    assert rehearsal.run() == 0
    assert rehearsal.results() == dict.fromkeys(FIRST_CALL, "passed")
    assert [call.split("/")[-1] for call in rehearsal.calls()] == [
        "python setup.py", "call_kernels.py", "python -m", *["bench_step.py"] * 4, "count_bytes.py", "python -m",
    ]  # fmt: skip
    assert rehearsal.report()["gpu"] == "a stand-in"
    for place in (capsys.readouterr().out, (rehearsal.out / "gpu-suite.md").read_text()):
        assert "| kernels | passed | 0 |" in place
    assert (rehearsal.out / "gpu-suite.log").read_text().count("measured: 42") == len(FIRST_CALL)


def test_the_second_call_is_the_sanitizers(rehearsal):
    assert rehearsal.run("--parts", "sanitizers") == 0
    assert rehearsal.results() == dict.fromkeys(SANITIZED, "passed")
    assert rehearsal.calls() == ["compute-sanitizer --tool"] * 4


def test_parts_come_in_their_order_and_unknown_ones_are_named(rehearsal, capsys):
    assert rehearsal.run("--parts", "tests,kernels") == 0
    assert [*rehearsal.results()] == ["kernels", "tests"]
    with pytest.raises(SystemExit):
        rehearsal.run("--parts", "kernels,sanitiser")
    assert "'sanitiser' is no part of the suite; the parts are build, kernels, bits" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "part"), [("setup.py", "build"), ("call_kernels", "kernels")])
def test_a_failed_build_and_wrong_kernels_end_the_suite(rehearsal, word, part):
    assert rehearsal.run(FAILING=word) == 1
    at = FIRST_CALL.index(part)
    expected = dict.fromkeys(FIRST_CALL[:at], "passed") | {part: "failed, exit status 3"}
    expected |= dict.fromkeys(FIRST_CALL[at + 1 :], f"not begun, since {part} failed")
    assert rehearsal.results() == expected
    assert len(rehearsal.calls()) == at + 1
    assert f"{word} is broken" in (rehearsal.out / "gpu-suite.md").read_text()


def test_another_failure_does_not_end_the_suite(rehearsal):
    assert rehearsal.run(FAILING="no:cacheprovider bfloat16") == 1
    failed = dict.fromkeys(["bits", "benchmark bfloat16", "benchmark AdamW bfloat16", "tests"], "failed, exit status 3")
    assert rehearsal.results() == dict.fromkeys(FIRST_CALL, "passed") | failed


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refusals_are_left_out(rehearsal, refusal):
    words = "compute-sanitizer" if refusal == "sanitizer" else "count_bytes"
    parts = "sanitizers" if refusal == "sanitizer" else "bytes,tests"
    refused = "memcheck" if refusal == "sanitizer" else words
    assert rehearsal.run("--parts", parts, REFUSED=refused, REFUSAL=REFUSALS[refusal]) == 0
    first, *others = rehearsal.results().values()
    assert first == f"left out: {REFUSALS[refusal].strip(' =')}"
    assert set(others) == {"passed"}


def test_a_failure_is_no_refusal(rehearsal):
    assert rehearsal.run("--parts", "sanitizers", REFUSED="memcheck", REFUSAL="========= Invalid __global__ read") == 1
    assert rehearsal.results()["sanitizer memcheck"] == "failed, exit status 1"


def test_tools_that_are_not_there_are_left_out(rehearsal):
    for name in ("ncu", "compute-sanitizer"):
        (rehearsal.bin / name).unlink()
    assert rehearsal.run("--parts", "bytes,sanitizers") == 0
    results = rehearsal.results()
    assert results.pop("bytes moved") == "left out: ncu is not on the PATH"
    assert results == dict.fromkeys(SANITIZED, "left out: compute-sanitizer is not on the PATH")
    assert not rehearsal.calls()


@pytest.fixture
def without(monkeypatch):
    """Makes a package look as if it were not installed."""
    find = importlib.util.find_spec
    gone = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    gpu_suite.wanting.cache_clear()
    yield gone.add
    gpu_suite.wanting.cache_clear()


@pytest.mark.parametrize("package", ["pytest", "hypothesis"])
def test_without_what_the_tests_need_they_are_left_out(rehearsal, without, package):
    without(package)
    assert rehearsal.run("--parts", "kernels,bits,tests") == 0
    left_out = f"left out: {package} is not installed"
    assert rehearsal.results() == {"kernels": "passed", "bits": left_out, "tests": left_out}


def test_test_files_that_want_a_package_are_left_out(rehearsal, without, capsys):
    without("numpy")
    assert rehearsal.run("--parts", "bits") == 0
    assert "left out: tests/cuda/test_shortcuts.py, since numpy is not installed" in capsys.readouterr().out
    (command,) = gpu_suite.bits(None)
    assert "--ignore=tests/cuda/test_shortcuts.py" in command.words
    assert "tests/cuda/test_shortcuts.py" not in command.words
    assert "tests/rule/test_backends_agree.py" in command.words


def test_without_xdist_the_tests_run_in_one_process(without):
    assert "-n" in next(gpu_suite.bits(None)).words
    without("xdist")
    assert "-n" not in next(gpu_suite.bits(None)).words


def test_a_part_that_takes_too_long_is_ended(rehearsal, monkeypatch):
    def limited(args, part=gpu_suite.PARTS["bytes"]):
        return (command._replace(limit=1) for command in part(args))

    monkeypatch.setitem(gpu_suite.PARTS, "bytes", limited)
    assert rehearsal.run("--parts", "bytes,tests", SLOW="count_bytes") == 1
    assert rehearsal.results() == {"bytes moved": "not finished after 1 s", "tests": "passed"}


def test_without_time_no_part_is_begun(rehearsal):
    assert rehearsal.run("--parts", "bits,tests", "--total", "0") == 1
    assert rehearsal.results() == {"bits": "no time left", "tests": "no time left"}
    assert not rehearsal.calls()


def test_an_interrupted_suite_leaves_its_results(rehearsal, monkeypatch):
    wait, ended = subprocess.Popen.wait, []

    def interrupted(process, *arguments, **options):
        ended.append(process)
        if len(ended) == 3:
            raise KeyboardInterrupt
        return wait(process, *arguments, **options)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rehearsal.run()
    assert rehearsal.results() == {"build": "passed", "kernels": "passed", "bits": "begun"}
    assert (rehearsal.out / "gpu-suite.log").read_text().count("measured: 42") == 3


def test_both_calls_have_the_time_that_their_parts_may_take():
    args = SimpleNamespace(out=ROOT)
    for names in (gpu_suite.DEFAULT, ["sanitizers"]):
        limits = [command.limit for name in names for command in gpu_suite.PARTS[name](args)]
        assert sum(limits) <= gpu_suite.TOTAL <= 565
        assert min(limits) >= 40


def test_the_suite_takes_the_tests_of_the_gpu():
    """Among them those that the selection must name, since the parameters of these tests name no device."""
    (tests,), (bits,) = gpu_suite.tests(None), gpu_suite.bits(None)
    arguments = [word for word in tests.words if word.startswith("--ignore")]
    command = ["--collect-only", "-q", "-p", "no:cacheprovider", "-n", "0", "-k", gpu_suite.GPU_TESTS, *arguments]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    files = {line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("tests/")}
    needed = {"cuda/test_cuda", "twins/test_stateful", "pruning/test_semi_structured", "distributed/test_nccl"}
    assert files >= {f"tests/{name}.py" for name in needed}
    assert "tests/cuda/test_emulation.py" not in files
    assert not files & set(gpu_suite.BITS)
    assert {*gpu_suite.BITS} <= {*bits.words}
    assert all((ROOT / path).exists() for path in gpu_suite.BITS)


@pytest.fixture
def one_dtype(monkeypatch):
    need_kernel(torch.device("cpu"))
    monkeypatch.setattr(call_kernels, "DTYPES", [torch.bfloat16])


@pytest.mark.usefixtures("one_dtype")
def test_kernels_are_compared_with_those_of_the_cpu(capsys):
    """Here with themselves."""
    assert call_kernels.compare(torch.device("cpu")) == 0
    assert capsys.readouterr().out.splitlines() == [f"{name}: the same bits" for name in call_kernels.CALLS]


@pytest.mark.usefixtures("one_dtype")
@pytest.mark.parametrize("name", ["shards", "calibrations", "exchanges"])
def test_a_kernel_that_differs_is_named(name, monkeypatch, capsys):
    calls, runs = call_kernels.CALLS[name], []

    def broken(device, dtype):
        """The second run has one wrong bit."""
        runs.append(dtype)
        results = [tensor.clone() for tensor in calls(device, dtype)]
        if len(runs) == 2:
            results[-1].view(-1)[-1:].add_(1)
        return results

    monkeypatch.setattr(call_kernels, "CALLS", {name: broken})
    assert call_kernels.compare(torch.device("cpu")) == 1
    assert capsys.readouterr().out.startswith(f"{name}: torch.bfloat16, tensor ")
