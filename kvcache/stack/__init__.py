"""A stack of tiers, as an engine sees it.

``stack`` has the class that engines call. ``fetch`` looks up and pins blocks of L1, ``prefetch``
promotes blocks ahead of their use, ``hints`` applies hints, all of them use ``leases`` and
``spans``.
"""

from kvcache.stack.stack import Stack

__all__ = ["Stack"]
