"""Identity: the digest of a namespace, and the chain of keys over a prompt's blocks.

Always true here:

* A block's key depends on every token before it: equal keys mean equal prefixes (256-bit BLAKE2b).
* A namespace digest depends on everything that makes bytes incompatible, names and values both.
* An engine's own block hashes are keys as they are; nothing is hashed twice.

Chains of keys, and how far two of them go together.

Always true here: keys are in tuples. One that is a part of another is cut out by slices, whole ones
are compared at once, and what is only kept is soon nothing to Python's garbage collector.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from itertools import compress, count
from operator import ne

DIGEST_NBYTES = 32
SHOWN = 200  # characters of a field that people are shown as it is


def namespace(fields: Mapping[str, object]) -> bytes:
    """Digest of what must agree before two engines may share a block.

    Args:
        fields: names and values (strings, numbers, booleans, ``None``, lists and mappings of them):
            model, revision, dtype, block tokens, layout, attention backend, parallel sizes, salt...

    Returns:
        32 bytes. Order of the fields does not matter; types do (``1`` is not ``"1"``).

    Raises:
        TypeError: for a value that has no JSON form, since its text may differ between processes.
    """
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return blake2b(text.encode(), digest_size=DIGEST_NBYTES, person=b"kvcache.ns").digest()


def describe_namespace(fields: Mapping[str, object]) -> str:
    """The fields of a namespace as a JSON object for people, ``""`` of none; long ones digested."""
    shown = {}
    for name, value in fields.items():
        text = json.dumps(value, default=str)
        digest = blake2b(text.encode(), digest_size=8).hexdigest()
        shown[name] = value if len(text) <= SHOWN else f"digest {digest}"
    return json.dumps(shown, default=str) if shown else ""


def block_keys(
    tokens: Iterable[int], block_tokens: int, *, root: bytes = b"", salt: bytes = b""
) -> list[bytes]:
    """Keys of the full blocks of a prompt, for users without an engine that hashes.

    Args:
        tokens: token ids, 0 <= id < 2**32.
        block_tokens: tokens per block; a partial last block gets no key.
        root: what the first block continues: a namespace digest, or a key to go on from.
        salt: whatever else sets this prompt apart (a tenant, a LoRA, an image). Given with the
            first block it is part of every key; going on from a key, leave it out.

    Returns:
        one key of 32 bytes per full block, each depending on all before it.

    Raises:
        ValueError: for ``block_tokens`` below 1.
        OverflowError: for a token id outside its range.
    """
    if block_tokens < 1:
        raise ValueError(f"block_tokens is {block_tokens}; it must be at least 1")
    ids = array("I", tokens)
    if sys.byteorder == "big":
        ids.byteswap()
    data = memoryview(ids).cast("B")
    step = block_tokens * ids.itemsize
    # The salt stands under its own digest, so that no salt can pass for a part of the root.
    parent = root if not salt else root + blake2b(salt, digest_size=DIGEST_NBYTES).digest()
    keys: list[bytes] = []
    for at in range(0, len(data) - step + 1, step):
        chain = blake2b(parent, digest_size=DIGEST_NBYTES, person=b"kvcache.key")
        chain.update(data[at : at + step])
        parent = chain.digest()
        keys.append(parent)
    return keys


def namespaced_key(namespace: bytes, key: bytes) -> bytes:
    """What a block is called outside its stack: the namespace digest, then the key."""
    return namespace + key


def namespace_after_reset(namespace: bytes, reset: bytes) -> bytes:
    """Return the name of ``namespace`` after a ``reset`` (random bytes); itself without a reset.

    As long as ``namespace``, or 32 bytes where that is empty.
    """
    if not reset:
        return namespace
    nbytes = len(namespace) or DIGEST_NBYTES
    return blake2b(namespace + reset, digest_size=nbytes, person=b"kvcache.reset").digest()


Keys = tuple[bytes, ...]


def common_prefix_len(ours: Keys, first: int, theirs: Keys, at: int) -> int:
    """How many keys ``ours`` from ``first`` and ``theirs`` from ``at`` begin with alike."""
    most = min(len(ours) - first, len(theirs) - at)
    ours, theirs = ours[first : first + most], theirs[at : at + most]
    return most if ours == theirs else next(compress(count(), map(ne, ours, theirs)))
