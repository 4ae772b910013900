"""What a live stack is asked for is written in the background, within bounds, and replays."""

import json
import logging
import os
import stat
import threading
from pathlib import Path

import pytest

from kvcache.keys import block_keys
from kvcache.profiles import ProfileError, open_stack
from kvcache.replay import recorder
from kvcache.replay.recorder import SILENT, FileRecorder, opened
from kvcache.replay.simulate import replay
from kvcache.replay.trace import Trace, read
from kvcache.stack import Stack

TOKENS = 16


def recorded(path: Path) -> Trace:
    with path.open("rb") as file:
        return read(file, path.name)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", "1MiB")
    monkeypatch.setenv("KVCACHE_RECORD", str(tmp_path / "asked.jsonl"))
    return tmp_path / "asked.jsonl"


def live() -> Stack:
    stack = open_stack(block_nbytes=4096, block_tokens=TOKENS)
    stack.front.slab.wait_populated()
    return stack


def ask(stack: Stack, keys: list[bytes]) -> int:
    match = stack.match(keys).result()
    stack.reserve(keys[match.blocks :], keys[match.blocks - 1] if match.blocks else None).end()
    return match.blocks


def test_a_live_stack_replays(path: Path) -> None:
    first = block_keys(range(5 * TOKENS), TOKENS)
    other = block_keys([*range(2 * TOKENS), *[7] * 2 * TOKENS], TOKENS)
    with live() as stack:
        found = [ask(stack, keys) for keys in (first, other, first)]
    assert found == [0, 2, 5]
    trace = recorded(path)
    assert trace.block_tokens == TOKENS
    assert list(trace.tokens) == [80, 64, 80]
    assert [list(chain) for chain in trace.chains()] == [
        [0, 1, 2, 3, 4], [0, 1, 5, 6], [0, 1, 2, 3, 4],
    ]  # fmt: skip
    assert replay(trace, "lru", [256]).hit_blocks == sum(found)


def test_no_key_is_in_the_file(path: Path) -> None:
    keys = block_keys(range(3 * TOKENS), TOKENS)
    with live() as stack:
        ask(stack, keys)
    fields = json.loads(path.read_text())
    assert set(fields) == {
        "timestamp", "input_length", "output_length", "hash_ids", "block_tokens",
    }  # fmt: skip
    for key, number in zip(keys, fields["hash_ids"], strict=True):
        assert number < 2**48
        assert number.to_bytes(6, "big") not in key


@pytest.mark.parametrize(("there", "mode"), [(False, 0o600), (True, 0o644)])
def test_recording_that_is_made_is_its_owners_alone(path: Path, there: bool, mode: int) -> None:
    if there:
        path.touch()
        path.chmod(0o644)
    before = os.umask(0)
    try:
        live().close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode  # that of a file that was there is its owner's


def test_lines_are_added_and_time_goes_on(path: Path) -> None:
    keys = block_keys(range(3 * TOKENS), TOKENS)
    for _ in range(2):
        with live() as stack:
            ask(stack, keys)
    times = [json.loads(line)["timestamp"] for line in path.read_text().splitlines()]
    assert len(times) == 2
    assert times == sorted(times)
    assert recorded(path).distinct == 3


def test_a_stack_that_knows_no_tokens_counts_blocks(path: Path) -> None:
    with open_stack(block_nbytes=4096) as stack:
        stack.match([b"a", b"b"]).result()
    trace = recorded(path)
    assert (trace.block_tokens, list(trace.tokens)) == (1, [2])


def test_a_full_file_ends_with_a_whole_line_and_is_said_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KVCACHE_RECORD_LIMIT", "1KB")
    with live() as stack:
        for n in range(40):
            ask(stack, block_keys([n] * TOKENS, TOKENS))
    assert 800 < path.stat().st_size <= 1000
    assert len(recorded(path)) > 5
    [said] = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert "no more requests are recorded" in said
    assert "KVCACHE_RECORD_LIMIT" in said


def test_a_disk_that_is_full_is_said_and_stops_nobody(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = FileRecorder(path, block_tokens=TOKENS, limit=1 << 20)
    with Path("/dev/full").open("ab", buffering=0) as full:
        os.dup2(full.fileno(), ours._file.fileno())
    ours.record([b"a"])
    ours.record([b"b"])
    ours.close()
    ours.close()
    [said] = [each.getMessage() for each in caplog.records]
    assert "No space left" in said


def test_who_comes_too_fast_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    going, go = threading.Event(), threading.Event()
    line = FileRecorder._line

    def slow(self: FileRecorder, *request: object) -> bytes:
        going.set()
        assert go.wait(60)
        return line(self, *request)  # type: ignore[arg-type]

    monkeypatch.setattr(FileRecorder, "_line", slow)
    monkeypatch.setattr(recorder, "QUEUE", 3)
    path = tmp_path / "asked.jsonl"
    ours = FileRecorder(path, block_tokens=TOKENS, limit=1 << 20)
    ours.record([b"first"])
    assert going.wait(60)
    for n in range(5):
        ours.record([b"%d" % n])
    go.set()
    ours.close()
    assert len(recorded(path)) == 4
    assert "2 requests came faster" in caplog.text


def test_without_the_variable_nothing_is_recorded() -> None:
    assert opened(TOKENS, {}) is SILENT
    assert opened(TOKENS, {"KVCACHE_RECORD": ""}) is SILENT
    SILENT.record([b"a"])
    SILENT.close()


def test_a_recording_is_for_its_owner_alone(path: Path) -> None:
    FileRecorder(path, block_tokens=TOKENS, limit=1 << 20).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_what_is_no_regular_file_is_refused_at_start(
    kind: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    monkeypatch.setenv("KVCACHE_RECORD", "/dev/full" if kind == "device" else str(path))
    with pytest.raises(ProfileError, match="environment variable KVCACHE_RECORD: cannot write"):
        live()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("KVCACHE_RECORD", "/no/such/folder/f", 'cannot write "/no/such/folder/f": No such file'),
        ("KVCACHE_RECORD_LIMIT", "lots", 'KVCACHE_RECORD_LIMIT: "lots": not a size; write'),
    ],
)
def test_what_cannot_be_had_is_one_error_at_start(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ProfileError, match="environment variable") as refused:
        live()
    assert said in str(refused.value)
