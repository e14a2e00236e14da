"""LMDB's pages read where they lie: the records of many names in one call, half of what as many `get`s take.

A transaction of the environment holds the state that is read: as long as it is open, LMDB writes none of that state's
pages again. The kernel goes down the tree for all names at once, one comparison each in turn, so that the processor
waits for many pages of memory together instead of one after the other.

Invariants
- What is read is what `get` gives in the same transaction, or nothing is read (None) and `get` is to be asked.
- The format is LMDB's version 1 with 64-bit words; any other is not read here.

A state's root stands in one of two head pages, which commits fill in turn. The head of state T is written over only
after that of T + 1 is whole in the other one: it was read whole if the other one is not that of T + 1 even afterwards.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import int64, njit, types, uint8, uint64
from numba.extending import intrinsic

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

_HEAD = struct.Struct("<16xIIQQI")
"""Of a head page: magic, version, …, page size."""
_MAGIC, _VERSION = 0xBEEFC0DE, 1
# Offsets in a head page: depth of the tree (the upper quarter of a word), its root, last page, number of the state.
_DEPTH, _ROOT, _LAST, _STATE = 88, 128, 136, 144
# Offsets in any other page: its kind, the end of the places of its nodes, and those places.
_KIND, _LOWER, _PLACES = 10, 12, 16
_BRANCH, _LEAF = 1, 2
_MARGIN = 8
"""Bytes before the first name that may be read, and mean nothing."""
_LONGEST_INTEGER = 22
"""Bytes of an integer's name behind its prefix: `i-9223372036854775808;`."""


def _load(bits: int, of: types.Integer) -> Any:
    """A function of an address: the number there, least byte first."""

    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.load(builder.inttoptr(args[0], ir.IntType(bits).as_pointer()), align=1)
            return value if bits == 64 else builder.zext(value, ir.IntType(64))

        return of(int64), generate

    return load


_number, _small, _byte = _load(64, int64), _load(16, int64), _load(8, int64)


@intrinsic
def _word(typing: Any, address: Any) -> Any:
    """The 8 bytes at an address in the order in which bytes are compared."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bswap(builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), align=1))

    return uint64(int64), generate


@intrinsic
def _in_order(typing: Any, address: Any) -> Any:
    """The number at an address, read before all that is read after it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "acquire", 8)

    return int64(int64), generate


