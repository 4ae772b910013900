"""Anybody's paged KV cache, kept in a stack: register the tensors, then save and load blocks.

    cache = PagedCache(layers, "kv-first", tokens=16)
    with open_stack(block_nbytes=cache.block_nbytes) as stack, cache.attach(stack) as kept:
        kept.save(block_ids, keys)
        leading = kept.load(keys, other_ids)

Always true here:

* What ``load`` counts has been copied whole into the engine's blocks; it touched no others.
* What ``save`` does not count as stored or known was not kept.
* Blocks are told apart by what their bytes mean: a raw block is never found as a canonical one, nor
  one of another dtype or other sizes, under whatever key.
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
from kvcache.connectors.transfer.factory import Order, device_of, format_id, open_copier
from kvcache.keys import DIGEST_NBYTES, namespace
from kvcache.process import bind_to_process
from kvcache.stack import Stack

SCHEMA = 1  # of what a block's bytes are; another number is another namespace


@dataclass(frozen=True, slots=True)
class Saved:
    """What became of the blocks given to ``save``; the three add up to their number."""

    stored: int  # copied now
    known: int  # held already
    declined: int  # there was no room, or somebody else is storing them

    @property
    def held(self) -> int:
        """Blocks that could be found when ``save`` returned."""
        return self.stored + self.known


class PagedCache:
    """The paged tensors of an engine, registered.

    Args:
        layers: of every layer its tensor, or its tensors ``(keys, values)``, on one device, a CPU
            or CUDA; by name, if they have names.
        layout: a name of :data:`~kvcache.connectors.layout.axes.LAYOUTS` or a layout of your own;
            ``None`` to tell it from the shapes.
        order: of the bytes that are kept. ``raw`` copies pages as they are. ``canonical`` is one
            order for all layouts, so that engines with different attention share blocks.
        sizes: of axes, by name, as far as they are known: ``tokens=16, heads=8``.

    Attributes:
        placement: where the blocks lie.
        space: a digest of what the bytes of a block mean; a part of every key.

    Raises:
        LayoutError: when the layout cannot be told or does not fit, or has no canonical order.
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
        if self.device is not None:  # a device's memory and streams are lost in a fork
            bind_to_process(self)

    @property
    def block_nbytes(self) -> int:
        """Bytes of a block, of all layers: what its stack is opened with."""
        return self.placement.block_nbytes

    def attach(self, stack: Stack, *, threads: int = 1) -> Attached:
        """Get ready to copy between these tensors and the stack's L1.

        Args:
            threads: that a copy by the processor is shared out among.

        Raises:
            ValueError: when the stack's blocks have another number of bytes.
        """
        return Attached(self, stack, threads)


class Attached(Closeable):
    """A registered cache and the stack it is kept in; safe to call from threads.

    Close it before the stack, and before the tensors change their place. It holds L1's memory: a
    stack that is closed too early is not a crash, and its memory goes when this is closed.
    """

    def __init__(self, cache: PagedCache, stack: Stack, threads: int) -> None:
        if stack.block_nbytes != cache.block_nbytes:
            raise ValueError(
                f"a block of this cache has {cache.block_nbytes} bytes, and one of the stack"
                f" {stack.block_nbytes}: open it with block_nbytes={cache.block_nbytes}"
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
    ) -> Saved:
        """Keep the engine's blocks ``block_ids[i]`` under ``keys[i]``; returns when copied.

        Args:
            keys: a stretch of one chain, in order, each one the identity of all tokens up to the
                end of its block (``kvcache.block_keys`` makes such).
            after: the key of the block that ``keys[0]`` continues; ``None`` for a chain's first.

        Raises:
            ValueError: when there are not as many ids as keys.
            IndexError: for a block that the engine does not have.
            RuntimeError: after ``close``.
        """
        blocks = self._checked(block_ids, keys)
        own = self._own(keys)
        lease = self._stack.reserve(own, self._own([parent])[0] if parent is not None else None)
        with lease:
            self._copy("store", [blocks[at] for at in lease.positions], lease.slots)
        stored = len(lease.keys)
        mine = set(lease.positions)
        others = [key for at, key in enumerate(own) if at not in mine]
        known = sum(self._stack.front.contains(others))
        return Saved(stored, known, len(keys) - stored - known)

    def load(self, keys: Sequence[bytes], block_ids: Sequence[int], *, start: int = 0) -> int:
        """Copy the longest prefix of ``keys[start:]`` that is kept into the engine's blocks.

        It waits for tiers below L1, as long as their profile lets it.

        Args:
            keys: a request's chain, from its first block.
            block_ids: where the blocks of ``keys[start:]`` go, each to another.
            start: blocks that the engine has itself.

        Returns:
            how many leading blocks of ``block_ids`` have been loaded. The others are untouched.

        Raises:
            ValueError, IndexError, RuntimeError: as ``save``; ValueError for a block named twice.
        """
        if not 0 <= start <= len(keys):
            raise ValueError(f"start is {start}, and there are {len(keys)} keys")
        blocks = self._checked(block_ids, keys[start:])
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"a block is the target of two keys: {blocks}")
        match = self._stack.match(self._own(keys), start).result()
        with self._stack.fetch(match).result() as lease:
            self._copy("load", blocks[: len(lease)], lease.slots)
        return len(lease)

    def close(self) -> None:
        """Wait for running copies, and refuse new ones. Twice is allowed."""
        self._closed = True
        self._copier.close()
        self._memory.release()

    def _copy(
        self, operation: Literal["store", "load"], blocks: Sequence[int], slots: Sequence[int]
    ) -> None:
        if not blocks:
            return
        begun, failed = time.perf_counter(), True
        try:
            if operation == "store":
                copy = self._copier.gather(blocks, slots)
            else:
                copy = self._copier.scatter(slots, blocks)
            copy.wait()
            failed = False
        finally:
            self._stack.observe_copy(operation, time.perf_counter() - begun, failed=failed)

    def _own(self, keys: Sequence[bytes]) -> list[bytes]:
        """The keys under which the stack knows these blocks: of this form, and no other."""
        space = self._cache.namespace
        return [blake2b(key, digest_size=DIGEST_NBYTES, key=space).digest() for key in keys]

    def _checked(self, block_ids: Sequence[int], keys: Sequence[bytes]) -> list[int]:
        """The ids, each one looked at before anything is asked of the stack."""
        if self._closed:
            raise RuntimeError("this cache is no longer attached: it was closed")
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
