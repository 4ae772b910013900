"""Replay a trace of requests through L1 as a live stack runs it, and print the hit ratios.

TRACE is a file in Mooncake's format (one JSON object per line, optionally gzipped), or "-" for
standard input. A live engine writes one with KVCACHE_RECORD=FILE. The index and the policies are
those of the live stack; the optimum is Belady's, which knows the future. Only full blocks are
stored and counted, as in vLLM.

Exit code: 0 for success, 1 if a policy failed or a file could not be written, 2 for invalid
arguments or an invalid trace.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvcache.cli.amounts import Amount, BlockSize, at_least, block_nbytes, capacities
from kvcache.cli.progress import ProgressBar
from kvcache.cli.table import painter
from kvcache.eviction import POLICIES
from kvcache.inputs import open_input
from kvcache.replay.trace import MAX_LINES, PLAUSIBLE_REQUESTS_PER_S, TIME_UNITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvcache.models import Model
    from kvcache.replay.groups import ModelBlocks
    from kvcache.replay.jobs import Result
    from kvcache.replay.trace import Trace

    Results = Sequence[Result]

PLOT_SUFFIX = ".svg"
PARALLEL_BLOCKS = 300_000
"""The least lookups, in all replays, for which other processes are started: starting one takes as
long."""
TRAFFIC = ("chat", "agent", "rag", "shift", "cyclic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `kvcache replay`."""
    add = parser.add_argument
    add("trace", nargs="?", metavar="TRACE", help='a file, or "-" for standard input')
    add("--generate", choices=TRAFFIC, help="generate traffic instead of reading a trace")
    add("--requests", type=at_least(1), metavar="N", help="requests to generate (10000)")
    add("--seed", type=at_least(0), metavar="N", help="seed of generated traffic and of hints (0)")
    add(
        "--policy", type=_policies, default=list(POLICIES), metavar="NAMES",
        help=f'{", ".join(POLICIES)}, "pkg.mod:Class", several separated by commas, or "all" (all)',
    )  # fmt: skip
    add(
        "--capacity", type=capacities, metavar="LIST",
        help='capacity of L1, in blocks ("10000") or bytes ("64GiB"), several separated by commas '
        "(a tenth of the trace's distinct blocks)",
    )  # fmt: skip
    add(
        "--tiers", type=capacities, metavar="LIST",
        help="capacities of L1 and of each lower tier, separated by commas",
    )  # fmt: skip
    add(
        "--bytes-per-token", type=block_nbytes, metavar="SIZE",
        help="bytes of one token's KV cache, all layers together",
    )  # fmt: skip
    add(
        "--bytes-per-block", type=block_nbytes, metavar="SIZE", help="bytes of one block's KV cache"
    )
    add(
        "--model", type=_model, metavar="MODEL",
        help="replay all kept groups of a known model (plan --help lists them) or of a config.json",
    )  # fmt: skip
    add(
        "--block-tokens", type=at_least(1), metavar="N",
        help="tokens of a block (the number in the trace, else 512)",
    )  # fmt: skip
    add(
        "--time-unit", choices=TIME_UNITS, default="ms",
        help="unit of the trace's timestamps (ms, as in Mooncake's format)",
    )  # fmt: skip
    add("--partial", action="store_true", help="store and count partial last blocks as well")
    add(
        "--hints", type=_share, default=0.0, metavar="SHARE",
        help="share of ended sessions that get a hint, 0 to 1 (0)",
    )  # fmt: skip
    add(
        "--processes", type=at_least(1), metavar="N", help="processes to use at most (one per core)"
    )
    add("--json", action="store_true", help="print a JSON object per line, policy and capacity")
    add(
        "--plot", type=Path, metavar="FILE.svg",
        help="draw the hit ratio against DRAM, around the capacity",
    )  # fmt: skip


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; a share, from 0 to 1")
    return share


