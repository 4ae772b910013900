"""`kvcache replay`: what it prints, what it draws, what it refuses and how."""

import gzip
import importlib.util
import io
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from kvcache import cli
from kvcache.cli import replay
from kvcache.cli.progress import Bar
from kvcache.eviction import POLICIES, Lru
from kvcache.replay import jobs
from kvcache.replay.generators import GENERATORS, generate
from kvcache.replay.jobs import JobError, ReplayJob

SVG = "{http://www.w3.org/2000/svg}"
BROKEN = "tests.replay.test_simulate:Broken"
MADE = ["replay", "--generate", "rag", "--requests", "300"]


def lines(*asked: tuple[int, list[int]]) -> str:
    return "".join(
        json.dumps({"timestamp": 1000 * at, "input_length": tokens, "hash_ids": ids}) + "\n"
        for at, (tokens, ids) in enumerate(asked)
    )


TEXT = lines((1100, [0, 1, 2]), (1600, [0, 1, 3, 4]), (1100, [5, 6, 7]), (1100, [0, 1, 2]))


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that ends well; gives what it printed."""

    def run(*argv: str) -> str:
        assert cli.main(argv) == 0
        printed = capsys.readouterr()
        assert printed.err == ""  # no bar where there is no terminal
        return printed.out

    return run


def figures(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_sessions_that_end_may_say_so(said: Any) -> None:
    plain, told = (
        json.loads(said(*MADE, "--policy", "lru", "--capacity", "500", "--json", *more))
        for more in ([], ["--hints", "1"])
    )
    assert plain["hit_ratio"] < told["hit_ratio"] <= told["belady_hit_ratio"]
    assert plain["belady_hit_ratio"] == told["belady_hit_ratio"]


@pytest.mark.parametrize("share", ["1.5", "-0.1", "nan", "most"])
def test_a_share_of_hints_is_one(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*MADE, "--hints", share])
    assert left.value.code == 2
    assert "a share, from 0 to 1" in capsys.readouterr().err


def test_one_policy_and_capacity_are_one_json_object(said: Any, trace: str) -> None:
    found = json.loads(said("replay", trace, "--policy", "lru", "--capacity", "3", "--json"))
    assert found["us_per_block"] > 0
    tokens = 2 * 1100 + 1600 + 1100
    assert found | {"us_per_block": 0} == {
        "policy": "lru",
        "capacity_blocks": 3,
        "requests": 4,
        "block_accesses": 9,
        "block_tokens": 512,
        "prompt_tokens": tokens,
        "hit_ratio": 3 / 9,
        "token_hit_ratio": 3 * 512 / tokens,
        "belady_hit_ratio": 4 / 9,
        "belady_token_hit_ratio": 4 * 512 / tokens,
        "us_per_block": 0,
        "tiers": [
            {
                "capacity_blocks": 3,
                "hit_blocks": 3,
                "read_blocks": 3,
                "written_blocks": 6,
                "evicted_blocks": 3,
                "declined_blocks": 0,
                "hit_ratio": 3 / 9,
            }
        ],
    }


def test_partial_blocks_count_when_asked_for(said: Any, trace: str) -> None:
    [found] = figures(said("replay", trace, "--policy=lru", "--capacity=99", "--partial", "--json"))
    assert found["block_accesses"] == 13
    assert found["hit_ratio"] == 5 / 13
    assert found["token_hit_ratio"] == (2 * 512 + 1100) / 4900


def test_every_policy_at_every_capacity_has_its_line(said: Any, trace: str) -> None:
    found = figures(said("replay", trace, "--capacity", "2, 4", "--json"))
    assert [(each["capacity_blocks"], each["policy"]) for each in found] == [
        (capacity, policy) for capacity in (2, 4) for policy in POLICIES
    ]


def test_without_a_capacity_it_is_a_tenth_of_what_there_is(said: Any) -> None:
    [found] = figures(said(*MADE, "--policy", "lru", "--json"))
    assert found["capacity_blocks"] == generate("rag", 300).distinct // 10


def test_gzip_and_standard_input_are_read(said: Any, trace: str, tmp_path: Path) -> None:
    packed = gzip.compress(TEXT.encode())
    (tmp_path / "trace.gz").write_bytes(packed)
    how = ("--policy", "lru", "--capacity", "4", "--json")
    [plain] = figures(said("replay", trace, *how))
    [zipped] = figures(said("replay", str(tmp_path / "trace.gz"), *how))
    done = subprocess.run(
        [sys.executable, "-m", "kvcache", "replay", "-", *how],
        input=packed, capture_output=True, check=True,
    )  # fmt: skip
    [piped] = figures(done.stdout.decode())
    assert done.stderr == b""
    for other in (zipped, piped):
        assert other | {"us_per_block": 0} == plain | {"us_per_block": 0}


@pytest.mark.parametrize("name", GENERATORS)
def test_traffic_is_made_up_by_seed(said: Any, name: str) -> None:
    how = ("replay", "--generate", name, "--requests", "200", "--policy", "lru", "--json")
    first, same, other = (
        json.loads(said(*how, "--seed", seed)) | {"us_per_block": 0} for seed in ("7", "7", "8")
    )
    assert first == same != other
    assert first["requests"] == 200
    assert name in replay.TRAFFIC
    assert set(replay.TRAFFIC) == set(GENERATORS)


def test_capacities_may_be_bytes(said: Any, trace: str) -> None:
    how = ("replay", trace, "--policy", "lru", "--json", "--capacity", "1GiB")
    [by_token] = figures(said(*how, "--bytes-per-token", "128KiB"))
    [by_block] = figures(said(*how, "--bytes-per-block", "64MiB"))
    assert by_token["capacity_blocks"] == by_block["capacity_blocks"] == 16
    [tier] = by_token["tiers"]
    assert tier["written_bytes"] == tier["written_blocks"] << 26
    assert tier["read_bytes"] == tier["read_blocks"] << 26


def test_tiers_are_told_apart(said: Any, trace: str) -> None:
    [found] = figures(said("replay", trace, "--policy", "lru", "--tiers", "2,100", "--json"))
    first, second = found["tiers"]
    assert found["capacity_blocks"] == 2
    assert found["hit_ratio"] == 4 / 9 == first["hit_ratio"] + second["hit_ratio"]
    assert second["hit_blocks"] == second["read_blocks"] > 0
    text = said("replay", trace, "--policy", "lru", "--tiers", "2,100")
    assert "L2" in text
    assert "2 + 100" in text


def test_the_text_is_for_people(said: Any, trace: str) -> None:
    text = said("replay", trace, "--capacity", "3")
    assert "trace.jsonl: 4 requests in 3 seconds; 9 full blocks of 512 tokens, 5 of them" in text
    [row] = [line.split() for line in text.splitlines() if " lru " in line]
    assert row[:7] == ["3", "lru", "33.33%", "31.35%", "44.44%", "3", "6"]
    assert "\x1b" not in text


def test_somebody_elses_policy_is_replayed(said: Any, trace: str) -> None:
    how = ("replay", trace, "--capacity", "4", "--json", "--policy")
    mine, lru = figures(said(*how, "kvcache.eviction:Lru,lru"))
    assert mine["policy"] == "kvcache.eviction:Lru"
    assert mine["hit_ratio"] == lru["hit_ratio"]


# The plot


def test_the_plot_has_a_line_for_each_policy_and_what_doubling_buys(
    said: Any, tmp_path: Path
) -> None:
    path = tmp_path / "plot.svg"
    found = figures(said(*MADE, "--capacity", "100", "--plot", str(path), "--json"))
    tree = ET.parse(path).getroot()
    assert len(tree.findall(f"{SVG}polyline")) == 1 + len(POLICIES)
    words = [text.text for text in tree.iter(f"{SVG}text")]
    assert {"100 doubled: 200", "optimum", *POLICIES} <= set(words)
    once, twice = (
        next(e["hit_ratio"] for e in found if (e["policy"], e["capacity_blocks"]) == ("lru", at))
        for at in (100, 200)
    )
    assert f"{once:.1%} to {twice:.1%}" in words
    assert f"{100 * (twice - once):+.1f} points" in words
    points = [circle[0].text for circle in tree.iter(f"{SVG}circle")]
    assert f"lru, 200: {twice:.2%}" in points
    assert len(points) == len(found) // len(POLICIES) * (1 + len(POLICIES))


def test_the_page_stands_alone(said: Any, tmp_path: Path) -> None:
    path = tmp_path / "plot.html"
    said(*MADE, "--plot", str(path))
    page = path.read_text()
    assert "<svg" in page
    assert "<td>" in page
    assert "src=" not in page
    assert "href=" not in page


def test_names_are_escaped(tmp_path: Path) -> None:
    from kvcache.cli.replay import plot

    odd = plot.Curves("a<b>&", "DRAM", ["1", "2"], {"optimum": [0.1, 0.2], "<i>": [0, 0.1]}, 0)
    ET.fromstring(plot.svg(odd))
    assert "<i>" not in plot.html(odd)


def test_a_png_is_drawn_where_matplotlib_is(said: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    said(*MADE, "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("capacity", "enough", "drawn"),
    [
        (16, 60, [2, 4, 8, 16, 32, 64]),
        (2, 1, [1, 2, 4]),
        (100, 10**9, [12, 25, 50, 100, 200, 400, 800, 1600, 3200]),
    ],
)
def test_it_is_drawn_around_the_capacity(capacity: int, enough: int, drawn: list[int]) -> None:
    assert replay.around(capacity, enough) == drawn


# What is refused


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["replay"], "give a TRACE, or --generate traffic"),
        ([*MADE, "also.jsonl"], "and not both"),
        (["replay", "no-such.jsonl"], "cannot read no-such.jsonl: No such file"),
        (["replay", "t", "--seed", "1"], "give --generate, or --hints"),
        ([*MADE, "--block-tokens", "16"], "--block-tokens is of a trace"),
        ([*MADE, "--capacity", "1", "--tiers", "1,2"], "leave --capacity out"),
        ([*MADE, "--capacity", "64GiB"], "64GiB is in bytes: say how many a block takes"),
        ([*MADE, "--tiers", "10,1TiB"], "1TiB is in bytes"),
        ([*MADE, "--bytes-per-token", "1", "--bytes-per-block", "1"], "not both"),
        ([*MADE, "--capacity", "1MiB", "--bytes-per-token", "1MiB"], "1MiB holds no block, which"),
        ([*MADE, "--plot", "a.gif"], "--plot a.gif: the name ends in .svg, .html, .png"),
        ([*MADE, "--plot", "a.svg", "--capacity", "1,2"], "draws around one --capacity"),
        ([*MADE, "--plot", "a.svg", "--tiers", "1,2"], "and no --tiers"),
        ([*MADE, "--plot", "/no-such-folder/a.svg"], "there is no such folder"),
    ],
)
def test_what_does_not_go_together_ends_with_code_2(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.startswith("kvcache replay: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--policy", "lfu"], 'no policy is called "lfu"; there are "gittins", '),
        (["--policy", "lru,no.such:Policy"], "cannot import no.such:Policy"),
        (["--capacity", "0"], "'0': it must hold a block at least"),
        (["--capacity", "many"], "'many': not a size"),
        (["--capacity", "50%"], "'50%': a percentage of an unknown total"),
        (["--capacity", "1,,2"], "'': not a size"),
        (["--bytes-per-token", "0"], "'0': a size must be above zero"),
        (["--requests", "0"], "'0'; a whole number, at least 1"),
        (["--generate", "noise"], "invalid choice: 'noise'"),
    ],
)
def test_bad_arguments_end_with_code_2(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main([*MADE, *argv])
    assert ending.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_trace_that_is_none_ends_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(TEXT + "oops\n")
    assert cli.main(["replay", str(path)]) == 2
    assert f"kvcache replay: {path}, line 5: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_policy_that_fails_ends_with_code_1(
    capsys: pytest.CaptureFixture[str], processes: str
) -> None:
    assert cli.main([*MADE, "--policy", BROKEN, "--processes", processes]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"kvcache replay: policy {BROKEN}: LookupError: a bug\n"
    assert printed.out == ""


def test_a_plot_that_cannot_be_written_ends_with_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plot.svg"
    path.mkdir()
    assert cli.main([*MADE, "--plot", str(path)]) == 1
    assert f"cannot write {path}: Is a directory" in capsys.readouterr().err


def test_matplotlib_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main([*MADE, "--plot", "a.png"]) == 2
    assert "pip install 'kvcache[plot]'" in capsys.readouterr().err


# Many at once


def test_processes_find_what_one_does_and_tell_of_it() -> None:
    trace, told = generate("rag", 600), [0, 0]
    work = [ReplayJob(policy, (size,)) for size in (50, 500) for policy in (None, *POLICIES)]

    def count(at: int) -> Any:
        def tell(requests: int) -> None:
            told[at] += requests

        return tell

    alone, together = (jobs.run(trace, work, n + 1, count(n)) for n in (0, 1))
    hits = [[result.hit_blocks for result in results] for results in (alone, together)]
    assert hits[0] == hits[1]
    assert told == [len(work) * len(trace)] * 2


def test_a_process_that_is_killed_is_an_error() -> None:
    dies = "tests.cli.test_replay:Dies"
    with pytest.raises(JobError, match="ended from outside"):
        jobs.run(
            generate("rag", 10), [ReplayJob(dies, (5,)), ReplayJob("lru", (5,))], 2, lambda _: None
        )


class Dies(Lru):
    def __init__(self, capacity: int) -> None:
        os._exit(9)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_for_terminals() -> None:
    stream, plain = Terminal(), io.StringIO()
    with Bar(stream, 4) as bar, Bar(plain, 4) as silent:
        bar.add(2)
        silent.add(2)
    assert "50%" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")
    assert plain.getvalue() == ""
