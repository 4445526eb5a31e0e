# SPDX-License-Identifier: Apache-2.0
"""PyTorch's arithmetic on a CPU with the results of a GPU: what its CUDA kernels are known to compute otherwise.

- A square root is correctly rounded, which MKL's is not.
- A tensor divided by a number is multiplied by the number's reciprocal, a product with ``alpha=`` is not rounded before
  it is added, a mean is a product, and sums have an order of their own.
- The other operators of the reference round once, on every device, or not at all.
"""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose result depends on no device. What is missing here and works on floats is refused.
MOVES = """
_foreach_copy _local_scalar_dense _to_copy _unsafe_view alias as_strided cat clone constant_pad_nd copy detach empty
empty_like empty_strided expand fill full full_like gather index index_put lift_fresh masked_fill new_empty
new_empty_strided new_full new_zeros ones_like permute reshape scalar_tensor select slice split split_with_sizes squeeze
stack t transpose unbind unsqueeze view where zero zeros zeros_like
"""
ROUNDS_ONCE = "add mul rsub sub"
EXACT = """
abs amax amin aminmax bitwise_and ceil clamp clamp_max clamp_min copysign eq floor frexp ge gt isfinite isinf isnan le
lt maximum minimum nan_to_num ne neg signbit
"""
SAME = {*MOVES.split(), *ROUNDS_ONCE.split(), *EXACT.split()}


class AsOnCuda(TorchDispatchMode):
    """Inside, divisions by numbers have the result of a GPU. AssertionError for a float operator that is not listed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        name = name if name in SAME else name.removesuffix("_")
        if name == "div" and not isinstance(args[1], torch.Tensor):
            return _divided_by_number(func, *args, **kwargs)
        if name == "sqrt":
            with np.errstate(invalid="ignore"):
                root = torch.from_numpy(np.asarray(np.sqrt(args[0].numpy())))
            return args[0].copy_(root) if func.overloadpacket.__name__ == "sqrt_" else root
        out = func(*args, **kwargs)
        floats = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if not floats:
            return out
        if name != "div":
            assert name in SAME, f"{func} of floats has other bits on a GPU, or is not known to have the same"
        assert kwargs.get("alpha", 1) == 1, f"{func} with alpha= rounds once on a GPU"
        if name in ROUNDS_ONCE.split() and not all(isinstance(x, torch.Tensor) for x in args[:2]):
            assert all(x.element_size() > 2 for x in floats), f"{func} of a number and a tensor of 16 bits"
        if name in ("_to_copy", "copy"):
            _check_conversion(args[0] if name == "_to_copy" else args[1], out)
        return out


def _divided_by_number(func, tensor, number, **kwargs):
    assert not kwargs, f"{func} with {kwargs}"
    dtype = tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype()
    assert dtype.itemsize > 2, f"{func} of a tensor of 16 bits and a number"
    inverse = torch.ones((), dtype=dtype) / torch.full((), number, dtype=dtype)
    return tensor.mul_(inverse) if func.overloadpacket.__name__ == "div_" else tensor.to(dtype) * inverse


def _check_conversion(source, out):
    """Each kind of processor has its own result for a number beyond the range of the integer type."""
    if source.is_floating_point() and not out.is_floating_point() and out.dtype is not torch.bool:
        info = torch.iinfo(out.dtype)
        inside = (source.double() > info.min - 1.0) & (source.double() < info.max + 1.0)
        assert inside.all(), f"a float is converted to {out.dtype} that does not have it"
