"""Play the chats of several users on a real vLLM three times, and compare.

Engine 1 has a cache too small for all conversations. Engine 2 has the same cache, and kvcache with
the profile l1-only. Engine 3 has a cache large enough for everything. All three get the same
traffic. Without --model, the demo first makes a small Llama with random weights.

Exit code: 0 if kvcache changed no answer and left no slot pinned; 1 if it did, or an engine failed;
2 for invalid arguments, and if vLLM is not installed.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from kvcache import host_memory
from kvcache.cli.amounts import at_least
from kvcache.cli.demo import checkpoint, engine
from kvcache.cli.demo.chats import Chats
from kvcache.cli.demo.engine import BLOCK_TOKENS, EngineRun, EngineSetup
from kvcache.cli.demo.report import DemoReport
from kvcache.cli.table import painter
from kvcache.sizes import format_size
from kvcache.slab import slot_nbytes_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kvcache demo`."""
    add = parser.add_argument
    add("--model", metavar="PATH", help="a folder, or a name in the local Hugging Face cache")
    # The chats of a single user never evict each other.
    add("--users", type=at_least(2), default=6, metavar="N", help="(6)")
    add("--turns", type=at_least(2), default=4, metavar="N", help="turns of each user (4)")
    add(
        "--system-tokens", type=at_least(1), default=128, metavar="N",
        help="length of the system prompt that all users share (128)",
    )  # fmt: skip
    add(
        "--document-tokens", type=at_least(1), default=2300, metavar="N",
        help="length of the document in each user's first turn (2300)",
    )  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Play the chats on three engines and print the comparison; return the exit code."""
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
        print(json.dumps(report.to_json() | traffic))
    else:
        print(f"\n{report.text(painter(sys.stdout))}")
    return 0 if report.passed else 1


class TooLargeError(ValueError):
    """The conversations need more memory than the demo may take."""


def _compare(model: str, chats: Chats) -> DemoReport:
    # One block of each cache is never used (vLLM's null block); one more is spare.
    small = EngineSetup(model, chats.longest, blocks=_blocks(chats.longest) + 2)
    without = _play(1, "small engine cache, without kvcache", small, chats)

    # The last block of each conversation and of the warm-up is partial, or not shared.
    blocks = _blocks(chats.distinct) + _blocks(chats.longest) + chats.users + 2
    l1_nbytes = blocks * slot_nbytes_for(without.block_nbytes)
    allowed = host_memory.limit().nbytes // 4
    if l1_nbytes > allowed:
        raise TooLargeError(
            f"the conversations take {format_size(l1_nbytes)} of KV cache, and the demo may take a "
            f"quarter of the memory, {format_size(allowed)}: lower --users or --document-tokens"
        )
    with_l1, large = replace(small, l1_nbytes=l1_nbytes), replace(small, blocks=blocks)
    return DemoReport(
        without,
        _play(2, "small engine cache, with kvcache", with_l1, chats),
        _play(3, "large engine cache, without kvcache", large, chats),
    )


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _play(number: int, description: str, setup: EngineSetup, chats: Chats) -> EngineRun:
    """Play ``chats``; print a line of progress, to which the engine adds a dot for each turn."""
    start = time.monotonic()
    print(f"engine {number} of 3: {description} ", end="", file=sys.stderr, flush=True)
    engine_run = engine.play(setup, chats)
    print(f" {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return engine_run
