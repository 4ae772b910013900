"""The tier on an object store."""

from kvcache.tiers.object.tier import ObjectTier

__all__ = ["ObjectTier"]
