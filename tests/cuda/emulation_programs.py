# SPDX-License-Identifier: Apache-2.0
"""Programs that compare a kernel with its CPU loop: compiled when a test needs them, once for all of its workers."""

import os
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

from ..helpers import made_once
from .cpp_source import Change

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "cuda" / "emulation"

# Two warps instead of eight, where the thousands of threads would take minutes under a sanitizer.
SMALL_BLOCKS = "-DCSGD_CUDA_THREADS=64"
# Position independent, since libraries are linked of the same files as programs.
PLAIN = ("-O1", "-fPIC")
NOT_RUN = ("-O0", "-fPIC")  # what is only linked
# An out-of-bounds access, undefined behaviour or a data race ends the program. Reports name lines (-g1). Optimized code
# with the first two sanitizers takes three times longer to compile; without optimization, the third one takes twice
# as long to run.
ADDRESS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", SMALL_BLOCKS)
THREAD = ("-Og", "-g1", "-fsanitize=thread", SMALL_BLOCKS)
QUICK = ("-O0", SMALL_BLOCKS)
# A race need not show in the result, so it must end the program.
ENVIRONMENT = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
TIME_LIMIT = 600  # seconds; a broken kernel may wait forever


class Program(NamedTuple):
    """Of a kernel, for all of its cases or with ``definitions`` for some; with ``changes`` the kernel is broken."""

    kernel: str
    flags: tuple[str, ...]
    definitions: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()


def compile_with(*arguments):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++17", "-ffp-contract=off", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find -l" in done.stderr or "cannot find lib" in done.stderr:
        pytest.skip(f"the compiler has no runtime for {' '.join(map(str, arguments))}")
    assert done.returncode == 0, done.stderr


def compile_ptx(source, target, path):
    """What nvcc makes of a .cu file for a target, with the flags that the package is built with."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    toolkit = setup["find_toolkit"]()
    if toolkit is None:
        pytest.skip("no CUDA toolkit (bin/nvcc with include/cuda_runtime.h)")
    command = [Path(toolkit) / "bin" / "nvcc", "-std=c++17", *setup["NVCC_FLAGS"], f"-I{ROOT}", f"-arch={target}"]
    done = subprocess.run([*command, "-ptx", source, "-o", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def loops_of(kernel, flags):
    """[(source of CPU loops, its flags)]

    Of the sanitizers only those of memory and behaviour watch them, since they run on one thread here. The loops for
    other instruction sets than this processor's are only linked and never run.
    """
    try:
        from csgd_cuda._C import build_info

        isa = build_info()["cpu_isa"]
    except ImportError:
        isa = None
    plain = kernel in ("hard_threshold", "planes")  # compiled for one instruction set
    names = [f"{kernel}_cpu"] if plain else sorted({f"{kernel}_cpu", "step_cpu"})
    sources = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in names]
    if not plain:
        sources += sorted((ROOT / "csrc" / "cpu").glob("loops_*.cpp"))
    for source in sources:
        its_isa = source.stem.partition("loops_")[2]
        runs = its_isa in ("", isa) or isa is None
        yield source, (ADDRESS if flags == ADDRESS else PLAIN) if runs else NOT_RUN


@contextmanager
def changed_sources(changes):
    """A folder with csrc, of which some files are changed and all others are links."""
    if not changes:
        yield ROOT
        return
    with TemporaryDirectory() as folder:
        for part in ("core", "cpu", "cuda"):
            (Path(folder) / "csrc" / part).mkdir(parents=True)
            for source in (ROOT / "csrc" / part).iterdir():
                (Path(folder) / "csrc" / part / source.name).symlink_to(source)
        for name in {change.file for change in changes}:
            text = (ROOT / "csrc" / name).read_text()
            for change in changes:
                text = change.apply(text) if change.file == name else text
            (Path(folder) / "csrc" / name).unlink()
            (Path(folder) / "csrc" / name).write_text(text)
        yield folder


class Programs:
    """Compiles and runs programs in a folder that several processes may share. Each file is made once."""

    def __init__(self, folder, threads):
        self._folder, self._pool = folder, ThreadPoolExecutor(threads)

    def run(self, program, *arguments):
        """The CompletedProcess of a program. One that has a fault is used once, and not kept."""
        if not program.changes:
            return self._run(self._once(self._program, program), arguments)
        with TemporaryDirectory() as folder:
            self._program(program, Path(folder) / "program")
            return self._run(Path(folder) / "program", arguments)

    def _run(self, path, arguments):
        options = {"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": TIME_LIMIT}
        return subprocess.run([path, *arguments], check=False, **options)

    def _once(self, make, *of):
        """The path of what make(*of, path) makes; the name of the file says of what."""
        path = self._folder / f"{make.__name__.strip('_')}-{sha256(repr(of).encode()).hexdigest()[:16]}"
        return made_once(path, lambda unfinished: make(*of, unfinished))

    def _object(self, source, flags, path):
        compile_with(*WARNINGS, *flags, f"-I{ROOT}", f"-I{EMULATION}", "-c", source, "-o", path)

    def _headers(self, flags, path):
        """A folder with the headers that all programs include, precompiled."""
        path.mkdir(exist_ok=True)
        shutil.copy(EMULATION / "precompiled.h", path)
        source = ("-x", "c++-header", EMULATION / "precompiled.h")
        compile_with(*flags, f"-I{EMULATION}", *source, "-o", path / "precompiled.h.gch")

    def ptx(self, source, target):
        """The path of the PTX of a .cu file."""
        return self._once(compile_ptx, source, target)

    def library(self, kernel):
        """The path of a program as a library, whose launches go to a function of the caller's."""
        return self._once(self._library, kernel)

    def _library(self, kernel, path):
        """Its kernels are never run, only their launchers. It takes its own operator new where others have one, too."""
        launches = ROOT / "tests" / "cuda" / "ptx" / "launches.cpp"
        self._link(Program(kernel, PLAIN), path, NOT_RUN, ("-shared", "-Wl,-Bsymbolic", launches))

    def _program(self, program, path):
        self._link(program, path, program.flags)

    def _link(self, program, path, flags, more=()):
        """The kernels are compiled for this program alone, everything else for all programs with its flags."""
        objects = [*loops_of(program.kernel, program.flags)]
        names = ("cuda_emulation", f"{program.kernel}_against_cpu_loop")
        objects += [(EMULATION / f"{name}.cpp", program.flags) for name in names]
        needed = [self._pool.submit(self._once, self._object, *each) for each in objects]
        headers = self._once(self._headers, flags)
        flags = [*flags, *more, *(["-w"] if program.changes else WARNINGS)]
        flags += [f"-D{definition}" for definition in program.definitions]
        others = [each.result() for each in needed]
        with changed_sources(program.changes) as root:
            includes = ["-include", "precompiled.h", *(f"-I{folder}" for folder in (headers, root, EMULATION))]
            compile_with(
                *flags, *includes, EMULATION / f"{program.kernel}_kernels.cpp", *others, "-pthread", "-o", path
            )
