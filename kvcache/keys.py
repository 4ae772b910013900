"""Identity: the digest of a namespace, and the chain of keys over the blocks of a prompt.

Invariants:

* A block's key depends on every token before it: equal keys mean equal prefixes (256-bit BLAKE2b).
* A namespace digest depends on everything that makes bytes incompatible, names and values both.
* An engine's own block hashes are used as keys unchanged; nothing is hashed twice.
* Chains that are kept are tuples of keys: slices and comparisons run in C, and Python's garbage
  collector stops tracking them.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import compress, count
from operator import ne

DIGEST_NBYTES = 32
MAX_KEY_NBYTES = 80  # every tier takes keys of 1 to so many bytes
MAX_SHOWN_CHARS = 200  # of a field's value; a longer one is shown as its digest


def namespace(fields: Mapping[str, object]) -> bytes:
    """Digest of everything that must be equal for two engines to share a block.

    Args:
        fields: names and values (strings, numbers, booleans, ``None``, lists and mappings of them):
            model, revision, dtype, block tokens, layout, attention backend, parallel sizes, salt...

    Returns:
        32 bytes. The order of the fields does not matter; types do (``1`` is not ``"1"``).

    Raises:
        TypeError: for a value without a JSON form: its text may differ between processes.
    """
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return blake2b(text.encode(), digest_size=DIGEST_NBYTES, person=b"kvcache.ns").digest()


def describe_namespace(fields: Mapping[str, object]) -> str:
    """The fields of a namespace as JSON for people; long values as digests, no fields as ``""``."""
    shown = {}
    for name, value in fields.items():
        text = json.dumps(value, default=str)
        digest = blake2b(text.encode(), digest_size=8).hexdigest()
        shown[name] = value if len(text) <= MAX_SHOWN_CHARS else f"digest {digest}"
    return json.dumps(shown, default=str) if shown else ""


def block_keys(
    tokens: Iterable[int], block_tokens: int, *, root: bytes = b"", salt: bytes = b""
) -> list[bytes]:
    """Keys of the full blocks of a prompt, for callers without an engine that hashes blocks.

    Args:
        tokens: token ids, 0 <= id < 2**32.
        block_tokens: tokens per block; a partial last block gets no key.
        root: what the first block continues: a namespace digest, or the key of a block.
        salt: whatever else distinguishes this prompt (a tenant, a LoRA, an image). It becomes part
            of every key. Leave it out when ``root`` is the key of a block, which includes it.

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
    # The salt is hashed first, so that no salt can be mistaken for a part of the root.
    parent = root if not salt else root + blake2b(salt, digest_size=DIGEST_NBYTES).digest()
    keys: list[bytes] = []
    for begin in range(0, len(data) - step + 1, step):
        chain = blake2b(parent, digest_size=DIGEST_NBYTES, person=b"kvcache.key")
        chain.update(data[begin : begin + step])
        parent = chain.digest()
        keys.append(parent)
    return keys


def namespaced_key(namespace: bytes, key: bytes) -> bytes:
    """The key under which lower tiers hold a block: the namespace, then the key."""
    return namespace + key


RESET_NBYTES = 16
"""The random bytes that a reset writes."""


def namespace_after_reset(namespace: bytes, reset: bytes) -> bytes:
    """Derive the name of ``namespace`` after a reset.

    Args:
        namespace: the name before any reset.
        reset: random bytes that the reset wrote; empty if there was none.

    Returns:
        a name as long as ``namespace``, or of 32 bytes if that is empty; ``namespace`` itself
        without a reset.
    """
    if not reset:
        return namespace
    nbytes = len(namespace) or DIGEST_NBYTES
    return blake2b(namespace + reset, digest_size=nbytes, person=b"kvcache.reset").digest()


Keys = tuple[bytes, ...]

Branch = tuple[Sequence[bytes], bytes | None]
"""The keys of a segment of a chain, and the key that the first one continues, if any."""


def common_prefix_len(a: Keys, a_start: int, b: Keys, b_start: int) -> int:
    """The number of leading keys that ``a[a_start:]`` and ``b[b_start:]`` have in common."""
    longest = min(len(a) - a_start, len(b) - b_start)
    a, b = a[a_start : a_start + longest], b[b_start : b_start + longest]
    return longest if a == b else next(compress(count(), map(ne, a, b)))


def parents_of(branches: Sequence[Branch]) -> list[bytes | None]:
    """The parent of each key of the segments, in their order."""
    parents: list[bytes | None] = []
    for keys, parent in branches:
        if keys:
            parents.append(parent)
            parents += keys[:-1]
    return parents


def branches_of(keys: Sequence[bytes], parents: Sequence[bytes | None]) -> list[Branch]:
    """The longest segments of ``keys``, in their order, in which each key continues the last."""
    if not keys:
        return []
    begins = [0, *compress(count(1), map(ne, parents[1:], keys))]
    ends = [*begins[1:], len(keys)]
    return [(keys[at:end], parents[at]) for at, end in zip(begins, ends, strict=True)]
