# SPDX-License-Identifier: Apache-2.0
"""Names for the types that several files share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Sequence[Tensor]
Group: TypeAlias = dict[str, Any]  # a parameter group: its options and, under "params", its parameters
State: TypeAlias = dict[Tensor, dict[str, Any]]  # of an optimizer: for each parameter what it keeps between steps
# For a device and the place of a call's first parameter, the operator's arguments that belong to the whole optimizer.
SharedArguments: TypeAlias = Callable[[torch.device, int], dict[str, Tensor | None]]
