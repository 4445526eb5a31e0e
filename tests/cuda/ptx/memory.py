# SPDX-License-Identifier: Apache-2.0
"""The spaces that a kernel's loads and stores go to. Each access is checked: alignment, bounds, and that every byte
belongs to an array or an allocation.
"""

import ctypes

import numpy as np

from .module import PtxError

# Where the spaces lie among generic addresses. Global memory is the host's, below all of them.
WINDOWS = {"global": 0, "shared": 1 << 56, "local": 2 << 56, "param": 3 << 56}
OFFSET = np.uint64((1 << 56) - 1)  # within a window
UNWRITTEN = 0xA5


class Space:
    """Memory of one space: ``copies`` of ``size`` bytes each, as each block has its own shared memory.

    ``valid`` has a 1 for each byte of a copy that may be touched; ``begin`` is the address of the first byte.
    """

    def __init__(self, name, data, valid, begin=0, copies=1):
        self.name, self._begin = name, np.uint64(begin)
        self._data, self._valid = data, valid
        self._size = len(data) // copies
        self._views = {}

    @classmethod
    def of_layout(cls, name, layout, copies):
        """Memory for the arrays of a kernel."""
        size = -(-layout.size // 16) * 16
        valid = np.zeros(size, np.uint8)
        for begin, count in layout.arrays.values():
            valid[begin : begin + count] = 1
        return cls(name, np.full(size * copies, UNWRITTEN, np.uint8), np.tile(valid, copies), copies=copies)

    @classmethod
    def of_host(cls, address, valid_address, size):
        """The host's memory from an address on, whose valid bytes are marked in as much memory from the other on."""
        data, valid = (
            np.frombuffer((ctypes.c_uint8 * size).from_address(at), np.uint8) for at in (address, valid_address)
        )
        return cls("global", data, valid, begin=address)

    def forget(self):
        self._data[...] = UNWRITTEN

    def write(self, data):
        self._data[: len(data)] = np.frombuffer(data, np.uint8)

    def elements(self, dtype):
        """The memory as elements of a dtype, and for each the bytes that are valid."""
        if dtype not in self._views:
            self._views[dtype] = self._data.view(dtype), self._valid.view(f"u{dtype.itemsize}")
        return self._views[dtype]

    def find(self, addresses, owners, dtype, count):
        """(the memory as elements, the index of each access's first element) of ``count`` elements at each address."""
        size = dtype.itemsize
        low = addresses - self._begin if self._begin else addresses
        if np.count_nonzero(low & np.uint64(size * count - 1)):
            raise PtxError(f"a misaligned {self.name} access of {size * count} bytes")
        if len(low) and int(low.max()) + size * count > self._size:
            raise PtxError(f"a {self.name} access outside of all memory")
        index = low.view(np.int64) // size
        if owners is not None:
            index += owners * (self._size // size)
        elements, valid = self.elements(dtype)
        whole = int("01" * size, 16)
        for k in range(count):
            if np.count_nonzero(valid[index + k] != whole):
                raise PtxError(f"a {self.name} access of {size * count} bytes, not all of which are in an array")
        return elements, index
