"""`kvcache top` with pages of an engine: amounts, rates, and readings that fail."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from kvcache import cli
from kvcache.cli import top
from kvcache.cli.top.scrape import NUMBERS, PREFIX, tiers_of

Watch = Callable[..., tuple[list[dict[str, Any]], str]]


def page(hits: int = 75, read: int = 1 << 30, *, limit: int = 2 << 30, engine: int = 0) -> str:
    """A page as `vllm serve` prints it, with the metrics of two tiers and of vLLM."""
    common = f'engine="{engine}",model_name="a {{model}} \\"m\\""'
    l1, disk = (
        f'{common},tier="{name}",type="{kind}"' for name, kind in (("l1", "dram"), ("ssd", "disk"))
    )
    return f"""{PREFIX}lookups_total{{{disk},result="miss"}} 0.0
# HELP vllm:kvcache_tier_lookups_total blocks looked up
# TYPE vllm:kvcache_tier_lookups_total counter
{PREFIX}lookups_total{{{l1},result="hit"}} {hits}.0
{PREFIX}lookups_total{{{l1},result="miss"}} 25.0
{PREFIX}lookups_created{{{l1},result="miss"}} 1.7e+09
{PREFIX}io_bytes_total{{{l1},direction="read"}} {read}
{PREFIX}io_bytes_total{{{l1},direction="write"}} 1.048576e+06 1700000000000
{PREFIX}usage_bytes{{{l1}}} 1.073741824e+09
{PREFIX}limit_bytes{{{l1}}} {limit}
{PREFIX}pinned{{{l1}}} 3.0
{PREFIX}operation_duration_seconds_bucket{{{l1},le="0.1",operation="lookup"}} 9.0
{PREFIX}breaker_open{{{disk}}} 1.0
{PREFIX}rejections_total{{{disk},reason="checksum"}} 2.0
{PREFIX}rejections_total{{{disk},reason="length"}} 1.0
vllm:num_requests_running{{{common}}} 7.0
"""


class Engine:
    """An HTTP server that serves one page after another, and repeats the last one."""

    def __init__(self) -> None:
        self.pages: list[str | int] = [page()]
        self.paths: list[str] = []
        self.logins: list[str] = []
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                engine.paths.append(self.path)
                engine.logins.append(self.headers.get("Authorization", ""))
                body = engine.pages.pop(0) if len(engine.pages) > 1 else engine.pages[0]
                self.send_response(body if isinstance(body, int) else 200)
                self.end_headers()
                if isinstance(body, str):
                    self.wfile.write(body.encode())

            def log_message(self, *of: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    with engine.server as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield engine
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def watch(engine: Engine, capsys: pytest.CaptureFixture[str]) -> Watch:
    """Read `times` pages, two seconds apart, until Ctrl-C; return the JSON objects and stderr."""

    def watch(times: int, *pages: str | int) -> tuple[list[dict[str, Any]], str]:
        engine.pages = list(pages)
        now_s, remaining = 100.0, times

        def sleep(seconds: float) -> None:
            nonlocal now_s, remaining
            now_s += seconds
            remaining -= 1
            if not remaining:
                raise KeyboardInterrupt

        args = cli.parser().parse_args(["top", engine.url, "--json", "--interval", "2"])
        assert top.run(args, clock=lambda: now_s, sleep=sleep) == 0
        printed = capsys.readouterr()
        return [json.loads(line) for line in printed.out.splitlines()], printed.err

    return watch


def test_page_is_read_by_tier() -> None:
    l1, disk = tiers_of(page())
    assert (l1.name, l1.kind, disk.name, disk.kind) == ("l1", "dram", "ssd", "disk")
    assert l1.numbers == {
        "hit_blocks": 75, "missed_blocks": 25, "read_nbytes": 1 << 30, "written_nbytes": 1 << 20,
        "used_nbytes": 1 << 30, "limit_nbytes": 2 << 30, "pinned_slots": 3,
    }  # fmt: skip
    assert l1.hit_rate == 0.75
    assert disk.numbers == {"missed_blocks": 0, "breaker_open": 1, "rejected_blocks": 3}
    assert disk.hit_rate is None


def test_engines_of_one_page_are_added_up() -> None:
    l1, disk = tiers_of(page(engine=0) + page(engine=1))
    assert l1.numbers["limit_nbytes"] == 4 << 30
    assert disk.numbers["rejected_blocks"] == 6


def test_once_prints_counts_without_rates(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["top", engine.url, "--once", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] is None
    assert found["tiers"][0]["hit_rate"] == 0.75
    assert found["tiers"][0]["limit_nbytes"] == 2 << 30
    assert not any(name.endswith("_per_s") for name in found["tiers"][0])
    assert engine.paths == ["/metrics"]
    assert cli.main(["top", f"{engine.url}/other", "--once", "--json"]) == 0
    assert engine.paths[1:] == ["/other"]


def test_rates_are_for_the_time_between_readings(watch: Watch) -> None:
    (first, second), _ = watch(2, page(), page(hits=175, read=3 << 30))
    assert first["seconds"] is None
    assert second["seconds"] == 2
    l1 = second["tiers"][0]
    assert (l1["hit_rate"], l1["hit_blocks"]) == (1.0, 175)
    assert l1["read_nbytes_per_s"] == 1 << 30
    assert l1["written_nbytes_per_s"] == 0
    assert "used_nbytes_per_s" not in l1


def test_restarted_engine_has_no_negative_rates(watch: Watch) -> None:
    (_, second), _ = watch(2, page(hits=1000), page(hits=10))
    assert second["tiers"][0]["hit_blocks_per_s"] == 5


def test_failed_reading_is_reported_and_the_next_one_printed(watch: Watch) -> None:
    (first, third), err = watch(3, page(), 503, page(hits=80))
    assert "503" in err
    assert first["tiers"][0]["hit_blocks"] == 75
    assert third["seconds"] is None  # the time since the last reading is unknown


def test_table_has_a_row_for_each_tier(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", engine.url, "--once"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()}
    assert rows["l1"] == [
        "1GiB", "2GiB", "50%", "75%", "1GiB", "1MiB", "-", "3", "-", "-", "-", "-",
    ]  # fmt: skip
    assert rows["ssd"] == ["-", "-", "-", "-", "-", "-", "-", "-", "-", "-", "3", "-"]
    assert "ssd: circuit breaker open (calls failed); its blocks count as misses\n" in out
    assert "since the engine started" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 110


def test_table_of_an_engine_without_l1_has_its_lower_tiers() -> None:
    """Direct tiers have no slots to pin."""
    without_l1 = "\n".join(line for line in page().splitlines() if 'tier="l1"' not in line)
    tiers = tiers_of(without_l1)
    assert [(tier.name, tier.hit_rate) for tier in tiers] == [("ssd", None)]
    printed = top.table(tiers, None, lambda text, *_: text)
    assert "ssd" in printed
    assert "l1" not in printed


def test_table_of_a_later_reading_has_rates() -> None:
    before, now = tiers_of(page()), tiers_of(page(read=3 << 30))
    recent = [tier.since(old) for tier, old in zip(now, before, strict=True)]
    text = top.table(recent, 2.0, lambda text, _: text)
    assert "read/s" in text
    assert text.splitlines()[3].split()[5] == "1GiB"


def test_terminal_is_cleared_before_each_reading(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        top, "painter", lambda _: lambda text, colour: f"\x1b[{colour}m{text}\x1b[0m"
    )
    assert cli.main(["top", engine.url, "--once"]) == 0
    assert capsys.readouterr().out.startswith(top.REDRAW)


def test_page_without_metrics_of_kvcache_ends_with_code_1(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.pages = ["vllm:num_requests_running 3\n"]
    assert cli.main(["top", engine.url, "--once"]) == 1
    assert "no metrics of kvcache" in capsys.readouterr().err


def test_user_and_password_are_sent_but_not_printed(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    url = engine.url.replace("//", "//me:hunter%402@") + "/metrics?token=hunter2"
    assert cli.main(["top", url, "--once"]) == 0
    printed = capsys.readouterr()
    assert engine.logins == ["Basic " + b64encode(b"me:hunter@2").decode()]
    assert engine.paths == ["/metrics?token=hunter2"]
    assert "//***@127.0.0.1" in printed.out
    assert "hunter" not in printed.out + printed.err


def test_unreachable_page_ends_with_code_1(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.pages = [404]
    assert cli.main(["top", engine.url]) == 1
    assert "404" in capsys.readouterr().err
    assert cli.main(["top", "http://127.0.0.1:9"]) == 1
    assert "refused" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["localhost:8000"], ["http://x", "--interval", "0"]])
def test_invalid_argument_ends_with_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["top", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err


def test_metric_names_and_labels_match_kvcache_metrics() -> None:
    metrics = pytest.importorskip("kvcache.metrics")
    ending = {"By": "_bytes", "s": "_seconds"}
    labels_of = {
        metric.name.replace(".", "_")
        + ending.get(metric.unit, "")
        + ("_total" if metric.kind == "counter" else ""): [
            attribute.rpartition(".")[2] for attribute in metric.attributes
        ]
        for metric in metrics.METRICS
    }
    for name, labels in NUMBERS.values():
        assert labels.keys() <= set(labels_of[f"{PREFIX}{name}".removeprefix("vllm:")])
