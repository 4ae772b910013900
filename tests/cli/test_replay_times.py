"""`kvcache replay`: the unit of timestamps, implausible rates, and limits of a trace."""

import gzip
import json
from pathlib import Path

import pytest

from kvcache import cli


def timed_trace(tmp_path: Path, *times: float, packed: bool = False) -> str:
    text = "".join(
        json.dumps(
            {"timestamp": at, "input_length": 1100, "hash_ids": [3 * n, 3 * n + 1, 3 * n + 2]}
        )
        + "\n"
        for n, at in enumerate(times)
    )
    path = tmp_path / "timed.jsonl"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return str(path)


@pytest.mark.parametrize(("unit", "per_s"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_timestamps_are_read_in_the_given_unit(
    unit: str, per_s: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = timed_trace(tmp_path, *(at * per_s for at in range(0, 4000, 10)))
    argv = ["replay", trace, "--policy", "lru", "--time-unit", unit]
    assert cli.main(argv) == 0
    printed = capsys.readouterr()
    assert "400 requests in 66 minutes" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("step", "warned"),
    [(1, True), (0, True), (4, False), (1000, False), (60_000, False), (10**6, True)],
)
def test_implausible_rate_is_a_warning(
    step: int, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = (
        timed_trace(tmp_path, *range(0, max(1, step) * 400, step))
        if step
        else timed_trace(tmp_path, *[7] * 400)
    )
    assert cli.main(["replay", trace, "--policy", "lru"]) == 0
    err = capsys.readouterr().err
    assert ("read in ms" in err and "--time-unit" in err) == warned
    assert len(err.splitlines()) == warned


def test_few_requests_have_no_rate_and_no_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", timed_trace(tmp_path, *range(50)), "--policy", "lru"]) == 0
    assert capsys.readouterr().err == ""


def test_time_unit_of_generated_traffic_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", "--generate", "rag", "--time-unit", "s"]) == 2
    assert "--time-unit needs a TRACE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_LINES", 100), ("MAX_NBYTES", 9000), ("MAX_BLOCKS", 300)]
)
def test_trace_beyond_a_limit_exits_with_code_2(
    limit: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(f"kvcache.replay.trace.{limit}", value)
    path = timed_trace(tmp_path, *range(0, 400_000, 1000), packed=True)
    assert cli.main(["replay", path, "--policy", "lru"]) == 2
    assert "too large: a trace has at most" in capsys.readouterr().err
