"""Blocks in a directory of a local disk: slots of one preallocated file, and a record for each.

::

    lock      held while the directory is open; has the pid of its process     locks.py
    records   one page of geometry, then 256 bytes per slot: whose block is
              in it, or zeros                                                  records.py
    blocks    slots of whole pages, allocated at once                          tier.py
    spaces    which namespaces were reset, and what each is                    namespaces.py

places.py opens files and directories that others may have touched, and files.py those of a tier.
Replicas of one engine share a path: replicas.py. reader.py looks at all that from outside.
"""

from kvcache.tiers.disk.records import PAGE
from kvcache.tiers.disk.tier import DiskTier

__all__ = ["PAGE", "DiskTier"]
