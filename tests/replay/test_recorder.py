"""Recording: requests of a live stack are written in the background, within limits, and replay."""

import json
import logging
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvcache.keys import block_keys
from kvcache.profiles import ProfileError, open_stack
from kvcache.replay.recorder import NULL_RECORDER, FileRecorder, open_recorder
from kvcache.replay.simulate import replay
from kvcache.replay.trace import Trace, read
from kvcache.stack import Stack

TOKENS = 16


def read_file(path: Path) -> Trace:
    with path.open("rb") as file:
        return read(file, path.name)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", "1MiB")
    monkeypatch.setenv("KVCACHE_RECORD", str(tmp_path / "asked.jsonl"))
    return tmp_path / "asked.jsonl"


def open_live_stack() -> Stack:
    stack = open_stack(block_nbytes=4096, block_tokens=TOKENS)
    stack.front.slab.wait_populated()
    return stack


def serve(stack: Stack, keys: list[bytes]) -> int:
    """Serve a request; returns the number of blocks found."""
    match = stack.match(keys).result()
    stack.reserve(keys[match.blocks :], keys[match.blocks - 1] if match.blocks else None).end()
    return match.blocks


def test_recording_of_a_live_stack_replays_with_the_same_hits(path: Path) -> None:
    first = block_keys(range(5 * TOKENS), TOKENS)
    other = block_keys([*range(2 * TOKENS), *[7] * 2 * TOKENS], TOKENS)
    with open_live_stack() as stack:
        found = [serve(stack, keys) for keys in (first, other, first)]
    assert found == [0, 2, 5]
    trace = read_file(path)
    assert trace.block_tokens == TOKENS
    assert list(trace.tokens) == [80, 64, 80]
    assert [list(chain) for chain in trace.chains()] == [
        [0, 1, 2, 3, 4], [0, 1, 5, 6], [0, 1, 2, 3, 4],
    ]  # fmt: skip
    assert replay(trace, "lru", [256]).hit_blocks == sum(found)


def test_recording_has_no_key(path: Path) -> None:
    keys = block_keys(range(3 * TOKENS), TOKENS)
    with open_live_stack() as stack:
        serve(stack, keys)
    fields = json.loads(path.read_text())
    assert set(fields) == {
        "timestamp", "input_length", "output_length", "hash_ids", "block_tokens",
    }  # fmt: skip
    for key, number in zip(keys, fields["hash_ids"], strict=True):
        assert number < 2**48
        assert number.to_bytes(6, "big") not in key


@pytest.mark.parametrize(("exists", "mode"), [(False, 0o600), (True, 0o644)])
def test_recording_mode_is_private_for_a_new_file(path: Path, exists: bool, mode: int) -> None:
    if exists:
        path.touch()
        path.chmod(0o644)
    before = os.umask(0)
    try:
        open_live_stack().close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_recording_appends_with_rising_times(path: Path) -> None:
    keys = block_keys(range(3 * TOKENS), TOKENS)
    for _ in range(2):
        with open_live_stack() as stack:
            serve(stack, keys)
    times = [json.loads(line)["timestamp"] for line in path.read_text().splitlines()]
    assert len(times) == 2
    assert times == sorted(times)
    assert read_file(path).distinct == 3


def test_recording_without_block_tokens_counts_a_token_per_block(path: Path) -> None:
    with open_stack(block_nbytes=4096) as stack:
        stack.match([b"a", b"b"]).result()
    trace = read_file(path)
    assert (trace.block_tokens, list(trace.tokens)) == (1, [2])


def test_recording_at_its_limit_ends_with_a_whole_line_and_one_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KVCACHE_RECORD_LIMIT", "1KB")
    with open_live_stack() as stack:
        for n in range(40):
            serve(stack, block_keys([n] * TOKENS, TOKENS))
    assert 800 < path.stat().st_size <= 1000
    assert len(read_file(path)) > 5
    [message] = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert "later requests are not recorded" in message
    assert "KVCACHE_RECORD_LIMIT" in message


def descriptor_of(path: Path) -> int:
    """Return the number under which this process has ``path`` open."""
    [number] = [
        link.name for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link) == str(path)
    ]
    return int(number)


def test_recording_on_a_full_disk_stops_with_one_warning(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = FileRecorder(path, block_tokens=TOKENS, limit=1 << 20)
    with Path("/dev/full").open("ab", buffering=0) as full:
        os.dup2(full.fileno(), descriptor_of(path))
    recorder.record([b"a"])
    recorder.record([b"b"])
    recorder.close()
    recorder.close()
    [message] = [each.getMessage() for each in caplog.records]
    assert "No space left" in message


class Blocked(FileRecorder):
    """Writes nothing until ``resume`` is set."""

    writing = threading.Event()
    resume = threading.Event()

    def line(self, at_ms: int, tokens: int, keys: Sequence[bytes]) -> bytes:
        self.writing.set()
        assert self.resume.wait(60)
        return super().line(at_ms, tokens, keys)


def test_recorder_with_a_full_queue_skips_and_counts_requests(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "asked.jsonl"
    recorder = Blocked(path, block_tokens=TOKENS, limit=1 << 20, queue_requests=3)
    recorder.record([b"first"])
    assert recorder.writing.wait(60)
    for n in range(5):
        recorder.record([b"%d" % n])
    recorder.resume.set()
    recorder.close()
    assert len(read_file(path)) == 4
    assert "queue full; 2 requests are not in" in caplog.text


def test_open_recorder_without_the_variable_records_nothing() -> None:
    assert open_recorder(TOKENS, {}) is NULL_RECORDER
    assert open_recorder(TOKENS, {"KVCACHE_RECORD": ""}) is NULL_RECORDER
    NULL_RECORDER.record([b"a"])
    NULL_RECORDER.close()


def test_file_recorder_makes_a_private_file(path: Path) -> None:
    FileRecorder(path, block_tokens=TOKENS, limit=1 << 20).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_open_stack_with_an_irregular_recording_file_raises(
    kind: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    monkeypatch.setenv("KVCACHE_RECORD", "/dev/full" if kind == "device" else str(path))
    with pytest.raises(ProfileError, match="environment variable KVCACHE_RECORD: cannot write"):
        open_live_stack()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("KVCACHE_RECORD", "/no/such/folder/f", 'cannot write "/no/such/folder/f": No such file'),
        ("KVCACHE_RECORD_LIMIT", "lots", 'KVCACHE_RECORD_LIMIT: "lots": not a size; write'),
    ],
)
def test_open_stack_with_an_invalid_recording_variable_raises(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ProfileError, match="environment variable") as refused:
        open_live_stack()
    assert message in str(refused.value)
