# SPDX-License-Identifier: Apache-2.0
"""What Nvidia's profiler and sanitizer say where a machine does not let them at its GPU: that is no fault of ours."""

# Counters kept for administrators; a sandbox without the profiler's library, or without the debugger's interface.
REFUSALS = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Device not supported")


def refusal(output):
    """The first line with a refusal in the output of a tool; None where it has none."""
    for line in output.splitlines():
        if any(words in line for words in REFUSALS):
            return line.strip(" =")
    return None
