"""The vLLM connector: vLLM imports ``KVCacheConnector`` from here.

The class is imported on first use, because every process of vLLM imports this package for its
plugin, also where the connector is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .connector import KVCacheConnector

__all__ = ["KVCacheConnector"]


def __getattr__(name: str) -> Any:
    if name == "KVCacheConnector":
        from .connector import KVCacheConnector

        return KVCacheConnector
    raise AttributeError(name)
