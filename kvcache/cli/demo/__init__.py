"""Play several users' chats on a real vLLM, three times, and compare.

Engine 1 has a cache too small for all conversations; engine 2 has the same cache, and kvcache with
the profile l1-only; engine 3 has a cache large enough to keep everything. All three get the same
traffic. Without --model, a small Llama with random weights is made first.

Exit code: 0 when kvcache changed no answer and left no slot pinned, 1 when it did or an engine
failed, 2 for arguments that cannot work and for a missing engine.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kvcache import host_memory
from kvcache.cli.demo import checkpoint, engine
from kvcache.cli.demo.chats import Chats
from kvcache.cli.demo.engine import BLOCK_TOKENS, EngineRun, Setup
from kvcache.cli.demo.report import DemoReport
from kvcache.cli.table import painter
from kvcache.sizes import format_size
from kvcache.slab import slot_nbytes_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kvcache demo`."""
    parser.add_argument(
        "--model", metavar="PATH", help="a local folder, or a name in the local Hugging Face cache"
    )
    # One user alone never loses the engine's cache to somebody else.
    parser.add_argument("--users", type=_at_least(2), default=6, metavar="N")
    parser.add_argument("--turns", type=_at_least(2), default=4, metavar="N", help="of each user")
    parser.add_argument(
        "--system-tokens", type=_at_least(1), default=128, metavar="N",
        help="length of the system prompt that all users share",
    )  # fmt: skip
    parser.add_argument(
        "--document-tokens", type=_at_least(1), default=2300, metavar="N",
        help="length of the document each user brings to the first turn",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; a whole number, at least {least}")
        return int(text)

    return number


def run(args: argparse.Namespace) -> int:
    """Play the chats on three engines and print the comparison; returns the exit code."""
    if importlib.util.find_spec("vllm") is None:
        print("kvcache demo needs vLLM in this environment", file=sys.stderr)
        return 2
    chats = Chats(args.users, args.turns, args.system_tokens, args.document_tokens)
    try:
        with tempfile.TemporaryDirectory(prefix="kvcache-demo-") as folder:
            report = _compare(args.model or str(checkpoint.write(Path(folder))), chats)
    except (TooLargeError, engine.EngineError) as error:
        print(f"\nkvcache demo: {error}", file=sys.stderr)
        return 2 if isinstance(error, TooLargeError) else 1
    if args.json:
        traffic = {"model": args.model, "users": args.users, "turns": args.turns}
        print(json.dumps(report.figures() | traffic))
    else:
        print(f"\n{report.text(painter(sys.stdout))}")
    return 0 if report.passed else 1


class TooLargeError(ValueError):
    """The conversation needs more memory than a demo may take."""


def _compare(model: str, chats: Chats) -> DemoReport:
    # One block of each cache is never used (vLLM's null block), one is to spare.
    small = Setup(model, chats.longest, blocks=_blocks(chats.longest) + 2)
    without = _play(1, "small engine cache, without kvcache", small, chats)

    # The last block of each conversation and of the warm-up is not full, or not shared.
    blocks = _blocks(chats.distinct) + _blocks(chats.longest) + chats.users + 2
    l1_nbytes = blocks * slot_nbytes_for(without.block_nbytes)
    allowed = host_memory.limit().nbytes // 4
    if l1_nbytes > allowed:
        raise TooLargeError(
            f"the conversations take {format_size(l1_nbytes)} of KV cache, and the demo may take a "
            f"quarter of the memory, {format_size(allowed)}: lower --users or --document-tokens"
        )
    kvcache = _play(
        2, "small engine cache, with kvcache", replace(small, l1_nbytes=l1_nbytes), chats
    )
    own = _play(3, "large engine cache, without kvcache", replace(small, blocks=blocks), chats)
    return DemoReport(without, kvcache, own)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _play(number: int, what: str, setup: Setup, chats: Chats) -> EngineRun:
    def say(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)

    start = time.monotonic()
    say(f"engine {number} of 3: {what} ")
    run = engine.play(setup, chats, lambda _: say("."))
    say(f" {time.monotonic() - start:.0f} s\n")
    return run
