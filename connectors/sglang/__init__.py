"""The SGLang backend: SGLang imports ``KVCacheStorage`` from here.

The class is imported on first use, because every process of SGLang imports this package for its
plugin, also where the backend is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .storage import KVCacheStorage

__all__ = ["KVCacheStorage"]


def __getattr__(name: str) -> Any:
    if name == "KVCacheStorage":
        from .storage import KVCacheStorage

        return KVCacheStorage
    raise AttributeError(name)
