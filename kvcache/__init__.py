"""kvcache keeps the KV cache of an LLM engine in tiers: DRAM first, then those of a profile.

This package has the core: keys, the tier contract, the index, eviction, the slab and the stack.
``kvcache.profiles.open_stack`` opens a stack. The import needs no torch, numpy, engine or network.
"""

from kvcache.keys import block_keys, namespace
from kvcache.lower.promotion import Match
from kvcache.stack import Stack
from kvcache.stats import StackStats
from kvcache.tier import FrontTier, Lease, LeaseError, Tier, TierStats, TierUsage

__version__ = "0.1.0"
"""The version of kvcache, written here alone: pyproject.toml and `kvcache --version` read it."""

__all__ = [
    "FrontTier",
    "Lease",
    "LeaseError",
    "Match",
    "Stack",
    "StackStats",
    "Tier",
    "TierStats",
    "TierUsage",
    "block_keys",
    "namespace",
]