@intrinsic
def _prefetch(typing: Any, address: Any) -> Any:
    """Have the memory at an address brought into the processor's cache."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(function, [pointer, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(int64), generate


@njit(cache=True, nogil=True)
def _after(a: int, size_a: int, b: int, size_b: int) -> bool:
    """Whether the name at address `a` comes after the one at `b`."""
    both = min(size_a, size_b)
    for i in range(0, both - 7, 8):
        x, y = _word(a + i), _word(b + i)
        if x != y:
            return x > y
    if both & 7:
        # The last 8 bytes of both, shifted so that those compared already are gone: nothing behind a name is read.
        gone = np.uint64(64 - 8 * (both & 7))
        x, y = _word(a + both - 8) << gone, _word(b + both - 8) << gone
        if x != y:
            return x > y
    return size_a > size_b


@njit(cache=True, nogil=True)
def _narrow(pages: Ints, at: Ints, left: Ints, names: int, starts: Ints) -> bool:
    """Find in each page the last node that is not after the name, taking the first for such; False: an empty page."""
    most = 0
    for i in range(len(pages)):
        at[i], left[i] = 0, (_small(pages[i] + _LOWER) - _PLACES) >> 1
        if left[i] < 1:
            return False
        most = max(most, left[i])
        _prefetch(pages[i] + _small(pages[i] + _PLACES + 2 * (left[i] >> 1)) + 8)
    while most > 1:
        most -= most >> 1
        for i in range(len(pages)):
            half = left[i] >> 1
            if half:
                node = pages[i] + _small(pages[i] + _PLACES + 2 * (at[i] + half))
                is_after = _after(node + 8, _small(node + 6), names + starts[i], starts[i + 1] - starts[i])
                at[i] += half * (1 - is_after)  # no branch, which could not be foreseen
                left[i] -= half
                _prefetch(pages[i] + _small(pages[i] + _PLACES + 2 * (at[i] + (left[i] >> 1))) + 8)
    return True


@njit(cache=True, nogil=True)
def _find(base: int, page_size: int, state: int, names: Bytes, starts: Ints, out: Bytes, nothing: Bytes) -> bool:
    head, other = base + (state & 1) * page_size, base + ((state + 1) & 1) * page_size
    is_there = _in_order(head + _STATE) == state
    depth, root = _in_order(head + _DEPTH) >> 48, _in_order(head + _ROOT)
    last = _in_order(head + _LAST)
    if not is_there or _in_order(other + _STATE) > state or not 2 <= root <= last:
        return False
    name, n, size = names.ctypes.data, len(starts) - 1, out.shape[1]
    pages, at, left = np.full(n, base + root * page_size), np.empty(n, np.int64), np.empty(n, np.int64)
    for level in range(depth):
        kind = _LEAF if level == depth - 1 else _BRANCH
        for i in range(n):
            if _small(pages[i] + _KIND) != kind:
                return False
        if not _narrow(pages, at, left, name, starts):
            return False
        if kind == _BRANCH:
            for i in range(n):
                page = _number(pages[i] + _small(pages[i] + _PLACES + 2 * at[i])) & 0xFFFF_FFFF_FFFF
                if not 2 <= page <= last:
                    return False
                pages[i] = base + page * page_size
                _prefetch(pages[i])
    for i in range(n):
        node = pages[i] + _small(pages[i] + _PLACES + 2 * at[i])
        long, mine, longs = _small(node + 6), name + starts[i], starts[i + 1] - starts[i]
        if long != longs or _after(node + 8, long, mine, long) or _after(mine, long, node + 8, long):
            out[i] = nothing
            continue
        if _number(node) & 0xFFFF_FFFF_FFFF != size:  # of another size, or on pages of its own
            return False
        for j in range(size):
            out[i, j] = _byte(node + 8 + long + j)
    return True


@njit(cache=True, nogil=True)
def _named(names: Bytes, starts: Ints, prefix: Bytes, keys: Ints) -> None:
    """Names of integers as `online_records.entity_key` writes them, behind the prefix."""
    end = _MARGIN
    for i in range(len(keys)):
        starts[i] = end
        names[end : end + len(prefix)] = prefix
        end += len(prefix)
        names[end] = 105  # i
        end += 1
        rest = np.uint64(keys[i])
        if keys[i] < 0:
            names[end] = 45  # -
            end += 1
            rest = np.uint64(0) - rest
        digits, more = 1, rest // np.uint64(10)
        while more:
            digits, more = digits + 1, more // np.uint64(10)
        for j in range(end + digits - 1, end - 1, -1):
            names[j] = 48 + rest % np.uint64(10)
            rest //= np.uint64(10)
        end += digits
        names[end] = 59  # ;
        end += 1
    starts[len(keys)] = end


_READ = types.Array(uint8, 1, "C", readonly=True)
_INTS = types.Array(int64, 1, "C", readonly=True)
_OUT = types.Array(uint8, 2, "C")


@njit([types.boolean(int64, int64, int64, _READ, _INTS, _OUT, _READ)], cache=True, nogil=True)
def _of_names(base: int, page_size: int, state: int, names: Bytes, starts: Ints, out: Bytes, nothing: Bytes) -> bool:
    return _find(base, page_size, state, names, starts, out, nothing)


@njit([types.boolean(int64, int64, int64, _READ, _INTS, _OUT, _READ)], cache=True, nogil=True)
def _of_integers(base: int, page_size: int, state: int, prefix: Bytes, keys: Ints, out: Bytes, nothing: Bytes) -> bool:
    names = np.empty(_MARGIN + len(keys) * (len(prefix) + _LONGEST_INTEGER), np.uint8)
    starts = np.empty(len(keys) + 1, np.int64)
    _named(names, starts, prefix, keys)
    return _find(base, page_size, state, names, starts, out, nothing)


class Pages:
    """An environment's file, mapped; threads may share it."""

    fewest = 4
    """Names from which on one call for all takes less than a `get` each."""

    def __init__(self, base: int, page_size: int) -> None:
        self._base = base
        self._page_size = page_size

    @classmethod
    def of(cls, file: Path, map_bytes: int) -> Pages | None:
        """Map an environment's data file; None: its format is not read here, or the address space is limited.

        Args:
            file: the file.
            map_bytes: size to which it may grow while it is mapped.
        """
        with file.open("rb") as opened:
            start = opened.read(_HEAD.size)
            if len(start) < _HEAD.size or sys.byteorder != "little" or struct.calcsize("P") != 8:
                return None
            magic, version, _, _, page_size = _HEAD.unpack(start)
            if (magic, version) != (_MAGIC, _VERSION):
                return None
            base = _map(opened.fileno(), map_bytes)
        if base is None:
            return None
        pages = cls(base, page_size)
        weakref.finalize(pages, _unmap, base, map_bytes)
        return pages

    def of_names(self, txn: Any, names: Sequence[bytes], nothing: Bytes) -> Bytes | None:
        """Records of names, all as long as `nothing`, which stands for those that are not there.

        Args:
            txn: a transaction of the environment, which reads.
            names: of the records.
            nothing: a record.

        Returns:
            uint8 [names, bytes]; None: `get` is to be asked.
        """
        starts = np.empty(len(names) + 1, dtype=np.int64)
        starts[0] = _MARGIN
        np.cumsum(np.fromiter(map(len, names), np.int64, len(names)), out=starts[1:])
        starts[1:] += _MARGIN
        joined = np.frombuffer(bytes(_MARGIN) + b"".join(names), dtype=np.uint8)
        out = np.empty((len(names), len(nothing)), dtype=np.uint8)
        return out if _of_names(self._base, self._page_size, txn.id(), joined, starts, out, nothing) else None

    def of_integers(self, txn: Any, prefix: Bytes, keys: Sequence[int], nothing: Bytes) -> Bytes | None:
        """As `of_names`, of names that are an integer each behind one prefix.

        Raises:
            TypeError: a key is no integer.
        """
        try:
            numbers = np.frombuffer(array("q", keys), dtype=np.int64)
        except OverflowError:
            return None
        out = np.empty((len(numbers), len(nothing)), dtype=np.uint8)
        return out if _of_integers(self._base, self._page_size, txn.id(), prefix, numbers, out, nothing) else None


_libc = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _map(descriptor: int, size: int) -> int | None:
    """The address of a file mapped for reading, also beyond its present end, which Python's own `mmap` refuses."""
    base: int = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    return None if base == ctypes.c_void_p(-1).value else base


def _unmap(base: int, size: int) -> None:
    _libc.munmap(base, size)
