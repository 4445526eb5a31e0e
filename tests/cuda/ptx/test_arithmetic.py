# SPDX-License-Identifier: Apache-2.0
"""What the executor computes for each instruction is exact: against rational numbers, or Python's integers."""

from fractions import Fraction

import numpy as np
import pytest

from .arithmetic import MODES, OPERATIONS
from .executor import Choices
from .handwritten import compute
from .module import TYPES


@pytest.fixture(autouse=True)
def no_warnings():
    """Numbers overflow here on purpose."""
    with np.errstate(all="ignore"):
        yield


WAYS = pytest.mark.parametrize("mode", MODES)
FLOATS = pytest.mark.parametrize("kind", ["f32", "f64"])


def some_floats(kind, seed):
    """Numbers of all magnitudes, and those around which rules change."""
    dtype, random = TYPES[kind], np.random.default_rng(seed)
    info = np.finfo(dtype)
    bits = random.integers(0, 2 ** (8 * dtype.itemsize), 60, dtype=f"u{dtype.itemsize}").view(dtype)
    near = (random.standard_normal(60) * 2.0 ** random.integers(-30, 30, 60)).astype(dtype)
    special = np.array([1, -1, 1.5, info.max, -info.max, info.tiny, info.smallest_subnormal, 1 + info.eps, 3], dtype)
    return random.permutation(np.concatenate([bits[np.isfinite(bits)], near, special]))[:100]


def value(x):
    """A float as a rational number; of infinity what the next larger exponent would be."""
    if np.isinf(x):
        top = Fraction(2) ** (128 if x.dtype.itemsize == 4 else 1024)
        return top if x > 0 else -top
    return Fraction(float(x))


def round_exactly(sign_of_rest, guess, mode):
    """The float next to a real number, of which ``sign_of_rest(value)`` is the sign of its distance from a value.

    The guess must be one of the floats next to it, or next to these.
    """
    infinity = guess.dtype.type(np.inf)
    around = [np.nextafter(np.nextafter(guess, -infinity), -infinity)]
    for _ in range(4):
        around.append(np.nextafter(around[-1], infinity))
    below = [x for x in around if sign_of_rest(value(x)) >= 0]
    assert 0 < len(below) < len(around) or np.isinf(around[-1]), f"{guess} is far from the result"
    down = below[-1]
    if sign_of_rest(value(down)) == 0 and np.isfinite(down):
        return down
    up = np.nextafter(down, infinity)
    if mode == "rn":
        middle = sign_of_rest((value(down) + value(up)) / 2)
        even = down if int(down.view(f"u{down.dtype.itemsize}")) % 2 == 0 else up
        return even if middle == 0 else up if middle > 0 else down
    positive = sign_of_rest(Fraction(0)) > 0
    return {"rm": down, "rp": up, "rz": down if positive else up}[mode]


def sign(x):
    return (x > 0) - (x < 0)


EXACT = {
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul": (2, lambda a, b: a * b),
    "div": (2, lambda a, b: a / b),
    "fma": (3, lambda a, b, c: a * b + c),
    "rcp": (1, lambda a: 1 / a),
}


@WAYS
@FLOATS
@pytest.mark.parametrize("name", EXACT)
def test_results_are_rounded_once_in_the_direction_of_the_mode(name, kind, mode):
    count, exact = EXACT[name]
    operands = [some_floats(kind, seed) for seed in range(count)]
    if name == "fma":  # also where nearly all of the product cancels
        operands[2][::2] = -(operands[0] * operands[1]).astype(TYPES[kind])[::2]
        operands = [np.where(np.isfinite(operands[2]), each, TYPES[kind].type(1)) for each in operands]
    results = compute(f"{name}.{mode}.{kind}", *operands)
    for result, *numbers in zip(results, *operands, strict=True):
        if name in ("div", "rcp") and numbers[-1] == 0:
            continue
        beyond = value(TYPES[kind].type(np.inf)) - 1  # rounded as all larger numbers are
        real = max(-beyond, min(exact(*(Fraction(float(x)) for x in numbers)), beyond))
        if real == 0:
            assert result == 0
            continue
        guess = result if np.isfinite(result) else np.finfo(TYPES[kind]).max * TYPES[kind].type(np.sign(result))
        assert result == round_exactly(lambda x, real=real: sign(real - x), guess, mode), numbers


