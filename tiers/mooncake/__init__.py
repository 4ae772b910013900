"""A tier in a Mooncake pool: memory that several hosts lend to each other, over TCP or RDMA."""

from .tier import MooncakeTier, block_name

__all__ = ["MooncakeTier", "block_name"]
