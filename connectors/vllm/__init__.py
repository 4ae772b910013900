"""The vLLM connector: vLLM imports ``KVCacheConnector`` from here."""

from .connector import KVCacheConnector

__all__ = ["KVCacheConnector"]
