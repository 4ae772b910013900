"""Shipped profiles with an object store: stacks share blocks, and recompute lost ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path

import pytest

pytest.importorskip("obstore")
pytest.importorskip("xxhash")

from kvcache.profiles import open_tiers
from kvcache.stack import Stack
from kvcache.testing import block_of, keys_of
from tests.support import profile_stacks, s3_server
from tests.support.profile_stacks import KEYS, NAMESPACE, NBYTES, check, load_prefix, opened_stack
from tests.support.s3_server import Server
from tests.support.waiting import eventually

Open = Callable[..., Stack]
store = partial(profile_stacks.store, flush_s=60)
_prefixes = (f"profile-{number}" for number in count())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_server.server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def prefix() -> str:
    """A prefix without objects."""
    return next(_prefixes)


@pytest.fixture
def opened(
    server: Server, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Open]:
    """Opens a stack of a shipped profile for one engine, on the server."""
    s3_server.set_login(monkeypatch)
    with ExitStack() as stacks:

        def opened(
            profile: str, engine: str, namespace: bytes = NAMESPACE, deadline_s: float = 60,
            lookup: str = "",
        ) -> Stack:  # fmt: skip
            monkeypatch.setenv("KVCACHE__L1__CAPACITY", "4MiB")
            options: dict[str, object] = {"deadline_s": deadline_s, "timeout_s": deadline_s}
            if lookup:
                options["lookup"] = lookup
            for name, value in server.variables("object", prefix, **options).items():
                monkeypatch.setenv(name, value)
            if "disk" in profile:
                monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path / engine))
                monkeypatch.setenv("KVCACHE__DISK__CAPACITY", "4MiB")
            return stacks.enter_context(opened_stack(profile, namespace))

        yield opened


def object_of(server: Server, prefix: str, key: bytes) -> str:
    [name] = [each for each in server.names(prefix) if each.endswith(key.hex())]
    return name


@pytest.mark.parametrize("profile", ["l1-object", "l1-disk-object"])
def test_stacks_on_one_bucket_load_each_others_blocks(
    opened: Open, server: Server, prefix: str, profile: str
) -> None:
    first, second = opened(profile, "first"), opened(profile, "second")
    store(first)
    assert len(server.names(prefix)) == len(KEYS)
    assert load_prefix(second, [*KEYS, *keys_of("more", 2)]) == len(KEYS)
    assert load_prefix(opened(profile, "other model", keys_of("other", 1)[0])) == 0
    store(opened(profile, "third"))  # the bucket has the blocks already
    assert len(server.names(prefix)) == len(KEYS)
    check(first, len(KEYS))


def test_objects_deleted_by_a_lifecycle_rule_end_the_prefix(
    opened: Open, server: Server, prefix: str
) -> None:
    store(opened("l1-object", "first"))
    for key in KEYS[7:9]:
        server.delete(object_of(server, prefix, key))
    second = opened("l1-object", "second")
    assert load_prefix(second) == 7
    store(second)
    assert load_prefix(opened("l1-object", "third")) == len(KEYS)


@pytest.mark.parametrize("damage", ["truncated", "swapped", "replaced"])
def test_damaged_object_ends_the_prefix_and_is_removed(
    opened: Open, server: Server, prefix: str, damage: str
) -> None:
    store(opened("l1-object", "first"))
    name = object_of(server, prefix, KEYS[5])
    value = server.get(name)
    damaged = {
        "truncated": value[: len(value) // 2],
        "swapped": server.get(object_of(server, prefix, KEYS[6])),
        "replaced": value[:9000] + b"damage" + value[9006:],
    }
    server.put(name, damaged[damage])
    second = opened("l1-object", "second")
    assert load_prefix(second) == 5
    assert name not in server.names(prefix)
    [lower] = second.stats().lower
    assert sum(lower.usage.rejected_blocks.values()) == 1
    store(second)
    assert load_prefix(opened("l1-object", "third")) == len(KEYS)


def test_direct_tiers_find_the_blocks_of_a_stack(opened: Open, server: Server, prefix: str) -> None:
    store(opened("l1-object", "first"))
    with open_tiers("l1-object", block_nbytes=NBYTES, namespace=NAMESPACE) as tiers:
        new = keys_of("direct", 2)
        blocks = [memoryview(block_of(key, NBYTES)) for key in new]
        assert tiers.store(new, blocks) == [True] * 2
        keys = [*KEYS[:3], *new, *keys_of("missing", 1)]
        into = [bytearray(NBYTES) for _ in keys]
        held = [True] * 5 + [False]
        assert tiers.load(keys, [memoryview(buffer) for buffer in into]) == held
    for key, buffer in zip(keys[:5], into, strict=False):
        assert buffer == block_of(key, NBYTES)
    assert len(server.names(prefix)) == len(KEYS) + 2


def test_reset_outlasts_the_engine(opened: Open) -> None:
    first = opened("l1-object", "first")
    store(first)
    assert load_prefix(opened("l1-object", "second")) == len(KEYS)
    first.clear()
    assert load_prefix(first) == 0
    assert load_prefix(opened("l1-object", "third")) == 0


def test_stopped_server_stalls_no_request_and_keeps_no_slot(opened: Open, server: Server) -> None:
    first, second = opened("l1-object", "first"), opened("l1-object", "second", deadline_s=0.5)
    store(first)
    with server.stopped():
        assert load_prefix(second) == 0
        store(second)
        eventually(lambda: second.stats().pinned_slots == 0, "every slot comes back")
        check(second, len(KEYS))


def test_killed_server_costs_hits_and_recovers(opened: Open, server: Server, prefix: str) -> None:
    first, second = opened("l1-object", "first"), opened("l1-object", "second")
    store(first)
    server.kill()
    assert load_prefix(second) == 0
    assert load_prefix(first) == len(KEYS)  # from L1
    store(second, keys_of("while it is down", 5))
    check(second, 5)
    server.start()
    second.front.clear()
    before = len(server.names(prefix))
    more = [keys_of(f"again {at}", 1) for at in range(10_000)]

    def recovered() -> bool:  # the circuit breaker tries again after a second
        store(second, more.pop())
        return len(server.names(prefix)) > before

    eventually(recovered, "it is asked again")
