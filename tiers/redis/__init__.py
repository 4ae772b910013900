"""A tier on Redis or Valkey: one server, a cluster, or a master that Sentinels name."""

from .tier import RedisTier, block_name, description_name

__all__ = ["RedisTier", "block_name", "description_name"]
