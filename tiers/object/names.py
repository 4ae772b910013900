"""The names of the objects of a tier, below the prefix of its URL.

::

    kvcache/1/block/<namespace>/<first byte of the key>/<key>  ->  a block in its frame
    kvcache/1/reset/<namespace>                                ->  random bytes, after a reset
    kvcache/1/about/<namespace>                                ->  JSON, for people

Blocks have a prefix of their own, so that a lifecycle rule can delete them and keep the resets. The
first byte of the key keeps the folders of a file system short.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

from kvcache.keys import DIGEST_NBYTES

_ROOT: Final = "kvcache/1"
_LONGEST_PART = 200  # a file system takes names of 255 bytes

START_NAME: Final = f"{_ROOT}/start"
"""The name of an object that does not exist; reading it shows whether the store serves the tier."""


def block_name(key: bytes) -> str:
    """Return the name of the object of a block, below the prefix."""
    namespace, block = key[:DIGEST_NBYTES], key[DIGEST_NBYTES:]
    return f"{_ROOT}/block/{_in_name(namespace)}/{_in_name(block[:1])}/{_in_name(block)}"


def reset_name(namespace: bytes) -> str:
    """Return the name of the object that has the last reset of a namespace."""
    return f"{_ROOT}/reset/{_in_name(namespace)}"


def description_name(resolved: bytes) -> str:
    """Return the name of the object that describes a resolved namespace."""
    return f"{_ROOT}/about/{_in_name(resolved)}"


def _in_name(part: bytes) -> str:
    """Return ``part`` in hex; "-" if it is empty, and its digest if it is long."""
    text = part.hex() or "-"
    return text if len(text) <= _LONGEST_PART else f"digest-{blake2b(part).hexdigest()}"
