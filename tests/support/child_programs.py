"""Python programs in processes of their own, which tests read lines from and kill."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(code: str, *arguments: str) -> "subprocess.Popen[str]":
    """Start a program that can import the checkout's packages and tests."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def read_line(process: "subprocess.Popen[str]") -> str:
    """Wait for the next line that the program prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: "subprocess.Popen[str]") -> None:
    """Kill the program with SIGKILL, and wait for its end."""
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
