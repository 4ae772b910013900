"""kvcache keeps the KV cache of an LLM engine in tiers: DRAM first, then what a profile lists.

The mechanics are here: keys, the tier contract, the index, eviction, the slab, the stack.
``kvcache.profiles.open_stack`` opens one. Importing this takes no torch, numpy, engine or network.
"""

from kvcache.keys import block_keys, namespace
from kvcache.lower.promotion import Match
from kvcache.stack import Stack
from kvcache.stats import StackStats
from kvcache.tier import FrontTier, Lease, LeaseError, Tier, TierStats, TierUsage

__version__ = "0.1.0"
"""The version of kvcache, and its only source: pyproject.toml and `kvcache --version` read it."""

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
