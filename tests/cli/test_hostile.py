"""Each command with each hostile input ends in time, with one message and no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import hostile_inputs

pytest.importorskip("redis")

LIMIT_S = 120  # for all commands with one input, on a loaded machine

DOCTOR_SERVERS = {"silent", "flood", "drip-of-headers", "flood-of-a-page", "secret"}
"""The servers of the doctor's test; it also measures the machine, so all would take too long."""

# Runs the commands of the standard input with short timeouts, and prints the result of each.
DRIVER = """
import contextlib, io, json, sys, time
from functools import partial
from kvcache import cli, inputs
from kvcache.cli import doctor, redis_server, top
from kvcache.cli.doctor.options import CheckOptions
from kvcache.replay import trace
trace.MAX_LINES = 1_000_000
inputs.WAIT_S = redis_server.WAIT_S = redis_server.QUIET_S = 0.5
top.run = partial(top.run, timeout_s=0.5)
doctor.run = partial(doctor.run, options=CheckOptions(tier_timeout_s=10.0, otlp_timeout_s=0.5))
results = []
for argv in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(argv)
        except SystemExit as end:
            code = end.code
    results.append([argv[0], code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


class CommandResult(NamedTuple):
    command: str
    code: int
    out: str
    err: str


def run(commands: list[list[str]], **environ: str) -> list[CommandResult]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(commands), text=True, check=False,
        capture_output=True, timeout=LIMIT_S, env=os.environ | environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr  # from a thread
    return [CommandResult(*each) for each in json.loads(done.stdout)]


def assert_one_message(result: CommandResult) -> None:
    printed = result.out + result.err
    assert result.code in (1, 2), result
    assert "Traceback" not in printed
    assert "unexpected" not in printed
    assert "hunter2" not in printed
    assert all(line.isprintable() for line in printed.splitlines()), result
    if result.command == "doctor":
        assert "FAIL" in result.out
        assert len(printed) < 6000
    else:
        assert len(printed) < 1500
        assert len(printed.splitlines()) == 1, result


@pytest.mark.parametrize("name", hostile_inputs.FILES)
def test_command_with_a_hostile_file_prints_one_message(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.toml"
    hostile_inputs.FILES[name](path)
    file = str(path)
    commands = [
        ["profile", "check", file],
        ["profile", "show", file],
        ["inspect", "--profile", file],
        ["inspect", file],
        ["plan", file],
        ["replay", file, "--policy", "lru"],
        ["doctor", "--profile", file],
    ]
    for result in run(commands):
        assert_one_message(result)


@pytest.mark.parametrize("name", hostile_inputs.SERVERS)
def test_command_with_a_hostile_server_prints_one_message(name: str, tmp_path: Path) -> None:
    profile = tmp_path / "redis.toml"
    with hostile_inputs.server(hostile_inputs.SERVERS[name]) as port:
        profile.write_text(
            'extends = "l1-redis"\n[[tier]]\nname = "l1"\ncapacity = "1MiB"\n'
            f'[[tier]]\nname = "redis"\nurl = "redis://127.0.0.1:{port}"\n'
        )
        commands = [
            ["inspect", f"redis://127.0.0.1:{port}", "--verify"],
            ["top", f"http://me:hunter2@127.0.0.1:{port}/metrics?pw=hunter2", "--once"],
        ]
        if name in DOCTOR_SERVERS:
            commands.append(["doctor", "--profile", str(profile)])
        otlp = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://me:hunter2@127.0.0.1:{port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        }
        for result in run(commands, **otlp):
            assert_one_message(result)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["top", "ftp://me:hunter2@host/?pw=hunter2"], "URL is ftp://***@host/?pw=***"),
        (["inspect", "http://me:hunter2@host"], "http://***@host"),
        (["inspect", "redis://me:hunter2@host"], "url contains a user or a password"),
        (["inspect", "redis://host?pw=hunter2"], "url contains a user or a password"),
        (["profile", "show", "--pw=hunter2"], "--pw=***"),
        (["profile", "show", "redis://me:hunter2@host/x"], "no such profile"),
        (["top", "--interval", "x", "http://me:hunter2@h"], "--interval"),
        (["replay", "x", "--token", "hunter2"], "--token ***"),
    ],
)
def test_argument_with_a_secret_is_not_printed(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvcache import cli

    try:
        code = cli.main(argv)
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    printed = capsys.readouterr()
    assert code in (1, 2)
    assert text in printed.err
    assert "hunter2" not in printed.out + printed.err
