# SPDX-License-Identifier: Apache-2.0
"""The compiled module (csrc/ops/bindings.cpp); tests/test_types.py holds its functions against this file."""

from typing import Any

from torch import Tensor

def build_info() -> dict[str, str | None]:
    """What was built: torch, cuda (None without), cuda_architectures, compiler; and cpu_isa, which is used here."""

def set_cpu_isa(name: str) -> bool:
    """Uses another instruction set on the CPU; False where this machine or build does not have it."""

# The operators. Their arguments, one by one: CSGD_ARGUMENTS in csrc/ops/csgd.cpp, CSGD_ADAMW_ARGUMENTS in adamw.cpp,
# CSGD_CALIBRATE_GRAD_ARGUMENTS in calibrate_grad.cpp.

def csgd_(*lists: list[Tensor] | list[int], **options: Any) -> None:
    """The step of csgd_cuda.csgd_, without defaults."""

def calibrated_adamw_(*lists: list[Tensor] | list[int], **options: Any) -> None:
    """The step of csgd_cuda.calibrated_adamw_, without defaults."""

def calibrate_grad(*tensors: Tensor | None, **options: Any) -> Tensor:
    """csgd_cuda.calibrate_grad, without defaults."""

# Of csgd_cuda/optim/plan.py, which has them in Python.

def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the very same objects."""

def gather(params: list[Tensor], states: Any, names: tuple[str, ...]) -> list[list[Any]] | None:
    """The gradients of parameters, and the entries of these names in their states, as lists; None where one lacks."""
