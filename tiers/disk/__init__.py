"""The disk tier: blocks in slots of one preallocated file, and a record for each slot.

The files of a tier's directory, and the modules that define them::

    lock      locked while the directory is open; contains the process id      lock_file.py
    records   a page of geometry, then 256 bytes per slot: the key of its
              block, or zeros                                                  record_file.py
    blocks    slots of whole pages, allocated when the tier is opened          tier.py
    spaces    which namespaces were reset, and a description of each           namespace_file.py

``safe_open.py`` opens files and directories that other users may have changed, ``directory.py`` the
files of a tier. ``replicas.py`` divides a path among the replicas of one engine. ``reader.py``
reads a directory while an engine has it open.
"""

from kvcache.tiers.disk.record_file import PAGE
from kvcache.tiers.disk.tier import DiskTier

__all__ = ["PAGE", "DiskTier"]
