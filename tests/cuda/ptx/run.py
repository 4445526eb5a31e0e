# SPDX-License-Identifier: Apache-2.0
"""Runs a program that compares a kernel with its CPU loop, and executes nvcc's PTX where it launches the kernel.

The program comes as a library (emulation_programs.py). Exit status: the program's own; 3 where the PTX does what it may
not. Beside what the program prints, the last line names the kernels of the PTX that were never launched.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import traceback
from pathlib import Path

from .executor import Choices, Executor
from .memory import Space
from .module import Module

FAILED = 3


def symbols(path):
    """{offset in the library: name} of its functions, also of those that it does not export, as kernels."""
    listing = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    return {int(offset, 16): name for offset, _, name in map(str.split, listing.splitlines())}


class Program:
    def __init__(self, library, ptx, choices):
        self._library = ctypes.CDLL(str(library))
        names = symbols(library)
        offset_of_main = next(offset for offset, name in names.items() if name == "main")
        base = ctypes.cast(self._library.main, ctypes.c_void_p).value - offset_of_main
        self._names = {base + offset: name for offset, name in names.items()}
        memory = Space.of_host(*map(self._number, ("memory_data", "memory_valid", "memory_size")))
        module = Module(Path(ptx).read_text(encoding="utf-8"))
        self.not_launched = set(module.names)
        self._executor = Executor(module, memory, choices)
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self._launcher = kind(self._launch)  # kept as long as the library, which calls it

    def _number(self, function):
        getattr(self._library, function).restype = ctypes.c_size_t
        return getattr(self._library, function)()

    def run(self, arguments):
        """The exit status of the program with these arguments."""
        self._library.set_launcher(self._launcher)
        words = [b"program", *(each.encode() for each in arguments)]
        status = self._library.main(len(words), (ctypes.c_char_p * (len(words) + 1))(*words))
        flush()
        return status

    def _launch(self, kernel, argument, blocks, block_size):
        try:
            name = self._names[kernel]
            self._executor.launch(name, blocks, block_size, lambda size: ctypes.string_at(argument, size))
            self.not_launched.discard(name)
        except BaseException:  # the program in C++ between here and its caller passes no exceptions on
            traceback.print_exc()
            flush()
            os._exit(FAILED)


def flush():
    """Writes what C++ and Python have printed."""
    ctypes.CDLL(None).fflush(None)
    sys.stdout.flush()
    sys.stderr.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("ptx")
    parser.add_argument("--reciprocal", default=Choices().reciprocal)
    parser.add_argument("--blocks", type=int, default=Choices().blocks)
    parser.add_argument("--reverse", action="store_true")
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("arguments", nargs="*", help="of the program: the names of cases")
    arguments = parser.parse_args()
    choices = Choices(**{name: getattr(arguments, name) for name in Choices._fields})
    program = Program(arguments.library, arguments.ptx, choices)
    status = program.run(arguments.arguments)
    print("not launched:", ", ".join(sorted(program.not_launched)) or "none")
    return status


if __name__ == "__main__":
    sys.exit(main())
