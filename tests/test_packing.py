# SPDX-License-Identifier: Apache-2.0
"""A source archive is whole wherever it is packed, and setup.py builds nothing out of one that is not."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from .helpers import PACKED, copy_sources

ROOT = Path(__file__).parent.parent
SOURCES = {".h", ".cuh", ".cpp", ".cu"}
# What `python -m build --sdist --no-isolation` calls, in its order.
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # which build_meta changes
build_meta.get_requires_for_build_sdist()
print(build_meta.build_sdist(out))
"""


def copy_tree(folder):
    """The files that are packed, and what setup.py must not take along, in a folder of their own."""
    copy_sources(folder)
    (folder / "csgd_cuda" / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    (folder / "csrc" / "ops" / "csgd.o").touch()
    (folder / "tests").mkdir()
    (folder / "tests" / "test_some.py").touch()
    return folder


def pack(folder, mode, torch_module=None):
    """The names in the archive, without the folder that all are in."""
    env = {**os.environ, "CSGD_CUDA_BUILD": mode, "PYTHONPATH": str(folder.parent / "modules")}
    (folder.parent / "modules").mkdir(exist_ok=True)
    if torch_module is not None:
        (folder.parent / "modules" / "torch.py").write_text(torch_module)
    out = folder.parent / "out"
    done = subprocess.run(
        [sys.executable, "-c", BUILD, out], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(out / done.stdout.strip().splitlines()[-1]) as archive:
        return sorted(name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile())


@pytest.mark.parametrize("mode", ["auto", "cpu", "none"])
def test_archive_holds_all_sources_whatever_the_build(mode, tmp_path):
    packed = pack(copy_tree(tmp_path / "tree"), mode)
    sources = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in SOURCES]
    assert any(name.endswith(".cu") for name in sources)
    assert [name for name in packed if name.startswith("csrc/")] == sorted(sources)
    python = [
        str(p.relative_to(ROOT)) for p in (ROOT / "csgd_cuda").rglob("*") if p.suffix in (".py", ".pyi", ".typed")
    ]
    assert [name for name in packed if name.startswith("csgd_cuda/")] == sorted(python)
    others = [name for name in packed if not name.startswith(("csrc/", "csgd_cuda/", "csgd_cuda.egg-info/"))]
    assert others == sorted([*PACKED, "PKG-INFO", "setup.cfg"])


def test_archive_is_packed_without_torch(tmp_path):
    packed = pack(copy_tree(tmp_path / "tree"), "auto", "raise ImportError('no torch here')")
    assert "csrc/cuda/step_cuda.cu" in packed


def test_archive_is_what_git_tracks():
    done = subprocess.run(["git", "ls-files", "csrc"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not done.stdout:
        pytest.skip("no clone")
    assert {Path(name).suffix for name in done.stdout.splitlines()} == SOURCES  # those that MANIFEST.in lists


@pytest.fixture
def setup_functions(tmp_path, monkeypatch):
    monkeypatch.chdir(copy_tree(tmp_path / "tree"))
    return runpy.run_path("setup.py")


def sources_of(cuda):
    patterns = ["csrc/ops/*.cpp", "csrc/cpu/*.cpp", *(["csrc/cuda/*.cu"] if cuda else [])]
    return [str(path) for pattern in patterns for path in Path().glob(pattern)]


@pytest.mark.parametrize("cuda", [False, True])
def test_whole_sources_are_accepted(cuda, setup_functions):
    setup_functions["check_sources"](sources_of(cuda), cuda)


MISSING = [
    ("csrc/cuda/*.cu", True, "csrc/cuda/calibrate_grad_cuda.cu, csrc/cuda/exchange_cuda.cu, "),
    ("csrc/cuda/exchange_cuda.cu", True, "csrc/cuda/exchange_cuda.cu: not there"),
    ("csrc/cuda/*", True, "csrc/cuda/step_cuda.h"),
    ("csrc/core/*", False, "csrc/core/params.h"),
    ("csrc/cpu/hard_threshold_cpu.cpp", False, "csrc/cpu/hard_threshold_cpu.cpp: not there"),
    ("csrc/*/*", False, "csrc/ops: not there"),
]


@pytest.mark.parametrize(("missing", "cuda", "named"), MISSING)
def test_missing_sources_are_named(missing, cuda, named, setup_functions):
    for path in Path().glob(missing):
        path.unlink()
    with pytest.raises(SystemExit) as stop:
        setup_functions["check_sources"](sources_of(cuda), cuda)
    assert named in str(stop.value)
    assert f"set CSGD_CUDA_BUILD={'cpu or ' if cuda else ''}none" in str(stop.value)


def test_without_cuda_its_sources_may_be_missing(setup_functions):
    shutil.rmtree("csrc/cuda")
    setup_functions["check_sources"](sources_of(False), False)


def test_setup_stops_where_sources_are_missing(tmp_path):
    """Through setup.py itself, before anything is compiled."""
    folder = copy_tree(tmp_path / "tree")
    (folder / "csrc" / "cpu" / "exchange_cpu.cpp").unlink()
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=folder, env={**os.environ, "CSGD_CUDA_BUILD": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("csgd_cuda: csrc/cpu/exchange_cpu.cpp: not there")
    assert not (folder / "build").exists()
