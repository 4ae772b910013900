"""Keeps the paged KV cache of any engine in a stack: register the tensors, save and load blocks.

    cache = PagedCache(layers, "kv-first", tokens=16)
    with open_stack(block_nbytes=cache.block_nbytes) as stack, cache.attach(stack) as attached:
        attached.save(block_ids, keys)
        leading = attached.load(keys, other_ids)

Invariants:

* Blocks that ``load`` counts have been copied whole into the engine's blocks. Other blocks are
  untouched.
* Blocks that ``save`` does not count as stored or known are not kept.
* The meaning of a block's bytes is a part of its key. A raw block is never found as a canonical
  one, nor is a block of another dtype or of other sizes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import index
from typing import Literal

from kvcache.closeable import Closeable
from kvcache.connectors.layout.axes import Layer, Layout
from kvcache.connectors.layout.placement import place
from kvcache.connectors.transfer.factory import (
    Order,
    device_of,
    format_id,
    open_copier,
    prepare_copies,
)
from kvcache.keys import DIGEST_NBYTES, namespace
from kvcache.process import bind_to_process
from kvcache.stack import Stack

SCHEMA = 1  # version of the format of a block; another version is another namespace


@dataclass(frozen=True, slots=True)
class SaveResult:
    """How many blocks ``save`` stored; the three counts add up to the number of blocks."""

    stored: int  # copied by this call
    known: int  # in the stack already
    declined: int  # no room, or another caller is storing them

    @property
    def held(self) -> int:
        """How many blocks the stack held when ``save`` returned."""
        return self.stored + self.known


class PagedCache:
    """The registered paged tensors of an engine.

    Args:
        layers: the tensor of each layer, or its tensors ``(keys, values)``, all on one device, a
            CPU or CUDA; a mapping if layers have names.
        layout: a name of :data:`~kvcache.connectors.layout.axes.LAYOUTS` or a layout of your own;
            ``None`` to find it from the shapes.
        order: the order of the stored bytes. ``raw`` copies pages as they are. ``canonical`` is one
            order for all layouts, in which engines with different attention share blocks.
        sizes: known sizes of axes, by name: ``tokens=16, heads=8``.

    Attributes:
        placement: where the blocks lie.
        namespace: a digest of the meaning of a block's bytes; a part of every key.

    Raises:
        LayoutError: when the layout does not fit, is not found, or has no canonical order.
        ValueError: for tensors on another device.
    """

    def __init__(
        self,
        layers: Sequence[Layer] | Mapping[str, Layer],
        layout: str | Layout | None = None,
        *,
        order: Order = "raw",
        **sizes: int,
    ) -> None:
        self.placement = place(layers, layout, **sizes)
        self.device = device_of(self.placement)
        self.order: Order = order
        self.namespace = namespace(
            {"schema": SCHEMA, "order": order, "form": format_id(self.placement, order)}
        )
        if self.device is None:
            prepare_copies(self.placement, order)
        else:  # a forked child has no device memory and no streams
            bind_to_process(self)

    @property
    def block_nbytes(self) -> int:
        """Bytes of a block, in all layers; the stack is opened with this."""
        return self.placement.block_nbytes

    def attach(self, stack: Stack, *, threads: int = 1) -> AttachedCache:
        """Prepare copies between these tensors and the stack's L1.

        Args:
            threads: how many threads share a copy by the CPU.

        Raises:
            ValueError: when the stack's blocks have another number of bytes.
        """
        return AttachedCache(self, stack, threads)


class AttachedCache(Closeable):
    """A registered cache and the stack that keeps its blocks. Thread-safe.

    Close it before the stack, and before the tensors move. It keeps L1's memory mapped: if the
    stack is closed first, copies still work, and the memory is freed when this is closed.
    """

    def __init__(self, cache: PagedCache, stack: Stack, threads: int) -> None:
        if stack.block_nbytes != cache.block_nbytes:
            raise ValueError(
                f"a block of this cache has {cache.block_nbytes} bytes, and a block of the stack"
                f" {stack.block_nbytes}; open the stack with block_nbytes={cache.block_nbytes}"
            )
        self._cache = cache
        self._closed = False
        self._stack = stack
        self._memory = stack.front.slab.view(0)
        slab = stack.front.slab
        self._copier = open_copier(
            cache.placement, slab, device=cache.device, order=cache.order, threads=threads
        )
        if cache.device is not None:
            self._copier.pin_slots(slab.wait_populated())
        bind_to_process(self)

    def save(
        self, block_ids: Sequence[int], keys: Sequence[bytes], parent: bytes | None = None
    ) -> SaveResult:
        """Store the engine's blocks ``block_ids[i]`` under ``keys[i]``, and wait for the copies.

        Args:
            keys: consecutive keys of one chain, each the identity of all tokens up to the end of
                its block (``kvcache.block_keys`` makes such keys).
            parent: the key of the block before ``keys[0]``; ``None`` if that begins the chain.

        Raises:
            ValueError: when the numbers of ids and keys differ.
            IndexError: for a block that the engine does not have.
            RuntimeError: after ``close``.
        """
        blocks = self._validated(block_ids, keys)
        stack_keys = self.stack_keys(keys)
        stack_parent = self.stack_keys([parent])[0] if parent is not None else None
        lease = self._stack.reserve(stack_keys, stack_parent)
        with lease:
            self._copy("store", [blocks[at] for at in lease.positions], lease.slots)
        stored = len(lease.keys)
        leased = set(lease.positions)
        others = [key for at, key in enumerate(stack_keys) if at not in leased]
        known = sum(self._stack.front.contains(others))
        return SaveResult(stored, known, len(keys) - stored - known)

    def load(self, keys: Sequence[bytes], block_ids: Sequence[int], *, start: int = 0) -> int:
        """Copy the longest stored prefix of ``keys[start:]`` into the engine's blocks.

        Waits for tiers below L1, as long as their profile allows.

        Args:
            keys: the chain of a request, from its first block.
            block_ids: the engine's blocks for ``keys[start:]``, all different.
            start: how many leading blocks the engine already has.

        Returns:
            how many leading blocks of ``block_ids`` have been loaded. The others are untouched.

        Raises:
            ValueError, IndexError, RuntimeError: as ``save``; ValueError also for a block that
                occurs twice.
        """
        if not 0 <= start <= len(keys):
            raise ValueError(f"start is {start}, but there are {len(keys)} keys")
        blocks = self._validated(block_ids, keys[start:])
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"a block is the target of two keys: {blocks}")
        match = self._stack.match(self.stack_keys(keys), start).result()
        with self._stack.fetch(match).result() as lease:
            self._copy("load", blocks[: len(lease)], lease.slots)
        return len(lease)

    def close(self) -> None:
        """Wait for running copies and refuse new ones. Further calls do nothing."""
        self._closed = True
        self._copier.close()
        self._memory.release()

    def _copy(
        self, operation: Literal["store", "load"], blocks: Sequence[int], slots: Sequence[int]
    ) -> None:
        if not blocks:
            return
        begin, failed = time.perf_counter(), True
        try:
            if operation == "store":
                copy = self._copier.gather(blocks, slots)
            else:
                copy = self._copier.scatter(slots, blocks)
            copy.wait()
            failed = False
        finally:
            self._stack.observe_copy(operation, time.perf_counter() - begin, failed=failed)

    def stack_keys(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the keys of these blocks in the stack, which include the cache's namespace."""
        namespace = self._cache.namespace
        return [blake2b(key, digest_size=DIGEST_NBYTES, key=namespace).digest() for key in keys]

    def _validated(self, block_ids: Sequence[int], keys: Sequence[bytes]) -> list[int]:
        """Return the ids as integers. Raises before the stack is called."""
        if self._closed:
            raise RuntimeError("this cache is not attached any more: it was closed")
        if len(block_ids) != len(keys):
            raise ValueError(
                f"{len(block_ids)} block ids do not pair up with {len(keys)} keys;"
                " there must be one for each"
            )
        blocks, count = [index(block) for block in block_ids], self._cache.placement.blocks
        for block in blocks:
            if not 0 <= block < count:
                raise IndexError(f"block {block} does not exist: there are {count}, from 0")
        return blocks
