# SPDX-License-Identifier: Apache-2.0
"""What programs turn into a sentence and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right: an option, a missing or a damaged file.

    The message is one sentence that names the option or the file and says what to do.
    """


def exit_status(program: str, interrupted: str, run: Callable[[], object]) -> int:
    """Of a program that is ``run``: 0; 2 for something the user can put right, with one sentence on stderr; 130 for
    Ctrl-C, with what is to be known then."""
    try:
        run()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted; {interrupted}", file=sys.stderr)
        return 130
    return 0
