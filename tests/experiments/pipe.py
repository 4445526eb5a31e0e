# SPDX-License-Identifier: Apache-2.0
"""Output as it is in ``LC_ALL=C program | head -1``."""

import contextlib
import io
import os
import sys


class PipeToHead(io.TextIOWrapper):
    """A pipe in ASCII. Its reader leaves when the program has flushed its first output, which is ``head`` then."""

    def __init__(self):
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        super().__init__(io.FileIO(writer, "w"), encoding="ascii")
        self.head = b""

    def flush(self):
        super().flush()
        if not self.head:
            with contextlib.suppress(BlockingIOError):  # nothing printed yet
                self.head = os.read(self._reader, 2**16)
                os.close(self._reader)


@contextlib.contextmanager
def to_head():
    """Stdout, which is the value, and stderr are such pipes, and the program must leave them in place."""
    before, pipes = (sys.stdout, sys.stderr), (PipeToHead(), PipeToHead())
    sys.stdout, sys.stderr = pipes
    try:
        yield pipes[0]
        assert (sys.stdout, sys.stderr) == pipes
    finally:
        sys.stdout, sys.stderr = before
