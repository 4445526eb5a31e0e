# SPDX-License-Identifier: Apache-2.0
"""The quick tests with every Python that is here and several releases of torch.

    python tools/try_versions.py                                  # all of them: minutes and up to 6 GB for each
    python tools/try_versions.py --only py3.10-torch2.11.0        # that one
    python tools/try_versions.py --pythons /opt/3.14/bin/python3.14 --torches 2.14.1

Each combination gets an environment of its own, and a copy of the sources, from which pip builds the package as docs/
install.md says. The tests run with the installed package. Needs no torch itself; pip must find torch, and the packages
that requirements-dev.txt pins. Where a pin does not fit, the newest release that does is taken.

Writes versions.json, versions.md and a log of each combination into --out as results come. Combinations whose row is
there are not tried again: repeat an interrupted call. A torch that pip does not have for a Python is a row, too; any
other failure to install is not, so that the next call tries it again. Exit status: 0 if all that there is passed, 1 if
a build or a test failed or something could not be installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from program import UserError, exit_status

ROOT = Path(__file__).resolve().parent.parent
LEAST_PYTHON = (3, 10)
TORCHES = ("2.11.0", "2.13.0", "2.14.1")
NEEDED = ("numpy", "setuptools", "ninja", "pybind11", "pytest", "pytest-xdist", "hypothesis", "expecttest")
FOLDERS = ("csrc", "csgd_cuda", "docs", "experiments", "tests", "tools")  # tests import some of their modules
FILES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
# For each promise the tests in which another torch or Python would show first: bits, optimizers, layers, pruning,
# state dicts, compiled steps. Two to three minutes on two cores.
COMPILED = "tests/integration/test_compile.py"
QUICK_TESTS = (
    "tests/rule/test_backends_agree.py", "tests/rule/test_against_torch.py",
    "tests/optim/test_operator.py", "tests/optim/test_optimizer.py", "tests/optim/test_step_plan.py",
    "tests/optim/test_traps.py", "tests/optim/test_diagnostics.py", "tests/optim/test_inference_mode.py",
    "tests/layers/test_calibrate_grad.py", "tests/layers/test_filters.py", "tests/layers/test_calibrated_weight.py",
    "tests/pruning/test_hard_threshold.py", "tests/pruning/test_export_models.py",
    "tests/torch_optim/test_state_dict.py", "tests/torch_optim/test_other_checkpoints.py",
    "tests/torch_optim/test_implementations.py", "tests/torch_optim/test_hooks.py",
    "tests/torch_optim/test_schedulers.py",
    f"{COMPILED}::test_training_step_is_one_graph_and_is_not_compiled_again",
    f"{COMPILED}::test_inductor_makes_the_bits_of_an_eager_step",
    f"{COMPILED}::test_scheduler_attached_to_the_optimizer_breaks_the_graph_as_with_torch",
)  # fmt: skip
LIMIT = 3600  # seconds for the tests: a hang in one combination must not keep the others from being tried
HEADER = ["Python", "torch", "kernels", "passed", "failed", "skipped", "install, build, test in s", "date", "result"]

ASK_PYTHON = """
import json, sys, sysconfig
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
print(json.dumps({"version": sys.version.split()[0], "free_threaded": free_threaded}))
"""
# What was built, as the user has it. Where a free-threaded Python has turned its GIL on, that must be seen.
ASK_PACKAGE = """
import json, sys, torch
from csgd_cuda import extension
gil = getattr(sys, "_is_gil_enabled", lambda: True)()
about = {"torch": torch.__version__, "gil": gil, "built": extension.build_info(), "error": extension.load_error}
print(json.dumps(about))
"""


@dataclass(frozen=True)
class Python:
    path: str
    version: str
    free_threaded: bool

    @property
    def name(self) -> str:
        """As in the names of its files: 3.13, or 3.13t."""
        return ".".join(self.version.split(".")[:2]) + ("t" if self.free_threaded else "")


@dataclass(frozen=True)
class Combination:
    python: Python
    torch: str

    @property
    def name(self) -> str:
        return f"py{self.python.name}-torch{self.torch}"


class StepFailed(Exception):
    """A command of a combination failed; the message is what its row says, ``output`` what the command has printed."""

    def __init__(self, message, output=""):
        super().__init__(message)
        self.output = output


def ask(path):
    """The Python of a path, or None where none answers: pyenv's stand-ins for other versions do not."""
    try:
        done = subprocess.run([path, "-I", "-c", ASK_PYTHON], capture_output=True, text=True, check=True, timeout=60)
        return Python(str(path), **json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return None


def numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", version))


def is_supported(python):
    return numbers(python.version) >= LEAST_PYTHON


def pythons_here():
    """The Pythons on the PATH and of pyenv, from the oldest; the first one of each minor version."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    folders += sorted(Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv").glob("versions/*/bin"))
    found = {}
    for path in (path for folder in folders for path in sorted(folder.glob("python3.*"))):
        if re.fullmatch(r"python3\.\d+t?", path.name) and (python := ask(path)) and is_supported(python):
            found.setdefault(python.name, python)
    return sorted(found.values(), key=lambda python: (numbers(python.version), python.free_threaded))


def pythons_of(paths):
    found = []
    for path in paths:
        python = ask(shutil.which(path) or path)
        if python is None:
            raise UserError(f"--pythons: {path} does not run as a Python; name an interpreter such as python3.12")
        if not is_supported(python):
            raise UserError(f"--pythons: {path} is Python {python.version}, and csgd_cuda needs 3.10 or later")
        found.append(python)
    return found


def plan(pythons, torches, only=()):
    """The combinations in the order in which they are tried: the oldest and the newest of all first.

    Args:
        pythons, torches: from the oldest to the newest.
        only: names of combinations; all where it is empty.
    """
    every = [Combination(python, torch) for python in pythons for torch in dict.fromkeys(torches)]
    if unknown := set(only) - {combination.name for combination in every}:
        names = ", ".join(combination.name for combination in every)
        raise UserError(f"--only: {min(unknown)!r} is no combination of what is here; there are {names or 'none'}")
    every = [combination for combination in every if not only or combination.name in only]
    return [*every[:1], *every[:0:-1][:1], *every[1:-1]]


def pins(text):
    """The lines of requirements-dev.txt for what the quick tests need. pip chooses those for its Python."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if re.split(r"[=<>; ]", line)[0] in NEEDED]


class Trial:
    """One combination: its environment, and what became of each step."""

    def __init__(self, combination, folder, log, cuda):
        self._combination, self._folder, self._log, self._cuda = combination, folder, log, cuda
        self._python = folder / "bin" / "python"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self._environment = {
            **inherited, "CSGD_CUDA_BUILD": "cuda" if cuda else "cpu", "OMP_WAIT_POLICY": "passive",
        }  # fmt: skip
        self.row = {
            "name": combination.name, "python": combination.python.version, "torch": combination.torch,
            "kernels": "CUDA" if cuda else "CPU", "passed": 0, "failed": 0, "skipped": 0, "seconds": [],
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "result": "",
        }  # fmt: skip
        if combination.python.free_threaded:
            self.row["python"] += ", free-threaded"

    def run(self):
        """The row of the table."""
        steps = {"installing torch": self._install, "building": self._build, "testing": self._test}
        with tempfile.TemporaryDirectory() as sources:
            for what, step in steps.items():
                say(f"  {what}")
                begin = time.monotonic()
                try:
                    step(Path(sources))
                except StepFailed as failure:
                    self.row["result"] = str(failure)
                self.row["seconds"].append(round(time.monotonic() - begin))
                if self.row["result"]:
                    break
        return self.row

    def _install(self, sources):
        if not self._python.exists():
            self._call([self._combination.python.path, "-m", "venv", self._folder], "not installed")
        torch = f"torch=={self._combination.torch}"
        try:
            self._pip(torch, "not installed")
        except StepFailed as failure:
            # Of a package that pip cannot look up it has no versions at all.
            if re.search(r"requirement torch==\S+ \(from versions: (?!none)", failure.output):
                raise StepFailed(f"no torch {self._combination.torch} for this Python", failure.output) from None
            raise
        needed = pins((ROOT / "requirements-dev.txt").read_text(encoding="utf-8"))
        try:
            self._pip(torch, "not installed", *needed)
        except StepFailed:  # torch 2.11, for one, refuses setuptools 82 and later
            for requirement in needed:
                try:
                    self._pip(torch, "not installed", requirement)
                except StepFailed:
                    # An environment begins with a setuptools of the age of its Python, which is too old for the build.
                    self._pip(torch, "not installed", "--upgrade", re.split(r"[=<>; ]", requirement)[0])

    def _build(self, sources):
        ignored = shutil.ignore_patterns("__pycache__", "_C.*", "*.so")
        for folder in FOLDERS:
            shutil.copytree(ROOT / folder, sources / folder, ignore=ignored)
        for file in FILES:
            shutil.copy(ROOT / file, sources)
        self._pip("--no-build-isolation", "not built", "--no-deps", "--force-reinstall", ".", cwd=sources)
        # Or the tests would import the sources, in which there is no extension.
        shutil.rmtree(sources / "csgd_cuda")
        about = json.loads(self._call([self._python, "-c", ASK_PACKAGE], "not built", cwd=sources).splitlines()[-1])
        self.row["torch"] = about["torch"]
        if about["built"] is None:
            raise StepFailed(f"not loaded: {about['error']}")
        if self._combination.python.free_threaded:
            self.row["python"] += f", GIL {'on' if about['gil'] else 'off'}"

    def _test(self, sources):
        words = [self._python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--junitxml=tests.xml"]
        words += ["--numprocesses", "auto", "--maxprocesses", "8", "--dist", "loadgroup", *QUICK_TESTS]
        report = sources / "tests.xml"
        try:
            self._call(words, "not tested", cwd=sources, timeout=LIMIT)
        except StepFailed:
            if not report.exists():
                raise
        counts, failures = results_of(report.read_text(encoding="utf-8"))
        self.row.update(counts)
        if failures:
            self.row["result"] = f"failed: {', '.join(failures[:3])}{', ...' if failures[3:] else ''}"
        elif not counts["passed"]:
            self.row["result"] = "not tested: no test ran"
        else:
            self.row["result"] = "passed"

    def _pip(self, requirement, otherwise, *others, cwd=None):
        # Compiled when imported: to compile all of torch takes longer than to unpack it.
        words = [self._python, "-m", "pip", "install", "--no-compile", "--disable-pip-version-check"]
        self._call([*words, requirement, *others], otherwise, cwd=cwd)

    def _call(self, words, otherwise, cwd=None, timeout=None):
        """The output of a command, which goes to the log. `otherwise` is what the row says where it fails, and why."""
        print("==", *words, file=self._log, flush=True)
        try:
            done = subprocess.run(
                words, cwd=cwd, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                encoding="utf-8", errors="replace", check=False, timeout=timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise StepFailed(f"{otherwise}: not finished after {timeout} s") from None
        print(done.stdout, file=self._log, flush=True)
        if done.returncode != 0:
            raise StepFailed(f"{otherwise}: {reason_in(done.stdout)}", done.stdout)
        return done.stdout


def reason_in(output):
    """The last error of a compiler, of Python or of pip, whose output may end with advice; or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it printed nothing"]
    for error in (r".*\d: (?:fatal )?error: .+", r"(?:E +)?\w+Error: .+", r"ERROR: (?!ResolutionImpossible).+"):
        if found := [line for line in lines if re.fullmatch(error, line)]:
            return found[-1].removeprefix("ERROR: ")
    return lines[-1]


def results_of(report):
    """The counts of a report that pytest has written, and the names of the tests that failed."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = {"passed": len(cases) - len(failed) - skipped, "failed": len(failed), "skipped": skipped}
    return counts, [f"{case.get('classname')}.{case.get('name')}".strip(".").removeprefix("tests.") for case in failed]


def say(line):
    print(line, flush=True)


class Results:
    """The rows in a folder, written whenever one is added."""

    def __init__(self, folder):
        self._folder, self._path = folder, folder / "versions.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.rows = self._read()

    def _read(self):
        try:
            rows = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else []
            for row in rows:
                self._key(row), self._cells(row)
            return rows
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"--out: {self._path} is damaged ({error}); delete it, or name another folder") from None

    def holds(self, name, cuda):
        return any(self._key(row) == (name, "CUDA" if cuda else "CPU") for row in self.rows)

    def add(self, row):
        # Read again: another call may have added a row meanwhile.
        others = [other for other in self._read() if self._key(other) != self._key(row)]
        self.rows = sorted([*others, row], key=lambda row: (numbers(row["name"]), row["name"]))
        self._path.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        (self._folder / "versions.md").write_text(self.table() + "\n", encoding="utf-8")

    def table(self):
        lines = [HEADER, ["---"] * len(HEADER)]
        lines += [self._cells(row) for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    @staticmethod
    def _cells(row):
        counts = [row["passed"], row["failed"], row["skipped"]]
        seconds = ", ".join(map(str, row["seconds"]))
        result = row["result"].replace("|", "\\|")
        return [row["python"], row["torch"], row["kernels"], *map(str, counts), seconds, row["date"], result]

    @staticmethod
    def _key(row):
        return row["name"], row["kernels"]


def failed(row):
    """A torch that there is not for a Python says nothing about the package."""
    return not row["result"].startswith(("passed", "no torch"))


def try_all(combinations, args):
    """The rows of the combinations, of this call or one before, and those of this call that are not kept."""
    results = Results(args.out)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    broken = []
    for at, combination in enumerate(combinations):
        heading = f"{combination.name} ({at + 1} of {len(combinations)})"
        if results.holds(combination.name, args.cuda) and not args.again:
            say(f"{heading}: its row is there, so it is not tried again")
            continue
        say(heading)
        folder = (args.keep or args.out) / combination.name
        try:
            with open(args.out / f"{combination.name}.log", "w", encoding="utf-8") as log:
                row = Trial(combination, folder, log, args.cuda).run()
        finally:
            if args.keep is None:
                shutil.rmtree(folder, ignore_errors=True)
        say(f"  {row['result']}")
        if row["result"].startswith("not installed"):
            broken.append(row)
        else:
            results.add(row)
    say(results.table())
    if broken:
        say(f"Not installed, to be tried again: {', '.join(row['name'] for row in broken)}; the logs say why.")
    names = {combination.name for combination in combinations}
    kernels = "CUDA" if args.cuda else "CPU"
    return [row for row in results.rows if row["name"] in names and row["kernels"] == kernels] + broken


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pythons", nargs="+", metavar="PATH", help="interpreters (default: pythonX.Y on the PATH and pyenv's)"
    )
    parser.add_argument(
        "--torches", nargs="+", default=TORCHES, metavar="X.Y.Z", help=f"releases (default: {' '.join(TORCHES)})"
    )
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="combinations, as py3.10-torch2.11.0")
    parser.add_argument("--cuda", action="store_true", help="build the CUDA kernels, too; minutes more for each")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the environments there, and use those there")
    parser.add_argument("--again", action="store_true", help="also try what has a row already")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "versions", help="default: out/versions")
    args = parser.parse_args(argv)
    args.out, args.keep = args.out.resolve(), args.keep and args.keep.resolve()
    return args


def main(argv=None):
    args = parse(argv)

    def run():
        for torch in args.torches:
            if not re.fullmatch(r"\d+\.\d+\.\d+", torch):
                raise UserError(f"--torches: {torch!r} is no release of torch; write it as 2.13.0")
        pythons = pythons_here() if args.pythons is None else pythons_of(args.pythons)
        if not pythons:
            raise UserError("no Python 3.10 or later is on the PATH or under pyenv; name one with --pythons")
        rows = try_all(plan(pythons, sorted(args.torches, key=numbers), args.only), args)
        return not any(map(failed, rows))

    return exit_status("try_versions", "what has a row is kept; repeat the command to go on", run)


if __name__ == "__main__":
    sys.exit(main())
