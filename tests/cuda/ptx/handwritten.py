# SPDX-License-Identifier: Apache-2.0
"""Small kernels written by hand, for tests of the executor itself."""

import numpy as np

from .arithmetic import APPROXIMATIONS, OPERATIONS
from .executor import Executor
from .memory import Space
from .module import TYPES, Module

BEGIN = 0x7F0000000000  # the address where the arrays lie
GAP = 64  # bytes between them that no kernel may touch
REGISTERS = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<32>; .reg .b64 %rd<32>;"


def launch(body, *arrays, block=32, blocks=1, choices=None, declarations=""):
    """What a kernel makes of the arrays; their addresses are in %rd20, %rd21 and so on, the number of a thread of the
    launch is in %r20.
    """
    begins, end = [], GAP
    for array in arrays:
        begins.append(end)
        end += -(-array.nbytes // GAP) * GAP + GAP
    data, valid = np.zeros(end, np.uint8), np.zeros(end, np.uint8)
    for begin, array in zip(begins, arrays, strict=True):
        data[begin : begin + array.nbytes] = array.view(np.uint8).ravel()
        valid[begin : begin + array.nbytes] = 1
    parameters = ", ".join(f".param .u64 array{k}" for k in range(len(arrays)))
    loads = "\n".join(f"ld.param.u64 %rd{20 + k}, [array{k}];" for k in range(len(arrays)))
    numbers = "mov.u32 %r21, %ctaid.x; mov.u32 %r22, %ntid.x; mov.u32 %r23, %tid.x; mad.lo.s32 %r20, %r21, %r22, %r23;"
    text = f".version 9.0\n.target sm_80\n.address_size 64\n.visible .entry test({parameters})\n{{"
    text += f"{REGISTERS}{declarations}\n{loads}\n{numbers}\n{body}\nret;\n}}"
    executor = Executor(Module(text), Space("global", data, valid, begin=BEGIN), choices)
    addresses = np.array([BEGIN + begin for begin in begins], np.uint64)
    executor.launch("test", blocks, block, lambda size: addresses.tobytes()[:size])
    return [
        data[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape).copy()
        for begin, array in zip(begins, arrays, strict=True)
    ]


def element(array, size, to="%rd19"):
    """Instructions for the address of a thread's element of an array."""
    return f"mul.wide.u32 {to}, %r20, {size}; add.u64 {to}, %rd{20 + array}, {to};"


def register(number, bits):
    return {8: "%h", 16: "%h", 32: "%r", 64: "%rd"}[bits] + str(number)


def compute(opcode, *operands, choices=None):
    """What an instruction makes of arrays of operands, by a kernel with a thread for each element."""
    if opcode in APPROXIMATIONS:
        kind = APPROXIMATIONS[opcode][0]
        result, sources = kind, (kind,)
    else:
        result, sources, _ = OPERATIONS[opcode]
    count = len(operands[0])
    arrays, body, names = [], "", []
    for k, (kind, values) in enumerate(zip(sources, operands, strict=True)):
        dtype = TYPES["u8" if kind == "pred" else kind]
        array = np.zeros(-(-count // 32) * 32, dtype)
        array[:count] = values
        bits = dtype.itemsize * 8
        arrays.append(array)
        body += f"{element(k, dtype.itemsize)} ld.global.b{bits} {register(k + 1, bits)}, [%rd19];"
        if kind == "pred":
            body += f"setp.ne.u16 %p{k + 1}, {register(k + 1, bits)}, 0;"
        names.append(f"%p{k + 1}" if kind == "pred" else register(k + 1, bits))
    dtype = TYPES["u32" if result == "pred" else result]
    bits = dtype.itemsize * 8
    to = "%p8" if result == "pred" else register(8, bits)
    body += f"{opcode} {to}, {', '.join(names)};"
    if result == "pred":
        body += "selp.u32 %r8, 1, 0, %p8;"
    body += f"{element(len(arrays), dtype.itemsize)} st.global.b{bits} [%rd19], {register(8, bits)};"
    arrays.append(np.zeros(len(arrays[0]), dtype))
    made = launch(body, *arrays, block=len(arrays[0]), choices=choices)[-1][:count]
    return made != 0 if result == "pred" else made
