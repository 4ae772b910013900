"""Compiled kernels of the CPU copies: contiguous runs, and matrices that are transposed.

Every function here is machine code that runs without the GIL.

* `copy_run` copies a run of bytes by cache lines: it prefetches the source, across the end of the
  run into the next one, and writes the target with non-temporal stores, which bypass the caches.
* `compile_transpose` makes a function for runs that are a matrix with rows on one side and columns
  on the other. It transposes into a scratch buffer that stays in the caches, and copies the
  result from there with `copy_run`, so that whole cache lines of the target are written.

Invariant: addresses are used unchecked. Only `prefetch` touches memory outside the given ranges,
and a prefetch of an unmapped address has no effect.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.extending import intrinsic

CACHE_LINE = 64
"""Bytes."""

PREFETCH_NBYTES = 4096
"""How far ahead of the copy the source is prefetched.

The processor's own prefetcher does not know where the next run begins. So the copy prefetches past
the end of a run into the next one, and the first line of the next run as soon as a run begins,
because its address translation takes longest. A non-temporal store saves the read of a line that
is only overwritten. Relative to one contiguous copy, runs of 4 to 32 KiB were gathered at 1.00 to
1.14 and scattered at 1.30 to 1.36. A memcpy for each run reached 0.76 to 0.90 and 0.96 to 1.04, and
a distance of 1 KiB gathered at 0.90 to 1.05.
"""

_VECTOR_NBYTES = 16  # of the vectors that are transposed; every processor has these

_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)
_memcpy.restype = ctypes.c_size_t


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def copy_run(target: int, source: int, nbytes: int, next_source: int) -> None:
    """Copy one run and prefetch the run at `next_source`, which is copied after it."""
    prefetch(next_source)
    head = min(-target % CACHE_LINE, nbytes)  # up to the first line of the target
    tail = head + (nbytes - head) // CACHE_LINE * CACHE_LINE  # where the last whole line ends
    near_end = max(tail - PREFETCH_NBYTES, head)  # from here the prefetch is in the next run
    if head:
        _memcpy(target, source, head)
    for at in range(head, near_end, CACHE_LINE):
        prefetch(source + at + PREFETCH_NBYTES)
        copy_line(target + at, source + at)
    for at in range(near_end, tail, CACHE_LINE):
        prefetch(next_source + at - near_end)
        copy_line(target + at, source + at)
    if tail < nbytes:
        _memcpy(target + tail, source + tail, nbytes - tail)


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_typing: Any, _address: Any) -> Any:
    """Prefetch the cache line at an address, which may be invalid."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer, integer = ir.PointerType(ir.IntType(8)), ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, *[integer] * 3])
        )
        address = builder.inttoptr(arguments[0], pointer)
        read, keep_in_cache, data = integer(0), integer(3), integer(1)
        builder.call(prefetch, [address, read, keep_in_cache, data])
        return context.get_dummy_value()

    return numba.void(numba.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def copy_line(_typing: Any, _target: Any, _source: Any) -> Any:
    """Copy a cache line with a non-temporal store. The target must be aligned to a line."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        line = ir.PointerType(ir.VectorType(ir.IntType(64), CACHE_LINE // 8))
        target, source = (builder.inttoptr(argument, line) for argument in arguments)
        load = builder.load(source)
        load.align = 1
        store = builder.store(load, target)
        store.align = CACHE_LINE
        one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        store.set_metadata("nontemporal", one)
        return context.get_dummy_value()

    return numba.void(numba.int64, numba.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def memory_fence(_typing: Any) -> Any:
    """Order the non-temporal stores so far before all later memory accesses."""

    def emit(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return numba.void(), emit


def _compile_tile(nbytes: int, side: int) -> Callable[..., Any]:
    """Make a function that transposes `side` by `side` elements of `nbytes` bytes.

    A row of a tile, `side * nbytes` bytes, is contiguous on both sides. With `side` 1 it copies one
    element.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(_typing: Any, _target: Any, _target_step: Any, _source: Any, _source_step: Any) -> Any:
        def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            element = ir.IntType(8 * min(nbytes, 8))
            row = ir.VectorType(element, side * max(nbytes // 8, 1))
            lanes = ir.VectorType(ir.IntType(32), side)
            target, target_step, source, source_step = arguments

            def row_pointer(begin: Any, step: Any, number: int) -> Any:
                offset = builder.mul(step, step.type(number))
                return builder.inttoptr(builder.add(begin, offset), row.as_pointer())

            rows = [builder.load(row_pointer(source, source_step, at)) for at in range(side)]
            for load in rows:
                load.align = 1
            # Interleave each row of the upper half with one of the lower half, log2(side) times.
            half = side // 2
            pairs = [(number, side + number) for number in range(side)]
            for _ in range(side.bit_length() - 1):
                rows = [
                    builder.shuffle_vector(upper, lower, ir.Constant(lanes, [*chain(*selected)]))
                    for upper, lower in zip(rows[:half], rows[half:], strict=True)
                    for selected in (pairs[:half], pairs[half:])
                ]
            for number, column in enumerate(rows):
                builder.store(column, row_pointer(target, target_step, number)).align = 1
            return context.get_dummy_value()

        return numba.void(*[numba.int64] * 4), emit

    return tile  # type: ignore[no-any-return]


def piece_widths(cells: Iterable[int]) -> frozenset[int]:
    """Choose at most two widths, in bytes, in which cells of these sizes are copied.

    A width is a power of two and at most a cache line. Of more than two, the smallest two are used;
    larger cells are copied in pieces of the wider one.
    """
    widths = {min(1 << cell.bit_length() - 1, CACHE_LINE) for cell in cells}
    return frozenset(sorted(widths)[:2])


def _compile_matrix_transpose(width: int) -> Callable[..., Any]:
    """Make a function that transposes matrices with cells of at least `width` bytes."""
    side = max(_VECTOR_NBYTES // width, 1)
    transpose_tile, copy_piece = _compile_tile(width, side), _compile_tile(width, 1)

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def transpose_matrix(
        target: int,
        source: int,
        next_source: int,
        cell: int,
        rows: int,
        columns: int,
        row_step: int,
        column_step: int,
    ) -> None:
        """Write the columns of the source to the target one after another, without gaps.

        The matrix at `next_source`, of the same shape, is prefetched.
        """
        column_nbytes = rows * cell
        if cell == width == column_step and rows % side == columns % side == 0:
            for row in range(0, rows, side):
                for column in range(0, columns, side):
                    at = row * row_step + column * width
                    if column * width % CACHE_LINE == 0:
                        for number in range(side):
                            prefetch(next_source + at + number * row_step)
                    to = target + column * column_nbytes + row * width
                    transpose_tile(to, column_nbytes, source + at, row_step)
            return
        for row in range(rows):
            for column in range(columns):
                at = row * row_step + column * column_step
                to = target + column * column_nbytes + row * cell
                for byte in range(0, cell - width, width):
                    if byte % CACHE_LINE == 0:
                        prefetch(next_source + at + byte)
                    copy_piece(to + byte, 0, source + at + byte, 0)
                last = cell - width  # the last piece may overlap the one before it
                prefetch(next_source + at + last)
                copy_piece(to + last, 0, source + at + last, 0)

    return transpose_matrix  # type: ignore[no-any-return]


def compile_transpose(widths: frozenset[int]) -> Callable[..., None]:
    """Make a function that copies a run and transposes it, for cells of these `piece_widths`."""
    wide = max(widths, default=CACHE_LINE)
    transpose_narrow = _compile_matrix_transpose(min(widths, default=CACHE_LINE))
    transpose_wide = _compile_matrix_transpose(wide)

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def transpose_run(
        target: int, source: int, transpose: Any, scratch: Any, next_source: int
    ) -> None:
        """Copy one run as described by the row `transpose` of the table of transposes.

        Its columns are: bytes of a cell, rows and columns of the source, bytes from row to row
        and from column to column in the source, and the same two in the target.
        """
        cell, rows, columns = transpose[0], transpose[1], transpose[2]
        row_step, column_step = transpose[3], transpose[4]
        to_row, to_column = transpose[5], transpose[6]
        # numba has this address as unsigned, and unsigned with signed arithmetic gives a float.
        dense = np.int64(scratch.ctypes.data)
        dense += -dense % CACHE_LINE
        if cell < wide:
            transpose_narrow(dense, source, next_source, cell, rows, columns, row_step, column_step)
        else:
            transpose_wide(dense, source, next_source, cell, rows, columns, row_step, column_step)
        column_nbytes = rows * cell
        pieces, nbytes = (1, column_nbytes) if to_row == cell else (rows, cell)
        if pieces == 1 and to_column == column_nbytes:
            columns, nbytes = 1, columns * column_nbytes
        for column in range(columns):
            for piece in range(pieces):
                to = target + column * to_column + piece * to_row
                copy_run(to, dense + column * column_nbytes + piece * nbytes, nbytes, dense)

    return transpose_run  # type: ignore[no-any-return]
