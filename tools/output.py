# SPDX-License-Identifier: Apache-2.0
"""What a tool prints while it works."""

import os
import sys


def say(text):
    """Prints a line at once.

    A character that the terminal's encoding lacks is printed as its escape. After the reader of a pipe has left
    (``| head -1``) nothing more is printed, and the tool goes on.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
