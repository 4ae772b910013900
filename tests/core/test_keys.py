"""Equal keys mean equal prefixes, and equal namespaces mean blocks that may be shared."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.keys import DIGEST_NBYTES, block_keys, namespace, namespaced_key

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(tokens, st.integers(1, 9))
def test_block_keys_returns_one_key_per_full_block(ids: list[int], block: int) -> None:
    keys = block_keys(ids, block)
    assert len(keys) == len(ids) // block
    assert all(len(key) == DIGEST_NBYTES for key in keys)
    assert len(set(keys)) == len(keys)


@given(tokens, st.integers(1, 9), st.data())
def test_block_keys_depend_on_every_token_before(
    ids: list[int], block: int, data: st.DataObject
) -> None:
    keys = block_keys(ids, block)
    if not keys:
        return
    at = data.draw(st.integers(0, len(keys) * block - 1))
    changed = [*ids[:at], ids[at] ^ 1, *ids[at + 1 :]]
    others = block_keys(changed, block)
    first = at // block
    assert others[:first] == keys[:first]
    assert not set(others[first:]) & set(keys)


@given(tokens, st.integers(1, 9), st.integers(0, 40))
def test_block_keys_with_a_key_as_root_continue_its_chain(
    ids: list[int], block: int, at: int
) -> None:
    keys = block_keys(ids, block, root=b"space", salt=b"tenant")
    at = min(at, len(keys))
    if at:
        assert block_keys(ids[at * block :], block, root=keys[at - 1]) == keys[at:]


def test_block_keys_differ_by_root_salt_and_block_size() -> None:
    ids = list(range(12))
    chains = [
        block_keys(ids, 4),
        block_keys(ids, 6),
        block_keys(ids, 4, root=b"a"),
        block_keys(ids, 4, salt=b"a"),
        block_keys(ids, 4, root=b"a", salt=b"a"),
    ]
    assert len({key for chain in chains for key in chain}) == sum(map(len, chains))


def test_digests_are_stable_across_processes() -> None:
    assert block_keys([1, 2, 3, 2**32 - 1], 2, root=b"r", salt=b"s")[-1].hex() == (
        "8ca0b6b8d52d2a1ce42bac3cf71f5892f4f6e99d3ea0e0aecaee9fd7822a00b0"
    )
    assert namespace({"model": "m", "tp": 2}).hex() == (
        "edb2ce14cc861351e46a9443a2235a703d8abababaa0efbf1ac0d382235db7f6"
    )


@pytest.mark.parametrize("block", [0, -1])
def test_block_keys_with_less_than_a_token_per_block_raises(block: int) -> None:
    with pytest.raises(ValueError, match=f"block_tokens is {block}; it must be at least 1"):
        block_keys([1], block)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_block_keys_with_a_token_out_of_range_raises(token: int) -> None:
    with pytest.raises(OverflowError):
        block_keys([token], 1)


def test_namespace_depends_on_fields_but_not_on_their_order() -> None:
    fields = {"model": "m", "dtype": "bf16", "tp": 2, "lora": None, "layers": ["a", "b"]}
    assert namespace(fields) == namespace(dict(reversed(fields.items())))
    for name, other in {"model": "n", "tp": "2", "lora": "", "layers": ["b", "a"]}.items():
        assert namespace(fields | {name: other}) != namespace(fields)
    assert namespace({"ab": "c"}) != namespace({"a": "bc"})


def test_namespace_of_a_value_without_json_raises() -> None:
    with pytest.raises(TypeError):
        namespace({"model": object()})


def test_namespaced_key_is_namespace_then_key() -> None:
    assert namespaced_key(b"space", b"key") == b"spacekey"
