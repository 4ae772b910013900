"""Memory, a line at a time: what copies of pages are made of, as machine code without the GIL.

Always true here: addresses are taken as they are given; nothing but `prefetch` goes beyond them.
"""

import ctypes
from typing import Any

import numba
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
