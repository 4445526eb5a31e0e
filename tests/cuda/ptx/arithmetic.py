# SPDX-License-Identifier: Apache-2.0
"""What PTX instructions compute, on numpy arrays of one element for each thread.

OPERATIONS has an entry for each opcode with all of its modifiers. What has no entry is an error, as are the floating
point operations without a rounding mode: ptxas may contract them to a fused multiply-add.
"""

import ctypes
import operator
import platform
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from .module import TYPES


class Operation(NamedTuple):
    result: str  # types, as PTX names them
    sources: tuple[str, ...]
    compute: Callable[..., np.ndarray]  # of arrays of these types


OPERATIONS: dict[str, Operation] = {}
# opcode: (type, the correctly rounded result); how far a GPU's result lies from it is not specified to the bit.
APPROXIMATIONS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {}


def define(opcode, result, sources, compute):
    OPERATIONS[opcode] = Operation(result, tuple(sources), compute)


# Integers.


def wide(compute, dtype):
    """The operation on operands that are first extended to the dtype."""
    return lambda *x: compute(*(each.astype(dtype) for each in x))


def high_half(x, y):
    """The upper half of products."""
    bits = x.dtype.itemsize * 8
    if bits < 64:
        return (np.multiply(x, y, dtype=f"{x.dtype.kind}{x.dtype.itemsize * 2}") >> bits).astype(x.dtype)
    a, b = x.view(np.uint64), y.view(np.uint64)
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    a_high, a_low, b_high, b_low = a >> half, a & mask, b >> half, b & mask
    middle = a_high * b_low + (a_low * b_low >> half)
    other = a_low * b_high + (middle & mask)
    high = a_high * b_high + (middle >> half) + (other >> half)
    if x.dtype.kind == "i":
        high = high - np.where(x < 0, b, 0).astype(np.uint64) - np.where(y < 0, a, 0).astype(np.uint64)
    return high.view(x.dtype)


def quotient(x, y):
    """x / y towards zero. Division by zero gives what nothing specifies: here all bits are ones."""
    down = np.floor_divide(x, y)
    up = (down * y != x) & ((x < 0) != (y < 0))
    return np.where(y == 0, np.invert(np.zeros_like(x)), down + up.astype(x.dtype))


def remainder(x, y):
    return x - quotient(x, y) * y


def shift(compute, bits):
    """Shifts by more than all bits are shifts by all of them; numpy does that as PTX does."""
    if bits == 32:
        return compute  # a ufunc, of operands of one type
    return lambda x, amount: compute(x, np.minimum(amount, bits).astype(x.dtype))


