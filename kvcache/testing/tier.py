"""The contract of every tier, as tests."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from kvcache.keys import MAX_KEY_NBYTES, Branch
from kvcache.stats import usage_of
from kvcache.testing.blocks import block_of, collect_warnings, keys_of, run_in_threads
from kvcache.tier import Tier

GUARD_NBYTES = 64  # after the block in each buffer; no tier may write them


class TierTests:
    """The contract of ``kvcache.Tier``: opaque blocks under opaque keys, results per key in order.

    The fixture ``tier`` yields an empty tier with room for ``room_blocks`` blocks of
    ``block_nbytes`` bytes, and closes it.
    """

    block_nbytes: int = 4096
    room_blocks: int = 64

    def blocks(self, keys: Sequence[bytes]) -> list[memoryview]:
        """Return the blocks that belong to ``keys``, read-only."""
        return [memoryview(block_of(key, self.block_nbytes)) for key in keys]

    def put(self, tier: Tier, keys: Sequence[bytes]) -> None:
        """Store the blocks that belong to ``keys``."""
        assert tier.store(keys, self.blocks(keys)) == [True] * len(keys)

    def check_load(self, tier: Tier, keys: Sequence[bytes], held: Sequence[bool]) -> None:
        """Load ``keys``: exactly those ``held`` are loaded, and no other byte is written."""
        clean = b"\xa5" * (self.block_nbytes + GUARD_NBYTES)
        into = [bytearray(clean) for _ in keys]
        assert tier.load(keys, [memoryview(buffer) for buffer in into]) == [
            self.block_nbytes if is_held else 0 for is_held in held
        ]
        for key, is_held, buffer in zip(keys, held, into, strict=True):
            block = block_of(key, self.block_nbytes) if is_held else clean[: self.block_nbytes]
            assert buffer[: self.block_nbytes] == block, "a wrong block was loaded"
            assert buffer[self.block_nbytes :] == clean[self.block_nbytes :], (
                "the tier wrote after the block"
            )

    def test_load_after_store_returns_the_bytes(self, tier: Tier) -> None:
        keys = keys_of("back", 5)
        assert tier.contains(keys) == [False] * 5
        self.check_load(tier, keys, [False] * 5)
        self.put(tier, keys)
        assert tier.contains(keys) == [True] * 5
        self.check_load(tier, keys, [True] * 5)
        self.check_load(tier, keys, [True] * 5)  # a load changes nothing

    def test_results_are_per_key_and_in_order(self, tier: Tier) -> None:
        keys = keys_of("order", 6)
        self.put(tier, keys[1::2])
        held = [False, True] * 3
        assert tier.contains(keys) == held
        self.check_load(tier, keys, held)
        assert tier.contains(tuple(reversed(keys))) == held[::-1]
        self.check_load(tier, tuple(reversed(keys)), held[::-1])

    def test_store_of_a_held_key_changes_nothing(self, tier: Tier) -> None:
        keys = keys_of("again", 3)
        self.put(tier, keys[:2])
        other = memoryview(bytes(self.block_nbytes))
        tier.store(keys[:2], [other, other])
        self.check_load(tier, keys, [True, True, False])
        self.put(tier, keys)  # one batch with held keys and a new one
        self.check_load(tier, keys, [True] * 3)

    def test_parent_changes_no_result(self, tier: Tier) -> None:
        first, second, other = keys_of("chain", 2), keys_of("chain", 5)[2:], keys_of("other", 2)
        assert tier.store(first, self.blocks(first), None) == [True] * 2
        assert tier.store(second, self.blocks(second), first[-1]) == [True] * 3
        assert tier.store(other, self.blocks(other), b"never seen" * 3) == [True] * 2
        tier.remove(first)
        self.check_load(tier, [*first, *second, *other], [False] * 2 + [True] * 5)

    def test_store_branches_stores_each_segment(self, tier: Tier) -> None:
        chain, sides = keys_of("branch", 4), keys_of("side", 3, 66)
        tier.store(chain[:1], self.blocks(chain[:1]))
        branches: list[Branch] = [(chain[1:], chain[0])]
        branches += [([side], parent) for side, parent in zip(sides, chain, strict=False)]
        keys = [*chain[1:], *sides]
        assert tier.store_branches(branches, self.blocks(keys)) == [True] * 6
        assert tier.store_branches(branches, self.blocks(keys)) == [True] * 6
        assert tier.store_branches([], []) == []
        self.check_load(tier, [*chain, *sides, b"absent"], [True] * 7 + [False])

    def test_empty_batch_does_nothing(self, tier: Tier) -> None:
        assert tier.contains([]) == []
        assert tier.load([], []) == []
        assert tier.store([], []) == []
        tier.remove([])

    def test_remove_removes_only_its_keys(self, tier: Tier) -> None:
        keys = keys_of("gone", 6)
        self.put(tier, keys[:4])
        tier.remove(keys[1:3])
        self.check_load(tier, keys, [True, False, False, True, False, False])
        tier.remove(keys)  # one batch with held, removed and unknown keys
        assert tier.contains(keys) == [False] * 6
        self.put(tier, keys)

    def test_store_and_load_copy_the_bytes(self, tier: Tier) -> None:
        keys = keys_of("copy", 1)
        buffer = bytearray(block_of(keys[0], self.block_nbytes))
        tier.store(keys, [memoryview(buffer)])
        buffer[:] = bytes(len(buffer))
        self.check_load(tier, keys, [True])
        tier.load(keys, [memoryview(buffer)])
        buffer[:] = bytes(len(buffer))
        self.check_load(tier, keys, [True])

    def test_keys_of_any_length_and_bytes_are_distinct(self, tier: Tier) -> None:
        longest = keys_of("longest", 1, MAX_KEY_NBYTES)[0]
        keys = [keys_of("length", 1, nbytes)[0] for nbytes in (16, 32, 66)]
        keys += [longest[:nbytes] for nbytes in (MAX_KEY_NBYTES, 1, 32, 64, 65)]
        keys += [keys[2][:16], keys[2][:32]]  # keys that are prefixes of other keys
        keys += [bytes(16), bytes(32), bytes(66), b"\xff" * 32, b"../" * 10 + b"\n\0"]
        for at, key in enumerate(keys):
            assert tier.contains([key]) == [False], "two keys were confused"
            self.put(tier, [key])
            self.check_load(tier, keys[: at + 1], [True] * (at + 1))

    def test_key_longer_than_the_contract_is_kept_or_declined(self, tier: Tier) -> None:
        [longest] = keys_of("cut", 1, MAX_KEY_NBYTES)
        key, other = longest + b"1", longest + b"2"
        stored = tier.store([key], self.blocks([key]), other)
        assert tier.contains([key, other, longest]) == [*stored, False, False], "a key was cut"
        self.check_load(tier, [key, other, longest], [*stored, False, False])
        self.put(tier, [longest])
        [child] = keys_of("child", 1)
        assert tier.store([child], self.blocks([child]), key * 8) == [True]
        self.check_load(tier, [child], [True])

    def test_key_twice_in_a_batch_is_one_block(self, tier: Tier) -> None:
        key, other = keys_of("twice", 2)
        twice = [key, other, key]
        zeros = memoryview(bytes(self.block_nbytes))
        assert tier.contains(twice) == [False] * 3
        self.check_load(tier, twice, [False] * 3)
        assert tier.store(twice, [*self.blocks(twice[:2]), zeros]) == [True] * 3
        assert tier.contains(twice) == [True] * 3
        self.check_load(tier, twice, [True] * 3)  # the first block was kept
        tier.remove([key, key])
        assert tier.contains(twice) == [False, True, False]
        self.check_load(tier, twice, [False, True, False])

    def test_key_twice_in_branches_is_one_block(self, tier: Tier) -> None:
        key, other, third = keys_of("twice in branches", 3)
        branches: list[Branch] = [([key, other], None), ([third, key], other), ([key], third)]
        twice = [key, other, third, key, key]
        zeros = memoryview(bytes(self.block_nbytes))
        assert tier.store_branches(branches, [*self.blocks(twice[:3]), zeros, zeros]) == [True] * 5
        self.check_load(tier, twice, [True] * 5)  # the first block was kept
        assert tier.store_branches(branches, [zeros] * 5) == [True] * 5
        self.check_load(tier, twice, [True] * 5)

    def test_declined_block_is_counted_and_its_reason_logged_once(self, tier: Tier) -> None:
        keys = keys_of("declined", 2, MAX_KEY_NBYTES + 1)
        before = sum(usage_of(tier).declined_blocks.values())
        with collect_warnings() as logged:
            stored = [
                is_stored
                for batch in (keys, [keys[0], keys[0]])  # each position is a block
                for is_stored in tier.store(batch, self.blocks(batch))
            ]
        declined = sum(usage_of(tier).declined_blocks.values()) - before
        assert declined == stored.count(False), "usage() does not count the declined blocks"
        if declined:
            assert len(logged) == 1, "the reason was not logged once"

    def test_room_blocks_fit(self, tier: Tier) -> None:
        keys = keys_of("many", self.room_blocks)
        self.put(tier, keys)
        assert tier.contains(keys) == [True] * len(keys)
        self.check_load(tier, keys, [True] * len(keys))

    def test_resolve_and_forget_keep_other_namespaces(self, tier: Tier) -> None:
        namespace, other = keys_of("namespace", 2, 32)
        own = keys_of("own", 2, 32)
        name = tier.resolve(namespace, "{}")
        assert len(name) == len(namespace)
        assert tier.resolve(namespace, "") == name
        elsewhere = [tier.resolve(other, "") + key for key in own]
        self.put(tier, elsewhere)
        with suppress(NotImplementedError):
            tier.forget(namespace)
        self.check_load(tier, elsewhere, [True] * 2)

    def test_close_twice_is_allowed(self, tier: Tier) -> None:
        self.put(tier, keys_of("close", 1))
        tier.close()
        tier.close()

    def test_threads_do_not_mix_up_blocks(self, tier: Tier) -> None:
        shared, threads = keys_of("threads", 6), 4

        def work(thread: int) -> None:
            own = keys_of(f"thread {thread}", 2)
            for turn in range(20):
                self.put(tier, own)
                self.check_load(tier, own, [True] * 2)
                tier.store(shared, self.blocks(shared))
                tier.remove([shared[(thread + turn) % len(shared)]])
                for key in shared:
                    buffer = bytearray(self.block_nbytes)
                    if tier.load([key], [memoryview(buffer)])[0]:
                        assert buffer == block_of(key, self.block_nbytes), (
                            "the tier returned another key's block"
                        )
                tier.remove(own)
                assert tier.contains(own) == [False] * 2

        run_in_threads(threads, work)
