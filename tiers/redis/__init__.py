"""Blocks in Redis or Valkey: one server, a cluster, or a server that Sentinels name."""

from .tier import RedisTier, about_name_of, name_of

__all__ = ["RedisTier", "about_name_of", "name_of"]
