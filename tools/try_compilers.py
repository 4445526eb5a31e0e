# SPDX-License-Identifier: Apache-2.0
"""The CPU loops with every compiler and set of flags that is here: do all programs compute the same bits?

    python tools/try_compilers.py            # compiles for some minutes, prints a table; fails where bits differ
    python tools/try_compilers.py aarch64    # only those whose name has this word (clang, -O2), beside the first one

tests/cpu/print_bits.cpp is compiled with the files of csrc/cpu, with the flags of setup.py and others, and run in each
instruction set. What it prints is held against the first program's. Code for aarch64 is run by qemu-aarch64.
"""

import argparse
import runpy
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from output import say
from program import UserError, exit_status

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"))
STANDARD = "-std=c++20"  # as torch.utils.cpp_extension adds it
LOOPS = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
PROGRAM = [ROOT / "tests" / "cpu" / "print_bits.cpp", *sorted((ROOT / "tests" / "cpu").glob("cases_of_*.cpp"))]
INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]


@dataclass(frozen=True)
class Build:
    """A compiler with its flags: `before` those of setup.py, as CXXFLAGS are, and `after` them, which win.

    `wrong`: the flags break the rule of csrc/core/update_rule.h, so that the bits must differ.
    """

    compiler: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()
    wrong: bool = False

    @property
    def name(self) -> str:
        return " ".join([self.compiler, *self.before, *(self.after or ("-O3",))])

    def why_not(self):
        """Why this cannot be tried here, or None."""
        missing = [tool for tool in (self.compiler, *self.runner) if shutil.which(tool) is None]
        return f"{' and '.join(missing)} not found" if missing else None

    def version(self):
        return run([self.compiler, "--version"]).stdout.splitlines()[0]


AARCH64 = Build("aarch64-linux-gnu-g++", runner=("qemu-aarch64",))
BUILDS = [
    Build("g++"),
    Build("clang++"),
    Build("g++", after=("-O2",)),
    Build("clang++", after=("-O2",)),
    Build("g++", before=("-march=native",)),
    Build("clang++", before=("-march=native",)),
    Build("g++", before=("-flto",)),
    Build("clang++", before=("-flto",)),
    AARCH64,
    Build("clang++", before=("-Ofast",)),
    Build("g++", before=("-march=native",), after=("-ffp-contract=fast",), wrong=True),
]
# Another compiler and another processor. The rest is left to `make try-compilers`.
TRIED_BY_A_TEST = [BUILDS[1], AARCH64]


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done


def compile_all(build, sources, folder):
    """Compiles the sources as setup.py would; the object files are in the folder."""
    run(
        [build.compiler, STANDARD, "-fPIC", *build.before, *SETUP["CXX_FLAGS"], *build.after, "-c", *sources],
        cwd=folder,
    )


def link(build, folder, others=()):
    """The program of all object files in the folder, and of others; static where qemu would look for libraries."""
    flags = [*build.before, *SETUP["EXACT"], *build.after, *(["-static"] if build.runner else [])]
    run([build.compiler, *flags, *sorted(folder.glob("*.o")), *others, "-o", folder / "print_bits"])


def make_program(build, folder):
    compile_all(build, [*PROGRAM, *LOOPS], folder)
    link(build, folder)


def digests(build, folder):
    """{instruction set: {case: digest}} of the program in the folder, for the sets that this processor has."""
    found = {}
    for isa in INSTRUCTION_SETS:
        done = subprocess.run([*build.runner, folder / "print_bits", isa], capture_output=True, text=True, check=False)
        if done.returncode == 3:
            continue
        if done.returncode != 0:
            raise RuntimeError(f"print_bits {isa} of {build.name} failed:\n{done.stderr}")
        found[isa] = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    return found


def differing(expected, got):
    """The cases of `got`, one instruction set's, that are not those of `expected`."""
    return sorted(case for case in expected.keys() | got.keys() if expected.get(case) != got.get(case))


def compare(build, expected, found):
    """What the table says of a build, and whether that is right. `expected`: the digests of each case."""
    wrong = {isa: cases for isa, got in found.items() if (cases := differing(expected, got))}
    if build.wrong:
        return f"differs, as it must, in {sum(map(len, wrong.values()))}" if wrong else "does not differ", bool(wrong)
    if not wrong:
        return f"same bits: {', '.join(found)}", True
    return "; ".join(f"{isa} differs in {len(cases)}, as in {cases[0]!r}" for isa, cases in wrong.items()), False


def try_build(build, expected):
    """What the table says of a build, whether that is right, and the digests; `expected` is None for the first one."""
    if reason := build.why_not():
        return f"not tried: {reason}", True, None
    with tempfile.TemporaryDirectory() as folder:
        try:
            make_program(build, Path(folder))
            found = digests(build, Path(folder))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return "failed", False, None
    return *compare(build, expected or found["baseline"], found), found["baseline"]


def chosen(word):
    """The builds whose name has the word, behind the first one, which all others are held against."""
    found = [build for build in BUILDS[1:] if word in build.name]
    if not found:
        raise UserError(f"{word}: no build has this word in its name; they are {', '.join(b.name for b in BUILDS[1:])}")
    return [BUILDS[0], *found]


def try_all(word):
    """Prints the table. Returns whether all results are as they must be."""
    expected, ok = None, True
    say("| compiler | flags | result |\n| --- | --- | --- |")
    for build in chosen(word):
        result, right, baseline = try_build(build, expected)
        expected, ok = expected or baseline, ok and right
        version = build.compiler if baseline is None else build.version()
        say(f"| {version} | {build.name.partition(' ')[2]} | {result} |")
    if expected is None:
        raise UserError("no compiler works here; install g++ or clang++")
    say(f"{len(expected)} cases in each instruction set")
    if not ok:
        say("A result above is not as it must be.")
    return ok


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="of the names of the builds; default: all of them")
    args, unknown = parser.parse_known_args(argv)
    # A word may be a flag, such as -O2.
    words = [args.word, *unknown] if args.word else unknown or [""]
    if len(words) > 1:
        parser.error(f"one word chooses the builds, got {' '.join(words)}")
    return exit_status("try_compilers", "nothing was written", lambda: try_all(words[0]))


if __name__ == "__main__":
    sys.exit(main())
