# SPDX-License-Identifier: Apache-2.0
"""The parts of the GPU suite that need no GPU: choosing tests, limiting time, reading ncu's output."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import count_bytes
import gpu_suite

ROOT = gpu_suite.ROOT

# Output of ncu --csv, among the program's own lines and ncu's messages.
NCU = """==PROF== Connected to process 812 (/usr/bin/python3)
case,float32,1.0,4,1.0
case,bfloat16,0.05,2,0.56
==PROF== Disconnected from process 812
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","812","csgd_kernel(Launch, int)","dram__bytes_read.sum","byte","3,221,225,472"
"0","812","csgd_kernel(Launch, int)","dram__bytes_write.sum","byte","2,147,483,648"
"1","812","csgd_kernel(Launch, int)","dram__bytes_read.sum","byte","400"
"1","812","csgd_kernel(Launch, int)","dram__bytes_write.sum","byte","300"
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


def test_counters_that_may_not_be_read_are_no_failure(monkeypatch, capsys):
    done = subprocess.CompletedProcess([], 1, "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "")
    monkeypatch.setattr(count_bytes.subprocess, "run", lambda command, **options: done)
    with pytest.raises(SystemExit) as stop:
        count_bytes.counted("/usr/bin/ncu")
    assert stop.value.code == 0
    assert "not measured" in capsys.readouterr().out


def test_the_suite_takes_the_tests_of_the_gpu():
    """Among them those that the selection must name, since the parameters of these tests name no device."""
    names = dict(gpu_suite.parts(argparse.Namespace(out=ROOT, no_benchmark=True)))
    command = ["--collect-only", *names["tests"][3:], "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    files = {line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("tests/")}
    needed = {"cuda/test_cuda", "twins/test_stateful", "pruning/test_export_pruned", "distributed/test_nccl"}
    assert files >= {f"tests/{name}.py" for name in needed}
    assert "tests/cuda/test_emulation.py" not in files
    assert all((ROOT / path).exists() for path in names["bits"][3:] if path.startswith("tests/"))


def test_a_part_without_time_is_not_begun():
    assert gpu_suite.run_part("x", ["false"], 0)["result"] == "no time left"
    assert gpu_suite.run_part("x", ["sleep", "9"], 1)["result"] == "not finished after 1 s"
    assert gpu_suite.run_part("x", None, 9)["result"] == "left out"
