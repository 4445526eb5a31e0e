# SPDX-License-Identifier: Apache-2.0
"""make wheel: a wheel installs where torch is, on older systems too, steps with the kernel, and is for one torch."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

from csgd_cuda import extension

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import make_wheel  # noqa: E402
import try_installed  # noqa: E402

RELEASE = torch.__version__.partition("+")[0]
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
DIST_INFO = f"csgd_cuda-0.1.0+torch{RELEASE}.cpu.dist-info"

pytestmark = pytest.mark.xdist_group("wheel")  # the wheel is made once


def run_program(*arguments, **options):
    return subprocess.run(
        [sys.executable, "tools/make_wheel.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        check=False, **options,
    )  # fmt: skip


def compiled_extension():
    """The file that setup.py has made here, so that none is compiled for these tests."""
    pytest.importorskip("auditwheel")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("not x86-64 Linux")
    if extension._C is None or extension._C.build_info()["cuda"] is not None:
        pytest.skip("there is no extension for the CPU alone")
    return Path(extension._C.__file__)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder with the wheel, and the finished program."""
    out = tmp_path_factory.mktemp("wheels")
    done = run_program("--extension", compiled_extension(), "--out", out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out, done


@pytest.fixture
def wheel(made):
    (path,) = made[0].glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


@pytest.mark.long
def test_name_says_which_systems_python_and_torch_the_wheel_is_for(wheel):
    expected = f"csgd_cuda-0.1.0+torch{RELEASE}.cpu-{PYTHON}-{PYTHON}-manylinux_2_28_x86_64.whl"
    assert Path(wheel.filename).name == expected


def test_installed_wheel_steps_with_the_kernel_and_the_bits_of_the_reference(made):
    """In an environment of its own, outside the sources, by the program's own test."""
    out, done = made
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("| csgd_cuda-"))
    assert row.endswith("| cpu kernel: bits of the reference |")
    written = (out / "wheels.md").read_text(encoding="utf-8")
    assert written in done.stdout
    assert f"\ncsgd_cuda with torch {torch.__version__}\n" in written  # of show_config


def test_metadata_demand_the_release_of_torch(wheel):
    metadata = Parser().parsestr(wheel.read(f"{DIST_INFO}/METADATA").decode())
    assert metadata["Version"] == f"0.1.0+torch{RELEASE}.cpu"
    assert [line for line in metadata.get_all("Requires-Dist") if "extra" not in line] == [f"torch=={RELEASE}", "numpy"]


@pytest.mark.parametrize(("release", "fits"), [(RELEASE, True), ("999.0.0", False)])
def test_pip_installs_the_wheel_beside_its_own_torch_only(release, fits, wheel, tmp_path):
    """A torch that consists of its metadata stands for any other."""
    for name, version in (("torch", release), ("numpy", "2.0.0")):
        metadata = tmp_path / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    python = make_wheel.fresh_environment(sys.executable, tmp_path, tmp_path / "fresh")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--isolated", "--python", python, "install", "--no-index", wheel.filename],
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == fits, done.stderr
    assert fits or f"No matching distribution found for torch=={RELEASE}" in done.stderr


def test_wheel_holds_the_package_and_nothing_else(wheel):
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csgd_cuda").rglob("*")
        if path.suffix in (".py", ".pyi", ".typed")
    }
    of_dist_info = {"METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE"}
    names = {name for name in wheel.namelist() if not name.endswith("/")}
    expected = modules | {f"csgd_cuda/{compiled_extension().name}"} | {f"{DIST_INFO}/{name}" for name in of_dist_info}
    assert names == expected


def test_extension_needs_glibc_2_28_torch_and_no_folder_of_this_machine(wheel, tmp_path):
    from elftools.elf.elffile import ELFFile  # of auditwheel's own dependencies

    (name,) = (name for name in wheel.namelist() if name.endswith(".so"))
    with open(wheel.extract(name, tmp_path), "rb") as file:
        elf = ELFFile(file)
        tags = [(tag.entry.d_tag, tag) for tag in elf.get_section_by_name(".dynamic").iter_tags()]
        needed = {tag.needed for kind, tag in tags if kind == "DT_NEEDED"}
        versions = {
            version.name
            for _, auxiliaries in elf.get_section_by_name(".gnu.version_r").iter_versions()
            for version in auxiliaries
        }
    assert not {"DT_RPATH", "DT_RUNPATH"} & {kind for kind, _ in tags}
    of_the_system = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
    of_torch = {"libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libgomp.so.1"}
    assert needed <= of_the_system | of_torch
    # The newest of glibc 2.28 and of the libstdc++ of GCC 8, which is allowed with it.
    for name, newest in (("GLIBC", (2, 28)), ("GLIBCXX", (3, 4, 25))):
        numbers = [tuple(map(int, v.split("_")[1].split("."))) for v in versions if v.startswith(f"{name}_")]
        assert numbers
        assert max(numbers) <= newest


@pytest.mark.long
def test_extension_that_needs_a_newer_system_is_refused(tmp_path):
    """A version of glibc is written into a copy of the extension."""
    built = compiled_extension()
    data = built.read_bytes()
    assert b"\0GLIBC_2.14\0" in data
    newer = tmp_path / built.name
    newer.write_bytes(data.replace(b"\0GLIBC_2.14\0", b"\0GLIBC_2.99\0"))
    done = run_program("--extension", newer, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("make_wheel.py: error: auditwheel failed with exit status ")
    assert "too-recent versioned symbols" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def error_of(*arguments, **options):
    done = run_program(*arguments, **options)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    return line.removeprefix("make_wheel.py: error: ")


def test_wrong_options_are_named(tmp_path):
    assert error_of("--python", "/no/python").startswith("--python /no/python: is no program")
    assert error_of("--extension", tmp_path / "other.so").startswith(f"--extension {tmp_path / 'other.so'}: must be a ")
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert error_of("--out", out, "--only", "cpu").startswith(f"--out {out}: cannot be written")


def test_python_without_torch_is_named(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    error = error_of(env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert error.startswith(
        f"--python {sys.executable}: has no torch that can be imported (ImportError: no torch here)"
    )


def test_extension_that_is_older_than_the_sources_is_refused(tmp_path):
    old = shutil.copy(compiled_extension(), tmp_path)
    os.utime(old, (0, 0))
    assert error_of("--extension", old).partition(" is older than ")[2].startswith("csrc/")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_without_cuda_no_wheel_with_its_kernels_is_made(tmp_path):
    error = error_of("--only", "cuda", "--out", tmp_path)
    assert error == f"--only cuda: torch {torch.__version__} is not a CUDA build."


# What the wheel is tried with must be able to fail.


def test_sources_beside_are_not_taken_for_the_installed_package(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(SystemExit, match="which is not in this environment"):
        try_installed.main()


def test_other_bits_than_the_reference_are_found(monkeypatch, compiled):
    monkeypatch.setattr(sys, "prefix", str(ROOT))
    try_installed.main()
    right = try_installed.after_steps

    def wrong(make, fused, device):
        found = right(make, fused, device)
        found[-1][0, 0] ^= fused
        return found

    monkeypatch.setattr(try_installed, "after_steps", wrong)
    with pytest.raises(SystemExit, match="CSGD on cpu: kernel and reference make different bits"):
        try_installed.main()