def funnel(left, wraps):
    def compute(low, high, amount):
        both = high.astype(np.uint64) << np.uint64(32) | low
        n = (amount & np.uint32(31) if wraps else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        return (both << n >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return compute


def bit_length(x):
    if x.dtype.itemsize < 8:
        return np.frexp(x.astype(np.float64))[1]
    high, low = x >> np.uint64(32), x & np.uint64(0xFFFFFFFF)
    return np.where(high != 0, 32 + bit_length(high.astype(np.uint32)), bit_length(low.astype(np.uint32)))


def reverse_bits(x):
    bits = np.unpackbits(np.ascontiguousarray(x)[:, None].view(np.uint8), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(x.dtype)[:, 0]


def field_insert(field, into, position, length):
    at, count = ((each & np.uint32(0xFF)).astype(into.dtype) for each in (position, length))
    one = into.dtype.type(1)
    mask = ((one << count) - one) << at
    return into & ~mask | field << at & mask


def field_extract(x, position, length):
    bits = x.dtype.itemsize * 8
    at, count = ((each & np.uint32(0xFF)).astype(np.int64) for each in (position, length))
    left = np.maximum(bits - at - count, 0)
    right = left + at if x.dtype.kind == "u" else np.minimum(left + at, bits - 1)
    return np.where(count == 0, x.dtype.type(0), x << left.astype(x.dtype) >> right.astype(x.dtype))


def permute(low, high, selector):
    """Of the eight bytes of two words the four that the selector's digits name; with 8 added, their sign."""
    words = np.stack([low, high], axis=1).view(np.uint8)
    digits = selector[:, None] >> np.uint32([0, 4, 8, 12]) & np.uint32(15)
    chosen = np.take_along_axis(words, (digits & np.uint32(7)).astype(np.intp), axis=1)
    signs = np.where(chosen >= 0x80, np.uint8(0xFF), np.uint8(0))
    return np.where(digits >= 8, signs, chosen).view(np.uint32)[:, 0]


def by_table(a, b, c, table):
    """Any function of three bits: bit (a, b, c) of the table."""
    result = np.zeros_like(a)
    for row in range(8):
        if int(table[0]) >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
LOGICAL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}


def define_comparison(name, kind, compute):
    define(f"setp.{name}.{kind}", "pred", (kind, kind), compute)
    for how in ("and", "or", "xor"):
        define(
            f"setp.{name}.{how}.{kind}",
            "pred",
            (kind, kind, "pred"),
            lambda x, y, p, join=LOGICAL[how], compute=compute: join(compute(x, y), p),
        )


def define_integers(bits):
    signed, unsigned, plain = f"s{bits}", f"u{bits}", f"b{bits}"
    for kind in (signed, unsigned):
        two, three = (kind, kind), (kind, kind, kind)
        define(f"add.{kind}", kind, two, np.add)
        define(f"sub.{kind}", kind, two, np.subtract)
        define(f"min.{kind}", kind, two, np.minimum)
        define(f"max.{kind}", kind, two, np.maximum)
        define(f"mul.lo.{kind}", kind, two, np.multiply)
        define(f"mul.hi.{kind}", kind, two, high_half)
        define(f"mad.lo.{kind}", kind, three, lambda x, y, z: x * y + z)
        define(f"mad.hi.{kind}", kind, three, lambda x, y, z: high_half(x, y) + z)
        define(f"div.{kind}", kind, two, quotient)
        define(f"rem.{kind}", kind, two, remainder)
        define(f"shr.{kind}", kind, (kind, kind if bits == 32 else "u32"), shift(np.right_shift, bits))
        if bits < 64:
            twice = f"{kind[0]}{bits * 2}"
            define(f"mul.wide.{kind}", twice, two, wide(np.multiply, TYPES[twice]))
            define(f"mad.wide.{kind}", twice, (*two, twice), wide(lambda x, y, z: x * y + z, TYPES[twice]))
        if bits > 16:
            define(f"bfe.{kind}", kind, (kind, "u32", "u32"), field_extract)
            # The highest bit that differs from the sign; all ones if there is none.
            define(
                f"bfind.{kind}",
                "u32",
                (kind,),
                lambda x: (bit_length(np.where(x < 0, ~x, x).view(f"u{x.dtype.itemsize}")) - 1).astype(np.uint32),
            )
        for name, compute in {**COMPARISONS, "lo": np.less, "ls": np.less_equal}.items():
            define_comparison(name, kind, compute)
        for name, compute in {"hi": np.greater, "hs": np.greater_equal}.items():
            define_comparison(name, kind, compute)
    define(f"neg.{signed}", signed, (signed,), np.negative)
    define(f"abs.{signed}", signed, (signed,), np.absolute)
    define(f"shl.{plain}", unsigned, (unsigned, unsigned if bits == 32 else "u32"), shift(np.left_shift, bits))
    define(f"shr.{plain}", unsigned, (unsigned, unsigned if bits == 32 else "u32"), shift(np.right_shift, bits))
    for name in ("and", "or", "xor"):
        define(f"{name}.{plain}", plain, (plain, plain), getattr(np, f"bitwise_{name}"))
    define(f"not.{plain}", plain, (plain,), np.invert)
    for name in ("eq", "ne"):
        define_comparison(name, plain, COMPARISONS[name])
    for kind in (signed, unsigned, plain, f"f{bits}"):
        define(f"selp.{kind}", plain, (plain, plain, "pred"), lambda x, y, p: np.where(p, x, y))
    if bits > 16:
        define(f"popc.{plain}", "u32", (plain,), lambda x: np.bitwise_count(x).astype(np.uint32))
        define(f"clz.{plain}", "u32", (plain,), lambda x: (bits - bit_length(x)).astype(np.uint32))
        define(f"brev.{plain}", plain, (plain,), reverse_bits)
        define(f"bfi.{plain}", plain, (plain, plain, "u32", "u32"), field_insert)


for bits in (16, 32, 64):
    define_integers(bits)
for name, compute in LOGICAL.items():
    define(f"{name}.pred", "pred", ("pred",) * compute.nin, compute)
define("prmt.b32", "b32", ("b32", "b32", "b32"), permute)
define("lop3.b32", "b32", ("b32", "b32", "b32", "b32"), by_table)
for direction in "lr":
    for how in ("wrap", "clamp"):
        define(f"shf.{direction}.{how}.b32", "b32", ("b32",) * 3, funnel(direction == "l", how == "wrap"))

# Floating point. The processor itself rounds in all directions, in numpy's loops as well.

_libm = ctypes.CDLL(None)  # of the process, which has it
_libm.fma.restype, _libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
# The values of FE_DOWNWARD, FE_UPWARD and FE_TOWARDZERO in fenv.h; 0 is to nearest. For other processors no instruction
# with another direction is known here.
_DIRECTIONS = {
    "x86_64": {"rm": 0x400, "rp": 0x800, "rz": 0xC00},
    "aarch64": {"rm": 0x800000, "rp": 0x400000, "rz": 0xC00000},
}.get(platform.machine(), {})
MODES = ("rn", *_DIRECTIONS)
INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@contextmanager
def rounding(mode):
    if mode != "rn":
        _libm.fesetround(_DIRECTIONS[mode])
    try:
        yield
    finally:
        if mode != "rn":
            _libm.fesetround(0)


def canonical(result):
    """The result with 0x7FFFFFFF for NaN, or what is like it in other widths, as a GPU makes them."""
    nan = result != result
    if np.count_nonzero(nan):
        bits = f"u{result.dtype.itemsize}"
        np.copyto(result.view(bits), np.iinfo(bits).max >> 1, where=nan)
    return result


def rounded(mode, compute):
    def round_once(*x):
        with rounding(mode):
            return canonical(compute(*x))

    return round_once


def fused32(mode):
    """x * y + z of float32, rounded once.

    The product is exact in float64. Their sum is rounded to odd there: towards zero, and the last bit is set if that
    changed it. Float64 has more than twice the bits and two, so rounding this again to float32 makes no difference.
    """

    def compute(x, y, z):
        product, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
        with rounding("rp"):
            above = product + z
        with rounding("rz"):
            total = product + z
        with rounding("rm"):
            below = product + z
        total = np.where(below == above, below if mode == "rm" else total, total)  # the sign of zero
        total.view(np.uint64)[...] |= (above != below) & np.isfinite(total)
        with rounding(mode):
            return canonical(total.astype(np.float32))

    return compute


def fused64(mode):
    each = np.frompyfunc(_libm.fma, 3, 1)

    def compute(x, y, z):
        with rounding(mode):
            return canonical(each(x, y, z).astype(np.float64))

    return compute


def extreme(pick, spreads_nan):
    """min and max: of a number and NaN the number, unless NaN spreads, and -0 is below +0."""

    def compute(x, y):
        result = pick(x, y)
        bits = f"u{x.dtype.itemsize}"
        of_zeros = np.bitwise_or if pick is np.fmin else np.bitwise_and
        np.copyto(result.view(bits), of_zeros(x.view(bits), y.view(bits)), where=(x == 0) & (y == 0))
        if spreads_nan:
            result[(x != x) | (y != y)] = np.nan
        return canonical(result)

    return compute


def ordered(compute):
    return {np.not_equal: lambda x, y: (x < y) | (x > y)}.get(compute, compute)


def unordered(name):
    """Also true of NaN: the opposite is not true."""
    opposite = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}[name]
    compute = ordered(COMPARISONS[opposite])
    return lambda x, y: ~compute(x, y)


def flushed(x):
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def define_floats(bits):
    kind, plain = f"f{bits}", f"b{bits}"
    two = (kind, kind)
    for mode in MODES:
        for name, compute in {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}.items():
            define(f"{name}.{mode}.{kind}", kind, two, rounded(mode, compute))
        define(f"rcp.{mode}.{kind}", kind, (kind,), rounded(mode, np.reciprocal))
        define(f"sqrt.{mode}.{kind}", kind, (kind,), rounded(mode, np.sqrt))
        define(f"fma.{mode}.{kind}", kind, (kind,) * 3, fused32(mode) if bits == 32 else fused64(mode))
    for name, compute in COMPARISONS.items():
        define_comparison(name, kind, ordered(compute))
        define_comparison(f"{name}u", kind, unordered(name))
    define_comparison("nan", kind, lambda x, y: (x != x) | (y != y))
    define_comparison("num", kind, lambda x, y: (x == x) & (y == y))
    sign = TYPES[plain].type(1 << (bits - 1))
    define(f"abs.{kind}", plain, (plain,), lambda x: x & ~sign)
    define(f"neg.{kind}", plain, (plain,), lambda x: x ^ sign)
    for name, pick in {"min": np.fmin, "max": np.fmax}.items():
        define(f"{name}.{kind}", kind, two, extreme(pick, False))
        if bits == 32:
            define(f"{name}.NaN.{kind}", kind, two, extreme(pick, True))
    for mode, compute in INTEGRAL.items():
        define(f"cvt.{mode}.{kind}.{kind}", kind, (kind,), rounded("rn", compute))


define_floats(32)
define_floats(64)
APPROXIMATIONS["rcp.approx.f32"] = ("f32", OPERATIONS["rcp.rn.f32"].compute)
APPROXIMATIONS["rcp.approx.ftz.f32"] = ("f32", lambda x: flushed(OPERATIONS["rcp.rn.f32"].compute(flushed(x))))

# Conversions.


def to_float16(mode):
    def compute(x):
        near = x.astype(np.float16)
        if mode == "rz":  # the next one towards zero, where the nearest is larger or even infinite
            near.view(np.uint16)[...] -= np.abs(near.astype(x.dtype)) > np.abs(x)
        return canonical(near)

    return compute


def to_integer(mode, dtype):
    """Numbers out of range become the nearest that there is, NaN becomes 0."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max

    def compute(x):
        value = INTEGRAL[mode](x.astype(np.float64))
        below, above = value <= float(low), value >= float(high)
        inside = np.where(below | above | (value != value), 0, value).astype(dtype)
        return np.where(below, dtype.type(low), np.where(above, dtype.type(high), inside))

    return compute


def define_conversions():
    integers = [f"{sign}{bits}" for sign in "us" for bits in (8, 16, 32, 64)]
    for kind in integers:
        for to in integers:
            define(f"cvt.{to}.{kind}", to, (kind,), lambda x, dtype=TYPES[to]: x.astype(dtype))
        for float_ in ("f32", "f64"):
            define(f"cvt.rn.{float_}.{kind}", float_, (kind,), lambda x, dtype=TYPES[float_]: x.astype(dtype))
            for mode in INTEGRAL:
                define(f"cvt.{mode}.{kind}.{float_}", kind, (float_,), to_integer(mode, TYPES[kind]))
    for mode in MODES:
        define(f"cvt.{mode}.f32.f64", "f32", ("f64",), rounded(mode, lambda x: x.astype(np.float32)))
    define("cvt.f64.f32", "f64", ("f32",), lambda x: canonical(x.astype(np.float64)))
    define("cvt.f32.f16", "f32", ("f16",), lambda x: canonical(x.astype(np.float32)))
    for mode in ("rn", "rz"):
        define(f"cvt.{mode}.f16.f32", "f16", ("f32",), to_float16(mode))


define_conversions()

# What an atomic leaves in memory, of what was there and the operand; and what redux makes of a warp's operands.
COMBINATIONS = {
    **{f"{name}.{kind}": getattr(operator, f"{name}_") for name in ("and", "or") for kind in ("b32", "b64")},
    **{f"xor.{kind}": operator.xor for kind in ("b32", "b64")},
    **{f"exch.{kind}": lambda old, new: new for kind in ("b32", "b64")},
    **{f"cas.{kind}": lambda old, expected, new: np.where(old == expected, new, old) for kind in ("b32", "b64")},
    **{f"add.{kind}": operator.add for kind in ("u32", "s32", "u64")},
    **{f"min.{kind}": np.minimum for kind in ("u32", "s32", "u64", "s64")},
    **{f"max.{kind}": np.maximum for kind in ("u32", "s32", "u64", "s64")},
}