@WAYS
@FLOATS
def test_square_roots_are_rounded_once(kind, mode):
    numbers = np.abs(some_floats(kind, 0))
    for result, x in zip(compute(f"sqrt.{mode}.{kind}", numbers), numbers, strict=True):
        square = Fraction(float(x))
        expected = round_exactly(lambda y, square=square: 1 if y < 0 else sign(square - y * y), result, mode)
        assert result == expected, x


@WAYS
def test_sums_that_cancel_have_the_sign_of_the_mode(mode):
    one, zero = np.float32([1, -1, 0, -0.0]), np.float32([-1, 1, -0.0, -0.0])
    expected = [mode == "rm", mode == "rm", mode == "rm", True]
    for kind in ("f32", "f64"):
        assert np.signbit(compute(f"add.{mode}.{kind}", one, zero)).tolist() == expected
        assert np.signbit(compute(f"fma.{mode}.{kind}", one, np.ones(4), zero)).tolist() == expected


@WAYS
def test_a_float64_is_rounded_to_float32_in_the_direction_of_the_mode(mode):
    numbers = some_floats("f64", 0)
    numbers = numbers[np.abs(numbers) < 1e38]
    for result, x in zip(compute(f"cvt.{mode}.f32.f64", numbers), numbers, strict=True):
        exact = Fraction(float(x))
        assert result == round_exactly(lambda y, exact=exact: sign(exact - y), result, mode), x


def test_a_nan_that_arithmetic_makes_has_one_pattern():
    nan, inf = np.uint32([0xFFC12345]).view(np.float32), np.float32([np.inf])
    for opcode, *operands in (
        ("add.rn.f32", nan, inf),
        ("sub.rp.f32", inf, inf),
        ("mul.rn.f32", inf, np.float32([0])),
        ("fma.rn.f32", nan, inf, inf),
        ("sqrt.rn.f32", -inf),
        ("min.f32", nan, nan),
        ("max.NaN.f32", nan, inf),
        ("cvt.rn.f32.f64", np.float64(nan)),
    ):
        assert compute(opcode, *operands).view(np.uint32)[0] == 0x7FFFFFFF, opcode
    assert compute("cvt.rz.f16.f32", nan).view(np.uint16)[0] == 0x7FFF


