"""The pages of one of SGLang's host pools, as memory and names of blocks.

A page lies in one or more runs of memory: K and V of all layers (``page_first``,
``page_first_direct``), K and V of each layer (``layer_first``), the states of a Mamba layer. Each
run is a block, a part of its page. A page is held if all of its parts are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Final

NAME_NBYTES: Final = 32

REPLICATED_POOLS: Final = frozenset(
    {
        "MLATokenToKVPoolHost", "DSAIndexerPoolHost", "DeepSeekV4PagedHostPool",
        "DeepSeekV4StateHostPool", "LogicalHostPool",
    }
)  # fmt: skip
"""Classes of SGLang's host pools that have equal bytes on every tensor-parallel rank of a model
with MLA. Pages of any other class are named by rank: a pool that is missing here costs hits."""


class HostPages:
    """The pages of one host pool.

    Args:
        pool: SGLang's host pool.
        name: its name in SGLang, such as "kv" or "mamba".
        place: distinguishes its pages from those of other ranks, stages and shards.

    Attributes:
        pool: SGLang's host pool.
        part_nbytes: the bytes of each part of a page; empty if the pool has no memory (DeepSeek
            V4's anchor, which numbers the pages of other pools).

    Raises:
        ValueError: if SGLang has no addresses of this pool's pages in its layout.
    """

    def __init__(self, pool: Any, name: str, place: Sequence[object]) -> None:
        self.pool = pool
        self._page_tokens = int(
            getattr(pool, "logical_page_size", 0) or getattr(pool, "page_size", 0) or 1
        )
        self.part_nbytes = self._first_page_nbytes(name)
        fields = [name, *(str(value) for value in pool_fields(pool).values()), *map(str, place)]
        text = "\n".join([*fields, *map(str, self.part_nbytes)])
        self._pool_key = blake2b(text.encode(), digest_size=NAME_NBYTES).digest()

    def _first_page_nbytes(self, name: str) -> tuple[int, ...]:
        if name == "kv" and getattr(self.pool, "kv_buffer", None) is None:
            return ()
        import torch

        try:
            found = self.pool.get_page_buffer_meta(torch.arange(self._page_tokens))
        except (NotImplementedError, ValueError, AssertionError) as error:
            raise ValueError(
                f"SGLang has no addresses of the pages of host pool {name!r} in layout "
                f"{getattr(self.pool, 'layout', None)!r} ({error}); use --hicache-mem-layout "
                "page_first_direct"
            ) from error
        return () if found is None else tuple(int(nbytes) for nbytes in found[1])

    def names(self, keys: Sequence[str], epoch: bytes) -> list[bytes]:
        """Return the names of all parts of the pages ``keys``, page by page.

        ``epoch`` changes the names of all pages when the weights change.
        """
        names = []
        for key in keys:
            page = blake2b(key.encode(), digest_size=NAME_NBYTES, key=self._pool_key)
            page.update(b"\0" + epoch)
            for part in range(len(self.part_nbytes)):
                named = page.copy()
                named.update(part.to_bytes(2, "little"))
                names.append(named.digest())
        return names

    def views(self, pages: int, host_indices: Any) -> list[memoryview] | None:
        """Return the memory of all parts of ``pages`` pages; ``None`` for wrong indices."""
        if host_indices is None or len(host_indices) != pages * self._page_tokens:
            return None
        if not self.part_nbytes:
            return []
        addresses, sizes = self.pool.get_page_buffer_meta(host_indices)
        if len(addresses) != pages * len(self.part_nbytes):
            return None
        return [
            memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
            for address, nbytes in zip(addresses, sizes, strict=True)
        ]

    def complete_pages(self, parts: Sequence[bool], pages: int) -> list[bool]:
        """Return for each page whether all of its ``parts`` are true."""
        step = len(self.part_nbytes)
        return [all(parts[page * step : (page + 1) * step]) for page in range(pages)]


def is_replicated(pool: object) -> bool:
    """Whether every tensor-parallel rank of a model with MLA has equal bytes in ``pool``."""
    return any(each.__name__ in REPLICATED_POOLS for each in type(pool).__mro__)


def pool_fields(pool: Any) -> dict[str, object]:
    """Return what changes the order or the type of the bytes of a page, by name."""
    return {
        "pool": type(pool).__name__,
        "pool format": getattr(pool, "storage_format_tag", None),
        "pool dtype": str(getattr(pool, "dtype", None)),
        "state dtype": str(getattr(pool, "temporal_dtype", None)),  # of Mamba
        "layout": getattr(pool, "layout", None),
        "page size": getattr(pool, "page_size", None),
        "layers": [getattr(pool, name, None) for name in ("start_layer", "end_layer")],
    }
