"""`kvcache replay`: its output, its plot, and the arguments that it refuses."""

import gzip
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
from kvcache.cli.progress import ProgressBar
from kvcache.eviction import POLICIES, Lru
from kvcache.replay import jobs
from kvcache.replay.generators import GENERATORS, generate
from kvcache.replay.groups import GroupsOutcome
from kvcache.replay.jobs import JobError, ReplayJob

SVG = "{http://www.w3.org/2000/svg}"
BROKEN = "tests.replay.test_simulate:Broken"
GENERATED = ["replay", "--generate", "rag", "--requests", "300"]


def lines(*requests: tuple[int, list[int]]) -> str:
    return "".join(
        json.dumps({"timestamp": 1000 * at, "input_length": tokens, "hash_ids": ids}) + "\n"
        for at, (tokens, ids) in enumerate(requests)
    )


TEXT = lines((1100, [0, 1, 2]), (1600, [0, 1, 3, 4]), (1100, [5, 6, 7]), (1100, [0, 1, 2]))


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that succeeds; returns its output."""

    def run(*argv: str) -> str:
        assert cli.main(argv) == 0
        printed = capsys.readouterr()
        assert printed.err == ""  # without a terminal there is no progress bar
        return printed.out

    return run


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_hints_raise_the_hit_ratio(output: Any) -> None:
    plain, hinted = (
        json.loads(output(*GENERATED, "--policy", "lru", "--capacity", "500", "--json", *more))
        for more in ([], ["--hints", "1"])
    )
    assert plain["hit_ratio"] < hinted["hit_ratio"] <= hinted["belady_hit_ratio"]
    assert plain["belady_hit_ratio"] == hinted["belady_hit_ratio"]


@pytest.mark.parametrize("share", ["1.5", "-0.1", "nan", "most"])
def test_share_of_hints_outside_0_to_1_is_refused(
    share: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main([*GENERATED, "--hints", share])
    assert ending.value.code == 2
    assert "a share, from 0 to 1" in capsys.readouterr().err


def test_one_policy_and_capacity_print_one_json_object(output: Any, trace: str) -> None:
    found = json.loads(output("replay", trace, "--policy", "lru", "--capacity", "3", "--json"))
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


def test_partial_option_counts_partial_blocks(output: Any, trace: str) -> None:
    [found] = objects(
        output("replay", trace, "--policy=lru", "--capacity=99", "--partial", "--json")
    )
    assert found["block_accesses"] == 13
    assert found["hit_ratio"] == 5 / 13
    assert found["token_hit_ratio"] == (2 * 512 + 1100) / 4900


def test_all_policies_and_capacities_print_one_line_each(output: Any, trace: str) -> None:
    found = objects(output("replay", trace, "--capacity", "2, 4", "--json"))
    assert [(each["capacity_blocks"], each["policy"]) for each in found] == [
        (capacity, policy) for capacity in (2, 4) for policy in POLICIES
    ]


def test_default_capacity_is_a_tenth_of_the_distinct_blocks(output: Any) -> None:
    [found] = objects(output(*GENERATED, "--policy", "lru", "--json"))
    assert found["capacity_blocks"] == generate("rag", 300).distinct // 10


def test_gzip_and_standard_input_have_the_same_results(
    output: Any, trace: str, tmp_path: Path
) -> None:
    packed = gzip.compress(TEXT.encode())
    (tmp_path / "trace.gz").write_bytes(packed)
    how = ("--policy", "lru", "--capacity", "4", "--json")
    [plain] = objects(output("replay", trace, *how))
    [zipped] = objects(output("replay", str(tmp_path / "trace.gz"), *how))
    done = subprocess.run(
        [sys.executable, "-m", "kvcache", "replay", "-", *how],
        input=packed, capture_output=True, check=True,
    )  # fmt: skip
    [piped] = objects(done.stdout.decode())
    assert done.stderr == b""
    for other in (zipped, piped):
        assert other | {"us_per_block": 0} == plain | {"us_per_block": 0}


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_traffic_is_repeatable_by_seed(output: Any, name: str) -> None:
    how = ("replay", "--generate", name, "--requests", "200", "--policy", "lru", "--json")
    first, same, other = (
        json.loads(output(*how, "--seed", seed)) | {"us_per_block": 0} for seed in ("7", "7", "8")
    )
    assert first == same != other
    assert first["requests"] == 200
    assert name in replay.TRAFFIC
    assert set(replay.TRAFFIC) == set(GENERATORS)


def test_capacity_in_bytes_is_converted_to_blocks(output: Any, trace: str) -> None:
    how = ("replay", trace, "--policy", "lru", "--json", "--capacity", "1GiB")
    [by_token] = objects(output(*how, "--bytes-per-token", "128KiB"))
    [by_block] = objects(output(*how, "--bytes-per-block", "64MiB"))
    assert by_token["capacity_blocks"] == by_block["capacity_blocks"] == 16
    [tier] = by_token["tiers"]
    assert tier["written_bytes"] == tier["written_blocks"] << 26
    assert tier["read_bytes"] == tier["read_blocks"] << 26


def test_tiers_are_reported_separately(output: Any, trace: str) -> None:
    [found] = objects(output("replay", trace, "--policy", "lru", "--tiers", "2,100", "--json"))
    first, second = found["tiers"]
    assert found["capacity_blocks"] == 2
    assert found["hit_ratio"] == 4 / 9 == first["hit_ratio"] + second["hit_ratio"]
    assert second["hit_blocks"] == second["read_blocks"] > 0
    text = output("replay", trace, "--policy", "lru", "--tiers", "2,100")
    assert "L2" in text
    assert "2 + 100" in text


def test_text_has_a_header_and_a_row_per_policy(output: Any, trace: str) -> None:
    text = output("replay", trace, "--capacity", "3")
    assert "trace.jsonl: 4 requests in 3 seconds; 9 full blocks of 512 tokens, 5 of them" in text
    [row] = [line.split() for line in text.splitlines() if " lru " in line]
    assert row[:7] == ["3", "lru", "33.33%", "31.35%", "44.44%", "3", "6"]
    assert "\x1b" not in text


def test_policy_by_class_path_is_replayed(output: Any, trace: str) -> None:
    how = ("replay", trace, "--capacity", "4", "--json", "--policy")
    mine, lru = objects(output(*how, "kvcache.eviction:Lru,lru"))
    assert mine["policy"] == "kvcache.eviction:Lru"
    assert mine["hit_ratio"] == lru["hit_ratio"]


# The plot


def test_plot_has_a_line_per_policy_and_the_gain_of_doubling(output: Any, tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    found = objects(output(*GENERATED, "--capacity", "100", "--plot", str(path), "--json"))
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


def test_plot_escapes_names_and_needs_no_other_file() -> None:
    from kvcache.cli.replay import plot

    ratios = {"optimum": [0.1, 0.2], "<i>": [0, 0.1]}
    picture = plot.svg(plot.HitRatioPlot("a<b>&", "DRAM", ["1", "2"], ratios, 0))
    ET.fromstring(picture)
    assert "<i>" not in picture
    assert "src=" not in picture
    assert "href=" not in picture


@pytest.mark.parametrize(
    ("capacity", "enough", "plotted"),
    [
        (16, 60, [2, 4, 8, 16, 32, 64]),
        (2, 1, [1, 2, 4]),
        (100, 10**9, [12, 25, 50, 100, 200, 400, 800, 1600, 3200]),
    ],
)
def test_capacities_around_halve_and_double(capacity: int, enough: int, plotted: list[int]) -> None:
    assert replay.capacities_around(capacity, enough) == plotted


# Refused arguments


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["replay"], "pass either a TRACE or --generate"),
        ([*GENERATED, "also.jsonl"], "pass either a TRACE or --generate"),
        (["replay", "no-such.jsonl"], "cannot read no-such.jsonl: No such file"),
        (["replay", "t", "--seed", "1"], "--seed needs --generate or --hints"),
        ([*GENERATED, "--block-tokens", "16"], "--block-tokens needs a TRACE"),
        ([*GENERATED, "--capacity", "1", "--tiers", "1,2"], "leave --capacity out"),
        ([*GENERATED, "--capacity", "64GiB"], "64GiB is in bytes: pass the size of a block"),
        ([*GENERATED, "--tiers", "10,1TiB"], "1TiB is in bytes"),
        (
            [*GENERATED, "--bytes-per-token", "1", "--bytes-per-block", "1"],
            "pass either --bytes-per-token or",
        ),
        (
            [*GENERATED, "--capacity", "1MiB", "--bytes-per-token", "1MiB"],
            "less than one block (512MiB)",
        ),
        ([*GENERATED, "--plot", "a.gif"], "--plot a.gif: the name must end in .svg"),
        ([*GENERATED, "--plot", "a.html"], "--plot a.html: the name must end in .svg"),
        ([*GENERATED, "--plot", "a.png"], "--plot a.png: the name must end in .svg"),
        ([*GENERATED, "--plot", "a.svg", "--capacity", "1,2"], "draws around one --capacity"),
        ([*GENERATED, "--plot", "a.svg", "--tiers", "1,2"], "and no --tiers"),
        ([*GENERATED, "--plot", "/no-such-folder/a.svg"], "no such directory"),
    ],
)
def test_conflicting_arguments_exit_with_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("kvcache replay: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--policy", "lfu"], 'no policy is called "lfu"; there are "gittins", '),
        (["--policy", "lru,no.such:Policy"], "cannot import no.such:Policy"),
        (["--capacity", "0"], "'0': it must be at least one block"),
        (["--capacity", "many"], "'many': not a size"),
        (["--capacity", "50%"], "'50%': a percentage of an unknown total"),
        (["--capacity", "1,,2"], "'': not a size"),
        (["--bytes-per-token", "0"], "'0': a size must be above zero"),
        (["--requests", "0"], "'0'; a whole number, at least 1"),
        (["--generate", "noise"], "invalid choice: 'noise'"),
    ],
)
def test_invalid_arguments_exit_with_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main([*GENERATED, *argv])
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


def test_invalid_trace_exits_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(TEXT + "oops\n")
    assert cli.main(["replay", str(path)]) == 2
    assert f"kvcache replay: {path}, line 5: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("processes", ["1", "2"])
def test_failing_policy_exits_with_code_1(
    capsys: pytest.CaptureFixture[str], processes: str
) -> None:
    assert cli.main([*GENERATED, "--policy", BROKEN, "--processes", processes]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"kvcache replay: policy {BROKEN}: LookupError: a bug\n"
    assert printed.out == ""


def test_unwritable_plot_exits_with_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plot.svg"
    path.mkdir()
    assert cli.main([*GENERATED, "--plot", str(path)]) == 1
    assert f"cannot write {path}: Is a directory" in capsys.readouterr().err


# Several processes


def test_several_processes_have_the_same_results_and_progress() -> None:
    trace, progress = generate("rag", 600), [0, 0]
    work = [ReplayJob(policy, (size,)) for size in (50, 500) for policy in (None, *POLICIES)]

    def count(at: int) -> Any:
        def add(requests: int) -> None:
            progress[at] += requests

        return add

    alone, together = (jobs.run(trace, work, n + 1, count(n)) for n in (0, 1))
    hits = [
        [result.hit_blocks for result in results if not isinstance(result, GroupsOutcome)]
        for results in (alone, together)
    ]
    assert hits[0] == hits[1]
    assert progress == [len(work) * len(trace)] * 2


def test_killed_worker_process_raises() -> None:
    dies = "tests.cli.test_replay:Dies"
    with pytest.raises(JobError, match="a worker process was killed"):
        jobs.run(
            generate("rag", 10), [ReplayJob(dies, (5,)), ReplayJob("lru", (5,))], 2, lambda _: None
        )


class Dies(Lru):
    def __init__(self, capacity: int) -> None:
        os._exit(9)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_is_drawn_on_terminals_only() -> None:
    stream, plain = Terminal(), io.StringIO()
    with ProgressBar(stream, 4) as bar, ProgressBar(plain, 4) as silent:
        bar.add(2)
        silent.add(2)
    assert "50%" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")
    assert plain.getvalue() == ""
