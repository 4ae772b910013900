"""What every tier promises, as tests."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from kvcache.testing.blocks import block_of, keys_of, run_in_threads
from kvcache.tier import Tier

AFTER_BLOCK = 64  # bytes of a buffer behind the block's, which no tier may touch


class TierTests:
    """Every tier: opaque blocks under opaque keys, answered per key and in order.

    The fixture ``tier`` gives an empty one with room for ``room_blocks`` blocks of ``block_nbytes``
    bytes, and closes it.
    """

    block_nbytes: int = 4096
    room_blocks: int = 64

    def blocks(self, keys: Sequence[bytes]) -> list[memoryview]:
        """The blocks that belong to ``keys``, read-only."""
        return [memoryview(block_of(key, self.block_nbytes)) for key in keys]

    def put(self, tier: Tier, keys: Sequence[bytes]) -> None:
        """Store the blocks that belong to ``keys``."""
        assert tier.store(keys, self.blocks(keys)) == [True] * len(keys)

    def check_load(self, tier: Tier, keys: Sequence[bytes], held: Sequence[bool]) -> None:
        """Load ``keys``: exactly those ``held`` come, whole, and no other byte is written."""
        clean = b"\xa5" * (self.block_nbytes + AFTER_BLOCK)
        into = [bytearray(clean) for _ in keys]
        assert tier.load(keys, [memoryview(buffer) for buffer in into]) == [
            self.block_nbytes if there else 0 for there in held
        ]
        for key, there, buffer in zip(keys, held, into, strict=True):
            block = block_of(key, self.block_nbytes) if there else clean[: self.block_nbytes]
            assert buffer[: self.block_nbytes] == block, "these are not the bytes that belong here"
            assert buffer[self.block_nbytes :] == clean[self.block_nbytes :], "written past a block"

    def test_blocks_come_back_as_they_were(self, tier: Tier) -> None:
        keys = keys_of("back", 5)
        assert tier.contains(keys) == [False] * 5
        self.check_load(tier, keys, [False] * 5)
        self.put(tier, keys)
        assert tier.contains(keys) == [True] * 5
        self.check_load(tier, keys, [True] * 5)
        self.check_load(tier, keys, [True] * 5)  # reading uses nothing up

    def test_answers_are_per_key_and_in_order(self, tier: Tier) -> None:
        keys = keys_of("order", 6)
        self.put(tier, keys[1::2])
        held = [False, True] * 3
        assert tier.contains(keys) == held
        self.check_load(tier, keys, held)
        assert tier.contains(tuple(reversed(keys))) == held[::-1]
        self.check_load(tier, tuple(reversed(keys)), held[::-1])

    def test_a_held_key_stays_as_it_is(self, tier: Tier) -> None:
        keys = keys_of("again", 3)
        self.put(tier, keys[:2])
        other = memoryview(bytes(self.block_nbytes))
        tier.store(keys[:2], [other, other])
        self.check_load(tier, keys, [True, True, False])
        self.put(tier, keys)  # held ones and a new one in one batch
        self.check_load(tier, keys, [True] * 3)

    def test_what_a_batch_continues_changes_no_answer(self, tier: Tier) -> None:
        first, second, other = keys_of("chain", 2), keys_of("chain", 5)[2:], keys_of("other", 2)
        assert tier.store(first, self.blocks(first), None) == [True] * 2
        assert tier.store(second, self.blocks(second), first[-1]) == [True] * 3
        assert tier.store(other, self.blocks(other), b"never seen" * 3) == [True] * 2
        tier.remove(first)
        self.check_load(tier, [*first, *second, *other], [False] * 2 + [True] * 5)

    def test_empty_batches(self, tier: Tier) -> None:
        assert tier.contains([]) == []
        assert tier.load([], []) == []
        assert tier.store([], []) == []
        tier.remove([])

    def test_remove_forgets_these_and_no_others(self, tier: Tier) -> None:
        keys = keys_of("gone", 6)
        self.put(tier, keys[:4])
        tier.remove(keys[1:3])
        self.check_load(tier, keys, [True, False, False, True, False, False])
        tier.remove(keys)  # some held, some gone, some never there
        assert tier.contains(keys) == [False] * 6
        self.put(tier, keys)

    def test_bytes_are_copied_in_and_out(self, tier: Tier) -> None:
        keys = keys_of("copy", 1)
        buffer = bytearray(block_of(keys[0], self.block_nbytes))
        tier.store(keys, [memoryview(buffer)])
        buffer[:] = bytes(len(buffer))
        self.check_load(tier, keys, [True])
        tier.load(keys, [memoryview(buffer)])
        buffer[:] = bytes(len(buffer))
        self.check_load(tier, keys, [True])

    def test_keys_of_any_length_and_any_bytes(self, tier: Tier) -> None:
        keys = [keys_of("length", 1, nbytes)[0] for nbytes in (16, 32, 64)]
        keys += [keys[2][:16], keys[2][:32]]  # where one ends, the other goes on
        keys += [bytes(16), bytes(32), bytes(64), b"\xff" * 32, b"../" * 10 + b"\n\0"]
        for at, key in enumerate(keys):
            assert tier.contains([key]) == [False], "two keys were taken for one"
            self.put(tier, [key])
            self.check_load(tier, keys[: at + 1], [True] * (at + 1))

    def test_a_key_twice_in_a_batch(self, tier: Tier) -> None:
        key, other = keys_of("twice", 2)
        twice = [key, other, key]
        zeros = memoryview(bytes(self.block_nbytes))
        assert tier.store(twice, [*self.blocks(twice[:2]), zeros]) == [True] * 3
        assert tier.contains(twice) == [True] * 3
        self.check_load(tier, twice, [True] * 3)  # the first stayed
        tier.remove([key, key])
        assert tier.contains(twice) == [False, True, False]

    def test_as_many_blocks_as_there_is_room_for(self, tier: Tier) -> None:
        keys = keys_of("many", self.room_blocks)
        self.put(tier, keys)
        assert tier.contains(keys) == [True] * len(keys)
        self.check_load(tier, keys, [True] * len(keys))

    def test_resolving_and_forgetting_leave_other_namespaces(self, tier: Tier) -> None:
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

    def test_closing_twice(self, tier: Tier) -> None:
        self.put(tier, keys_of("close", 1))
        tier.close()
        tier.close()

    def test_several_threads(self, tier: Tier) -> None:
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
                        assert buffer == block_of(key, self.block_nbytes), "another key's bytes"
                tier.remove(own)
                assert tier.contains(own) == [False] * 2

        run_in_threads(threads, work)