def _model(text: str) -> Model:
    from kvcache.models import find_model

    try:
        return find_model(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _policies(text: str) -> list[str]:
    from kvcache.eviction import policy_class

    names = [name.strip() for name in text.split(",")]
    names = [each for name in names for each in (POLICIES if name == "all" else [name])]
    try:
        for name in names:
            policy_class(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return list(dict.fromkeys(names))


class UsageError(ValueError):
    """Arguments that do not go together; the message has what to change."""


class ReplayPlan(NamedTuple):
    """What to replay.

    Attributes:
        policies: names of the policies.
        capacities: blocks of each tier, once for each replay.
        marked: the position of the user's capacity; the other capacities are only for the plot.
        size: size of a block.
        model: the groups of a model; ``None`` replays one group.
    """

    policies: list[str]
    capacities: list[tuple[int, ...]]
    marked: int
    size: BlockSize
    model: ModelBlocks | None = None


def run(args: argparse.Namespace) -> int:
    """Replay and print; returns the exit code."""
    from kvcache.replay import jobs
    from kvcache.replay.trace import TraceError

    try:
        check(args)
        trace = _trace(args)
        replays = plan(args, trace)
    except (UsageError, TraceError) as error:
        print(f"kvcache replay: {error}", file=sys.stderr)
        return 2
    # The policy None is the optimum. It is known for blocks of one size only.
    policies = replays.policies if replays.model else [None, *replays.policies]
    work = [
        jobs.ReplayJob(policy, tiers, replays.model)
        for tiers in replays.capacities
        for policy in policies
    ]
    parallel = len(work) * len(trace.blocks) > PARALLEL_BLOCKS
    processes = args.processes or (jobs.cpu_count() if parallel else 1)
    try:
        with ProgressBar(sys.stderr, len(work) * len(trace)) as bar:
            results = jobs.run(trace, work, processes, bar.add)
    except jobs.JobError as error:
        print(f"kvcache replay: {error}", file=sys.stderr)
        return 1
    return _print_results(args, trace, replays, results)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for arguments that are invalid whatever the trace is."""
    if (args.trace is None) == (args.generate is None):
        raise UsageError("pass either a TRACE or --generate")
    _check_traffic(args)
    if args.model:
        _check_model(args)
    else:
        _check_sizes(args)


def _check_model(args: argparse.Namespace) -> None:
    from kvcache.cli.replay import models

    try:
        models.check(args)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_sizes(args: argparse.Namespace) -> None:
    if args.capacity and args.tiers:
        raise UsageError("--tiers includes the capacity of L1: leave --capacity out")
    if args.bytes_per_token and args.bytes_per_block:
        raise UsageError("pass either --bytes-per-token or --bytes-per-block")
    amounts: list[Amount] = args.capacity or args.tiers or []
    if not (args.bytes_per_token or args.bytes_per_block):
        for amount in amounts:
            if amount.nbytes:
                raise UsageError(
                    f"{amount.text} is in bytes: pass the size of a block with --bytes-per-token "
                    "or --bytes-per-block, or a number of blocks"
                )
    if args.plot:
        _check_plot(args)


def _check_traffic(args: argparse.Namespace) -> None:
    if args.requests and args.requests > MAX_LINES:
        raise UsageError(f"--requests is {args.requests:,}; it must be at most {MAX_LINES:,}")
    if args.generate is None and args.requests:
        raise UsageError("--requests needs --generate")
    if args.generate is None and not args.hints and args.seed is not None:
        raise UsageError("--seed needs --generate or --hints")
    if args.generate and args.time_unit != "ms":
        raise UsageError("--time-unit needs a TRACE: generated traffic has no timestamps to read")
    if args.generate and args.block_tokens:
        raise UsageError("--block-tokens needs a TRACE: generated blocks have 512 tokens")


def _check_plot(args: argparse.Namespace) -> None:
    if args.plot.suffix != PLOT_SUFFIX:
        raise UsageError(f"--plot {args.plot}: the name must end in {PLOT_SUFFIX}")
    if args.tiers or len(args.capacity or ()) > 1:
        raise UsageError("--plot draws around one --capacity of L1: pass one, and no --tiers")
    if not args.plot.absolute().parent.is_dir():
        raise UsageError(f"--plot {args.plot}: no such directory")
    if args.plot.exists() and not (args.plot.is_file() or args.plot.is_dir()):
        raise UsageError(f"--plot {args.plot}: exists and is not a regular file")


def _trace(args: argparse.Namespace) -> Trace:
    from kvcache.replay.oracle import with_hints

    trace = _trace_without_hints(args)
    return with_hints(trace, args.hints, args.seed or 0) if args.hints else trace


def _trace_without_hints(args: argparse.Namespace) -> Trace:
    from kvcache.replay.generators import generate
    from kvcache.replay.trace import read

    if args.generate:
        requests, seed = args.requests or 10_000, args.seed or 0
        return generate(args.generate, requests, seed, partial=args.partial)
    stdin = args.trace == "-"
    name = "standard input" if stdin else args.trace
    try:
        # Standard input may be a pipe and slow; a file by name must be regular and readable now.
        with os.fdopen(os.dup(0), "rb") if stdin else open_input(Path(name)) as file:
            trace = read(
                file, name, block_tokens=args.block_tokens, partial=args.partial,
                unit=args.time_unit,
            )  # fmt: skip
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}") from error
    _warn_of_implausible_rate(trace, args.time_unit)
    return trace


def _warn_of_implausible_rate(trace: Trace, unit: str) -> None:
    """Warn if the timestamps are probably in another unit than ``unit``."""
    slowest, fastest = PLAUSIBLE_REQUESTS_PER_S
    rate = trace.requests_per_s
    if rate is not None and not slowest <= rate <= fastest:
        print(
            f"kvcache replay: implausible rate ({len(trace):,} requests, {rate:,.3g} a second); "
            f"timestamps were read in {unit}, pass --time-unit if they are in another unit",
            file=sys.stderr,
        )


def plan(args: argparse.Namespace, trace: Trace) -> ReplayPlan:
    """Return what to replay, with capacities in blocks of this trace."""
    if args.model:
        return _model_plan(args, trace)
    per_token = args.bytes_per_token
    size = BlockSize(per_token * trace.block_tokens if per_token else args.bytes_per_block)
    try:
        blocks = [size.blocks(amount) for amount in args.capacity or args.tiers or ()]
    except ValueError as error:
        raise UsageError(str(error)) from None
    if args.tiers:
        return ReplayPlan(args.policy, [tuple(blocks)], 0, size)
    blocks = blocks or [max(1, trace.distinct // 10)]
    if not args.plot:
        return ReplayPlan(args.policy, [(capacity,) for capacity in blocks], 0, size)
    plotted = capacities_around(blocks[0], trace.distinct)
    return ReplayPlan(args.policy, [(n,) for n in plotted], plotted.index(blocks[0]), size)


def _model_plan(args: argparse.Namespace, trace: Trace) -> ReplayPlan:
    from kvcache.cli.replay import models
    from kvcache.replay.groups import ModelBlocks

    try:
        model = ModelBlocks.of(args.model, trace.block_tokens)
        slots = models.slots(model, trace, args.capacity or ())
    except ValueError as error:
        raise UsageError(str(error)) from None
    size = BlockSize(model.slot_nbytes)
    return ReplayPlan(args.policy, [(count,) for count in slots], 0, size, model)


def capacities_around(capacity: int, enough: int) -> list[int]:
    """Return the capacities to plot.

    These are up to three halvings of `capacity`, `capacity` itself, and up to five doublings, until
    `enough` blocks fit; always one doubling.
    """
    smaller = {capacity >> halvings for halvings in range(1, 4)} - {0}
    larger = [capacity << doublings for doublings in range(1, 6)]
    needed = [each for each in larger if each // 2 < enough]
    return [*sorted(smaller), capacity, *(needed or larger[:1])]


def _print_results(
    args: argparse.Namespace, trace: Trace, replays: ReplayPlan, results: Results
) -> int:
    """Print the results and write the plot; returns the exit code."""
    from kvcache.cli.replay.models import ModelResults
    from kvcache.cli.replay.results import ReplayResults
    from kvcache.replay.groups import GroupsOutcome

    name = args.generate or ("standard input" if args.trace == "-" else Path(args.trace).name)
    if replays.model:
        outcomes = [result for result in results if isinstance(result, GroupsOutcome)]
        model_table = ModelResults(trace, replays.model, outcomes)
        if args.json:
            for fields in model_table.json_objects():
                print(json.dumps(fields))
        else:
            print(model_table.text(name, painter(sys.stdout)))
        return 0
    one_group = [result for result in results if not isinstance(result, GroupsOutcome)]
    table = ReplayResults(trace, replays.size, one_group)
    if args.json:
        for fields in table.json_objects():
            print(json.dumps(fields))
    else:
        print(table.text(name, partial=args.partial, paint=painter(sys.stdout)))
    if args.plot:
        from kvcache.cli.replay import plot

        title = args.generate or Path(args.trace).name
        try:
            args.plot.write_text(plot.svg(table.plot(title, replays.marked)), encoding="utf-8")
        except OSError as error:
            print(f"kvcache replay: cannot write {args.plot}: {error.strerror}", file=sys.stderr)
            return 1
    return 0