def test_extremes_skip_nan_and_order_zeros():
    a, b = np.float32([np.nan, 1, 0.0, -0.0, 2]), np.float32([1, np.nan, -0.0, 0.0, 3])
    least, largest = compute("min.f32", a, b), compute("max.f32", a, b)
    assert least.view(np.int32).tolist() == np.float32([1, 1, -0.0, -0.0, 2]).view(np.int32).tolist()
    assert largest.view(np.int32).tolist() == np.float32([1, 1, 0.0, 0.0, 3]).view(np.int32).tolist()


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_with_nan(name):
    """False, and those whose name ends in u true."""
    a, b = np.float32([np.nan, 1, np.nan, 1, 2, 3]), np.float32([1, np.nan, np.nan, 2, 2, 2])
    ordered = [False] * 3 + [
        {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[name]
        for x, y in ((1, 2), (2, 2), (3, 2))
    ]
    assert compute(f"setp.{name}.f32", a, b).tolist() == ordered
    assert compute(f"setp.{name}u.f32", a, b).tolist() == [True] * 3 + ordered[3:]
    assert compute(f"setp.{name}.and.f32", a, b, [True] * 5 + [False]).tolist() == [*ordered[:5], False]


def test_all_float16_become_their_float32_and_back():
    bits = np.arange(65536, dtype=np.uint16)
    numbers = bits.view(np.float16)
    exact = np.where(np.isnan(numbers), np.uint16(0x7FFF), bits)
    wide = compute("cvt.f32.f16", numbers)
    assert np.array_equal(np.isnan(wide), np.isnan(numbers))
    assert np.array_equal(wide[~np.isnan(wide)], numbers[~np.isnan(numbers)])
    for mode in ("rn", "rz"):
        assert np.array_equal(compute(f"cvt.{mode}.f16.f32", wide).view(np.uint16), exact)


def test_a_float32_is_cut_off_to_a_float16():
    numbers = np.concatenate([some_floats("f32", seed) for seed in range(9)])
    numbers = np.concatenate([numbers, np.float32([65504, 65519, 65520, 7e4, 6e-8, 5e-8, 6.09e-5])])
    for result, x in zip(compute("cvt.rz.f16.f32", numbers), numbers, strict=True):
        magnitude, above = abs(Fraction(float(result))), np.nextafter(np.abs(result), np.float16(np.inf))
        assert magnitude <= abs(Fraction(float(x)))
        assert np.isinf(above) or abs(Fraction(float(x))) < Fraction(float(above))
        assert np.signbit(result) == np.signbit(x)


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_floats_become_the_nearest_integer_in_range(mode):
    numbers = np.float32([0.5, 1.5, -0.5, -1.5, 2.7, -2.7, np.nan, np.inf, -np.inf, 3e9, -3e9])
    whole = {
        "rni": [0, 2, 0, -2, 3, -3],
        "rzi": [0, 1, 0, -1, 2, -2],
        "rmi": [0, 1, -1, -2, 2, -3],
        "rpi": [1, 2, 0, -1, 3, -2],
    }[mode]
    low, high = -(2**31), 2**31 - 1
    assert compute(f"cvt.{mode}.s32.f32", numbers).tolist() == [*whole, 0, high, low, high, low]
    positive = [max(x, 0) for x in whole]
    assert compute(f"cvt.{mode}.u32.f32", numbers).tolist() == [*positive, 0, 2**32 - 1, 0, 3 * 10**9, 0]
    assert compute(f"cvt.{mode}.u64.f64", [2.0**63, 2.0**64]).tolist() == [2**63, 2**64 - 1]


@pytest.mark.parametrize("ulps", [-1, 0, 1, "random"])
def test_an_approximate_reciprocal_is_off_by_the_chosen_ulps(ulps):
    numbers = np.float32(np.arange(1, 3000))
    exact = compute("rcp.rn.f32", numbers)
    made = compute("rcp.approx.ftz.f32", numbers, choices=Choices(reciprocal=str(ulps)))
    off = made.view(np.int32) - exact.view(np.int32)
    assert set(off.tolist()) == ({-1, 0, 1} if ulps == "random" else {ulps})


# Integers: opcode to what Python computes of its operands, before the result is cut off to its type.


def divided(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(position, length, bits):
    """The bits of a field, which may reach beyond the word."""
    return ((1 << (length & 255)) - 1 << (position & 255)) & (1 << bits) - 1


def extracted(x, position, length, bits):
    """bfe extends a signed field by its highest bit, or by the highest bit of the word, where it reaches further."""
    position, length = position & 255, length & 255
    if length == 0:
        return 0
    top = min(position + length - 1, bits - 1)
    kept = (x & (1 << bits) - 1) >> position & field(0, min(length, max(bits - position, 0)), bits)
    negative = x >> top & 1  # of a negative number all higher bits are set
    return kept - (1 << max(top - position + 1, 0)) if negative else kept


INTEGERS = {
    "add": lambda a, b, bits: a + b,
    "sub": lambda a, b, bits: a - b,
    "mul.lo": lambda a, b, bits: a * b,
    "mul.hi": lambda a, b, bits: a * b >> bits,
    "mul.wide": lambda a, b, bits: a * b,
    "mad.lo": lambda a, b, c, bits: a * b + c,
    "mad.wide": lambda a, b, c, bits: a * b + c,
    "div": lambda a, b, bits: divided(a, b),
    "rem": lambda a, b, bits: a - divided(a, b) * b,
    "min": lambda a, b, bits: min(a, b),
    "max": lambda a, b, bits: max(a, b),
    "shr": lambda a, n, bits: a >> min(n & 2**32 - 1, bits),
    "neg": lambda a, bits: -a,
    "abs": lambda a, bits: abs(a),
    "bfind": lambda a, bits: (a if a >= 0 else ~a).bit_length() - 1,
}
PLAIN = {
    "and": lambda a, b, bits: a & b,
    "or": lambda a, b, bits: a | b,
    "xor": lambda a, b, bits: a ^ b,
    "not": lambda a, bits: ~a,
    "shl": lambda a, n, bits: a << min(n, bits),
    "popc": lambda a, bits: a.bit_count(),
    "clz": lambda a, bits: bits - a.bit_length(),
    "brev": lambda a, bits: int(f"{a:0{bits}b}"[::-1], 2),
    "bfi": lambda a, b, p, n, bits: b & ~field(p, n, bits) | a << (p & 255) & field(p, n, bits),
}
WORDS = {
    "prmt.b32": lambda a, b, s: sum(picked(a | b << 32, s >> 4 * k & 15) << 8 * k for k in range(4)),
    "lop3.b32": lambda a, b, c, t: sum(
        (t >> (4 * (a >> k & 1) + 2 * (b >> k & 1) + (c >> k & 1)) & 1) << k for k in range(32)
    ),
    "shf.l.wrap.b32": lambda low, high, n: (high << 32 | low) << (n & 31) >> 32,
    "shf.r.wrap.b32": lambda low, high, n: (high << 32 | low) >> (n & 31),
    "shf.l.clamp.b32": lambda low, high, n: (high << 32 | low) << min(n, 32) >> 32,
    "shf.r.clamp.b32": lambda low, high, n: (high << 32 | low) >> min(n, 32),
}


def picked(both, digit):
    byte = both >> 8 * (digit & 7) & 0xFF
    return byte if digit < 8 else 0xFF * (byte >> 7)


def some_integers(dtype, seed):
    info, random = np.iinfo(dtype), np.random.default_rng(seed)
    values = random.integers(info.min, info.max, 40, dtype=dtype, endpoint=True)
    small = random.integers(0, 70, 40).astype(dtype)
    edges = np.array([info.min, info.max, 0, 1, info.max // 2], dtype)
    return random.permutation(np.concatenate([values, small, edges, info.max - edges]))


def check_integers(opcode, exact, *more):
    """The instruction against Python's integers, where these can do it: not through division by zero."""
    result, sources, _ = OPERATIONS[opcode]
    operands = [some_integers(TYPES[kind], seed) for seed, kind in enumerate(sources)]
    if opcode.startswith("lop3"):
        operands[3][:] = 0xCA
    if opcode.startswith(("div", "rem")):
        operands[1][operands[1] == 0] = 1
    made = compute(opcode, *operands)
    expected = [exact(*(int(x) for x in row), *more) for row in zip(*operands, strict=True)]
    bits = TYPES[result].itemsize * 8
    assert [int(x) % 2**bits for x in made] == [x % 2**bits for x in expected], opcode


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers_wrap_shift_and_divide_as_specified(kind):
    bits = int(kind[1:])
    names = set(INTEGERS) - ({"mul.wide", "mad.wide"} if bits == 64 else set()) - ({"bfind"} if bits == 16 else set())
    for name in sorted(names - ({"neg", "abs"} if kind[0] == "u" else set())):
        check_integers(f"{name}.{kind}", INTEGERS[name], bits)
    if bits > 16:
        check_integers(f"bfe.{kind}", extracted if kind[0] == "s" else extracted_unsigned, bits)


def extracted_unsigned(x, position, length, bits):
    return x >> (position & 255) & (1 << (length & 255)) - 1


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bits_are_moved_and_counted_as_specified(bits):
    for name in sorted(set(PLAIN) - ({"popc", "clz", "brev", "bfi"} if bits == 16 else set())):
        check_integers(f"{name}.b{bits}", PLAIN[name], bits)


@pytest.mark.parametrize("opcode", WORDS)
def test_words_are_put_together_as_specified(opcode):
    check_integers(opcode, WORDS[opcode])


def test_integers_are_extended_by_their_own_type():
    check_integers("cvt.s64.s32", lambda x: x)
    check_integers("cvt.u64.u32", lambda x: x)
    check_integers("cvt.u16.u32", lambda x: x)
    check_integers("cvt.s32.s8", lambda x: x)
