# SPDX-License-Identifier: Apache-2.0
"""The one exception that ``train.py`` turns into a sentence and exit status 2."""


class UserError(Exception):
    """Something the user can put right: an option, a missing or a damaged file.

    The message is one sentence that names the option or the file and says what to do.
    """
