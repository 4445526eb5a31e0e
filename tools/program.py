# SPDX-License-Identifier: Apache-2.0
"""How a program ends: its exit status, its errors in one sentence, and output that ends no program."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class UserError(Exception):
    """Something that the user can put right: an option, a missing or a damaged file.

    The message is one sentence that names the option or the file and says what to do.
    """


def exit_status(program: str, interrupted: str, run: Callable[[], object]) -> int:
    """Runs a program with lenient_output().

    Args:
        program: its name, for messages.
        interrupted: what the user should know after Ctrl-C.
        run: the program. False says that what it has checked does not hold.

    Returns:
        The exit status: 0; 1 where ``run`` returns False; 2 for something that the user can put right, a file or folder
        that cannot be read or written among it, with one sentence on stderr; 130 for Ctrl-C. A reader of a pipe that
        has left does not change it: the status says whether the results were written.
    """
    with lenient_output():
        try:
            holds = run()
        except UserError as error:
            print(f"{program}: error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            if error.filename is None:
                raise
            print(f"{program}: error: {error.filename}: {error.strerror}; name another path.", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{program}: interrupted; {interrupted}", file=sys.stderr)
            return 130
        return int(holds is False)


@contextmanager
def lenient_output() -> Iterator[None]:
    """Inside, nothing that is printed to stdout or stderr can end the program.

    A character that the terminal's encoding lacks is printed as its escape, such as \\xb1. What is printed after the
    reader of a pipe has left (``| head -1``) is dropped, and the program goes on to write its files.
    """
    before = sys.stdout, sys.stderr
    inside = [stream and _Lenient(stream) for stream in before]  # None stays: it was closed before Python started
    sys.stdout, sys.stderr = inside
    try:
        yield
    finally:
        for stream in filter(None, inside):
            stream.flush()
        sys.stdout, sys.stderr = before


class _Lenient:
    """The stream, but for the errors that lenient_output() names."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except BrokenPipeError:
            self._drop()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        # What the stream still holds must go somewhere, or Python complains when it closes the stream at the end.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
