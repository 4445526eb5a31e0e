# SPDX-License-Identifier: Apache-2.0
"""The tasks by name. One module each; it is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from examples.training.errors import UserError

from .base import DataOptions, Task

# --task: (module beside this one, class in it)
TASKS = {
    "classification": ("classification", "Classifier"),
    "detection": ("detection", "Detection"),
}


def create(task: str, options: DataOptions) -> Task:
    """The task ``task`` on the data of ``options``; UserError where either does not work."""
    if task not in TASKS:
        raise UserError(f"--task {task}: not among {', '.join(TASKS)}.")
    module, name = TASKS[task]
    return getattr(import_module(f".{module}", __name__), name).create(options)


__all__ = ["TASKS", "DataOptions", "Task", "create"]
