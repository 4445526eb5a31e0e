# SPDX-License-Identifier: Apache-2.0
"""The compiled module (csrc/ops/bindings.cpp); tests/test_types.py holds its functions against this file."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

def build_info() -> dict[str, str | None]:
    """What was built: torch, cuda (None without), cuda_architectures, compiler; and cpu_isa, which is used here."""

def set_cpu_isa(name: str) -> bool:
    """Uses another instruction set on the CPU; False where this machine or build does not have it."""

# Their arguments, one by one: CSGD_ARGUMENTS in csrc/ops/csgd.cpp.

def csgd_(*lists: list[Tensor] | list[int], **options: Any) -> None:
    """The step of csgd_cuda.csgd_, without defaults; the seed is the signed integer of the same bits."""

def check_csgd(*lists: list[Tensor] | list[int], **options: Any) -> None:
    """Raises what csgd_ would raise; changes nothing."""

# The rest lets the tests reach the compiled rule itself.

def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """One Philox call on the host: four words for a counter of four and a key of two."""

def philox4x32_10_cuda(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """The same on the GPU; only where built with CUDA."""

def take_shortcuts(name: str, values: Sequence[float]) -> list[float]:
    """What csrc/core/shortcuts.h has under this name, of each of the float32 ``values``."""

def take_shortcuts_cuda(name: str, values: Sequence[float]) -> list[float]:
    """The same on the GPU; only where built with CUDA."""

def draw(seed: int, stream: int, position: int, index: int, step: int) -> int:
    """The 16-bit draw of one element."""

def refine_reciprocal(n: float, estimate: float) -> float:
    """1 / n, as a GPU finds it."""

def store(dtype: str, value: float, draws: Sequence[int | None]) -> list[float]:
    """The value as stored in dtype, for each draw of the stochastic rounding (None: nearest even)."""

class ElementResult:
    @property
    def n(self) -> float:
        """How many of the 2^16 draws move the element."""
    @property
    def momentum_buffer(self) -> float:
        """As stored."""
    @property
    def params(self) -> list[float]:
        """As stored, one for each calibration draw."""

def update_element(
    dtype: str,
    param: float,
    grad: float,
    *,
    momentum_buffer: float = 0.0,
    step: int = 1,
    lipschitz_bound: float = 0.0,
    lr: float = 1.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    calibration: float = 1.0,
    grad_scale: float | None = None,
    draws: Sequence[int] = [],
    param_draw: int | None = None,
    momentum_draw: int | None = None,
) -> ElementResult:
    """One element of the rule, for each of the calibration draws given."""
