"""Memory, a line at a time: what copies of pages are made of, as machine code without the GIL.

Always true here: addresses are taken as they are given; nothing but `prefetch` goes beyond them.

A run whose bytes lie across each other on the two sides: a matrix, rows here and columns there.

Always true here: the target's lines are written whole, since the matrix is put together in a
scratch that stays in the caches, and copied from there as any run is.
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

# A run begins far from the one before it, where the processor has nothing to foresee it by, and its
# end says nothing of where the next begins. So the lines that are read next are asked for this many
# bytes ahead, over the end of a run into the next; and the next one's first line when a run begins,
# since it takes longest to find out where a new page of memory is. Lines are written past the
# caches: what a cache would have to read first, only to have it overwritten, is not read. Of one
# contiguous copy, runs of 4 to 32 KiB were gathered at 0.76 to 0.90 by a memcpy each, and at 1.00
# to 1.14 so (at 0.90 to 1.05 with 1 KiB ahead); scattered at 0.96 to 1.04, and at 1.30 to 1.36.
AHEAD = 4096
LINE = 64

_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)
_memcpy.restype = ctypes.c_size_t


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def copy_run(target: int, source: int, nbytes: int, following: int) -> None:
    """Copy one run; what will be read after it is at `following`."""
    prefetch(following)
    head = min(-target % LINE, nbytes)
    lines = head + (nbytes - head) // LINE * LINE
    near = max(lines - AHEAD, head)  # from here on, what is ahead is in the next run
    if head:
        _memcpy(target, source, head)
    for at in range(head, near, LINE):
        prefetch(source + at + AHEAD)
        copy_line(target + at, source + at)
    for at in range(near, lines, LINE):
        prefetch(following + at - near)
        copy_line(target + at, source + at)
    if lines < nbytes:
        _memcpy(target + lines, source + lines, nbytes - lines)


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_typing: Any, _address: Any) -> Any:
    """Ask for the line at an address. It need not be anybody's."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer, integer = ir.PointerType(ir.IntType(8)), ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, *[integer] * 3])
        )
        at = builder.inttoptr(arguments[0], pointer)
        builder.call(prefetch, [at, integer(0), integer(3), integer(1)])  # a read, to keep, of data
        return context.get_dummy_value()

    return numba.void(numba.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def copy_line(_typing: Any, _target: Any, _source: Any) -> Any:
    """Copy a line, past the caches. The target must begin on one."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        line = ir.PointerType(ir.VectorType(ir.IntType(64), LINE // 8))
        target, source = (builder.inttoptr(argument, line) for argument in arguments)
        read = builder.load(source)
        read.align = 1
        written = builder.store(read, target)
        written.align = LINE
        one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        written.set_metadata("nontemporal", one)
        return context.get_dummy_value()

    return numba.void(numba.int64, numba.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def settle(_typing: Any) -> Any:
    """Have what was written past the caches be there before anything that comes after."""

    def emit(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return numba.void(), emit


_WIDTH = 16  # bytes of the vectors that are turned: every processor has such


def _tile(nbytes: int, side: int) -> Callable[..., Any]:
    """Turns a square of `side` by `side` elements; `side * nbytes` is what lies in one piece."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(_typing: Any, _target: Any, _step: Any, _source: Any, _source_step: Any) -> Any:
        def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            element = ir.IntType(8 * min(nbytes, 8))
            row = ir.VectorType(element, side * max(nbytes // 8, 1))
            lanes = ir.VectorType(ir.IntType(32), side)
            target, target_step, source, source_step = arguments

            def at(begin: Any, step: Any, number: int) -> Any:
                further = builder.mul(step, step.type(number))
                return builder.inttoptr(builder.add(begin, further), row.as_pointer())

            rows = [builder.load(at(source, source_step, number)) for number in range(side)]
            for read in rows:
                read.align = 1
            # Each of the upper half with each of the lower, number by number, until all have met.
            half = side // 2
            pairs = [(number, side + number) for number in range(side)]
            for _ in range(side.bit_length() - 1):
                rows = [
                    builder.shuffle_vector(upper, lower, ir.Constant(lanes, [*chain(*some)]))
                    for upper, lower in zip(rows[:half], rows[half:], strict=True)
                    for some in (pairs[:half], pairs[half:])
                ]
            for number, turned in enumerate(rows):
                builder.store(turned, at(target, target_step, number)).align = 1
            return context.get_dummy_value()

        return numba.void(*[numba.int64] * 4), emit

    return tile  # type: ignore[no-any-return]


def widths(cells: Iterable[int]) -> frozenset[int]:
    """How many bytes of such cells are copied at a time: powers of two, a line at most.

    Of more than two the others are left out; wider cells are copied by the wider one that is left.
    """
    return frozenset(sorted({min(1 << cell.bit_length() - 1, LINE) for cell in cells})[:2])


def _turn(width: int) -> Callable[..., Any]:
    """Turns matrices of cells of at least `width` bytes."""
    side = max(_WIDTH // width, 1)
    tile, piece = _tile(width, side), _tile(width, 1)

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def turn(
        target: int,
        source: int,
        following: int,
        cell: int,
        rows: int,
        columns: int,
        row_step: int,
        column_step: int,
    ) -> None:
        """To the target, dense, column by column; what is read after it lies alike."""
        column_nbytes = rows * cell
        if cell == width == column_step and rows % side == columns % side == 0:
            for row in range(0, rows, side):
                for column in range(0, columns, side):
                    at = row * row_step + column * width
                    if column * width % LINE == 0:
                        for number in range(side):
                            prefetch(following + at + number * row_step)
                    to = target + column * column_nbytes + row * width
                    tile(to, column_nbytes, source + at, row_step)
            return
        for row in range(rows):
            for column in range(columns):
                at = row * row_step + column * column_step
                to = target + column * column_nbytes + row * cell
                for byte in range(0, cell - width, width):
                    if byte % LINE == 0:
                        prefetch(following + at + byte)
                    piece(to + byte, 0, source + at + byte, 0)
                last = cell - width  # of the piece before, in part
                prefetch(following + at + last)
                piece(to + last, 0, source + at + last, 0)

    return turn  # type: ignore[no-any-return]


def turning(widths: frozenset[int]) -> Callable[..., None]:
    """What copies matrices whose cells are of these widths."""
    wide = max(widths, default=LINE)
    narrow, wider = _turn(min(widths, default=LINE)), _turn(wide)

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def turn_run(target: int, source: int, turn: Any, scratch: Any, following: int) -> None:
        """`turn` is cell, rows and columns of the source, its steps, those of the target.

        Steps are bytes from row to row, and from column to column.
        """
        cell, rows, columns = turn[0], turn[1], turn[2]
        row_step, column_step, to_row, to_column = turn[3], turn[4], turn[5], turn[6]
        turned = np.int64(scratch.ctypes.data)  # which numba has unsigned, and turns into a float
        turned += -turned % LINE
        if cell < wide:
            narrow(turned, source, following, cell, rows, columns, row_step, column_step)
        else:
            wider(turned, source, following, cell, rows, columns, row_step, column_step)
        column_nbytes = rows * cell
        pieces, nbytes = (1, column_nbytes) if to_row == cell else (rows, cell)
        if pieces == 1 and to_column == column_nbytes:
            columns, nbytes = 1, columns * column_nbytes
        for column in range(columns):
            for piece in range(pieces):
                to = target + column * to_column + piece * to_row
                copy_run(to, turned + column * column_nbytes + piece * nbytes, nbytes, turned)

    return turn_run  # type: ignore[no-any-return]
