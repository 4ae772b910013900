"""Calculate how much KV cache fits, a capacity for L1, and whether loading beats computing.

The input is a model's config.json (or --layers, --kv-heads and --head-dim), its tensor-parallel
ranks, and the memory of the pod and of the engine. Sizes are "64GiB", "80%" of this container's
memory, or bytes. All ranks of a node share one L1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kvcache import host_memory
from kvcache.cli.plan.capacity import BlockSizes, block_sizes, copy_rate, cores
from kvcache.cli.plan.model import ELEMENT_NBYTES, MAX_NUMBER, Model, read_model
from kvcache.cli.table import YELLOW, Painter, painter, pairs
from kvcache.sizes import format_size, parse_size

_SHAPE = ("layers", "kv_heads", "head_dim", "latent_dim")
_DTYPES = ("auto", *ELEMENT_NBYTES, "fp8_e4m3", "fp8_e5m2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kvcache plan`."""
    add = parser.add_argument
    add("config", nargs="?", type=Path, help="the model's config.json, or its folder")
    add("--layers", type=int, help="overrides num_hidden_layers")
    add("--kv-heads", type=int, help="overrides num_key_value_heads")
    add("--head-dim", type=int, help="elements of a head; overrides the config's")
    add("--latent-dim", type=int, help="MLA: kv_lora_rank + qk_rope_head_dim")
    add(
        "--dtype",
        choices=_DTYPES,
        default="auto",
        help="data type of the KV cache (auto: the model's)",
    )
    add("--block-tokens", type=int, default=16, help="the engine's block size (16)")
    add("--tensor-parallel-size", "--tp", type=int, default=1, metavar="N", help="ranks (1)")
    add("--pod-memory", metavar="P", help="memory of the pod (this container's limit)")
    add("--engine-memory", metavar="E", help="memory of the whole engine (half of P)")
    add("--prefix-tokens", type=int, default=4096, help="length of a shared prefix (4096)")
    add("--prefill-tokens-per-s", type=float, help="the engine's speed, to compare with loading")
    add("--bandwidth", metavar="SIZE", help="bytes loaded from L1 per second (measured here)")
    add("--disk", metavar="SIZE", help="capacity of a disk tier")
    add("--disk-bandwidth", metavar="SIZE", help="bytes read from the disk per second")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the plan; return 2 for invalid input."""
    try:
        model, figures = plan(args)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(figures))
    else:
        print(text(model, figures, painter(sys.stdout)))
    return 0


def plan(args: argparse.Namespace) -> tuple[Model, dict[str, Any]]:
    """Return the model, and all figures by name: `*_nbytes`, `*_s`, counts.

    Raises:
        ValueError: an argument or the configuration is invalid.
    """
    for name in (*_SHAPE, "block_tokens", "tensor_parallel_size", "prefix_tokens"):
        if (number := getattr(args, name)) is not None and not 1 <= number <= MAX_NUMBER:
            raise ValueError(
                f"--{name.replace('_', '-')} is {number}; it must be 1 to {MAX_NUMBER}"
            )
    model = read_model(args.config, {name: getattr(args, name) for name in _SHAPE})
    dtype = model.dtype if args.dtype == "auto" else args.dtype
    ranks = args.tensor_parallel_size
    sizes = block_sizes(
        model,
        dtype_nbytes=ELEMENT_NBYTES[dtype.partition("_")[0]],
        ranks=ranks,
        block_tokens=args.block_tokens,
    )
    limit = host_memory.limit()
    pod = _size(args, "pod_memory", limit.nbytes) or limit.nbytes
    engine = _size(args, "engine_memory", pod) or pod // 2
    count = sizes.in_memory(pod - engine, ranks)
    if not count:
        raise ValueError(
            f"the engine takes {format_size(engine)} of --pod-memory ({format_size(pod)}); the "
            f"rest has no room for one block of {format_size(sizes.slot_nbytes)}"
        )
    aibrix_rank = pod // ranks - engine
    figures = {
        "model": model.name,
        "dtype": dtype,
        "tensor_parallel_size": ranks,
        "rank_token_nbytes": sizes.rank_token_nbytes,
        "token_nbytes": sizes.token_nbytes,
        "block_tokens": sizes.block_tokens,
        "block_nbytes": sizes.block_nbytes,
        "pod_nbytes": pod,
        "pod_source": "--pod-memory" if args.pod_memory else limit.source,
        "engine_nbytes": engine,
        "engine_source": "--engine-memory" if args.engine_memory else "assumed",
        "l1_nbytes": count * sizes.slot_nbytes,
        "aibrix_rank_nbytes": aibrix_rank,
        "aibrix_node_nbytes": aibrix_rank * ranks,
        "prefix_tokens": args.prefix_tokens,
        **_capacity("l1", sizes, count, args.prefix_tokens),
        **_times(args, sizes),
        "warnings": list(model.warnings),
    }
    return model, figures


def _size(args: argparse.Namespace, name: str, whole: int | None = None) -> int | None:
    """Return the size in an argument; a number without a unit is bytes."""
    text = getattr(args, name)
    if text is None:
        return None
    try:
        return parse_size(int(text) if text.isdigit() else text, whole)
    except ValueError as error:
        raise ValueError(f"--{name.replace('_', '-')} is {text!r}: {error}") from error


def _capacity(tier: str, sizes: BlockSizes, count: int, prefix_tokens: int) -> dict[str, int]:
    return {
        f"{tier}_blocks": count,
        f"{tier}_tokens": count * sizes.block_tokens,
        f"{tier}_prefixes": sizes.prefixes(count, prefix_tokens),
    }


def _times(args: argparse.Namespace, sizes: BlockSizes) -> dict[str, Any]:
    """Return the time to load a prefix from each tier, and to compute it if that is known."""
    prefix = args.prefix_tokens // sizes.block_tokens * sizes.block_nbytes
    bandwidth = _size(args, "bandwidth")
    rate = bandwidth or copy_rate(cores())
    figures: dict[str, Any] = {
        "bandwidth_nbytes_per_s": rate,
        "bandwidth_source": "--bandwidth" if bandwidth else f"a copy of memory, {cores()} threads",
        "l1_load_s": prefix / rate,
    }
    if disk := _size(args, "disk"):
        figures |= {"disk_nbytes": disk}
        figures |= _capacity("disk", sizes, sizes.on_disk(disk), args.prefix_tokens)
    if disk_rate := _size(args, "disk_bandwidth"):
        figures["disk_load_s"] = prefix / disk_rate
    if (prefill := args.prefill_tokens_per_s) is not None:
        if not 0 < prefill <= MAX_NUMBER:
            raise ValueError(
                f"--prefill-tokens-per-s is {prefill}; it must be above 0, to {MAX_NUMBER}"
            )
        figures["compute_s"] = args.prefix_tokens / prefill
        figures["break_even_nbytes_per_s"] = sizes.token_nbytes * prefill
    return figures


def text(model: Model, figures: dict[str, Any], paint: Painter) -> str:
    """Return the plan as text."""
    size, ranks = format_size, figures["tensor_parallel_size"]
    token, block = figures["token_nbytes"], figures["block_nbytes"]
    each = f" ({size(figures['rank_token_nbytes'])} in each of {ranks} ranks)" if ranks > 1 else ""
    engine = f"{size(figures['engine_nbytes'])} for the engine ({figures['engine_source']})"
    rows = [
        ("model", f"{model.description()}, {figures['dtype']}"),
        ("a token", size(token) + each),
        ("a block", f"{size(block)}: {figures['block_tokens']} tokens, all layers and ranks"),
        ("memory", f"{size(figures['pod_nbytes'])} ({figures['pod_source']}), {engine}"),
        ("L1", f"KVCACHE__L1__CAPACITY={size(figures['l1_nbytes'])}"),
        *_capacity_rows(figures, "l1"),
        *_capacity_rows(figures, "disk"),
    ]
    parts = [pairs(rows), pairs(_time_rows(figures)), _aibrix_note(figures)]
    parts += [paint(f"warning: {warning}", YELLOW) for warning in figures["warnings"]]
    return "\n\n".join(parts)


def _capacity_rows(figures: dict[str, Any], tier: str) -> list[tuple[str, str]]:
    if f"{tier}_blocks" not in figures:
        return []
    prefixes = f"{figures[f'{tier}_prefixes']:,} prefixes of {figures['prefix_tokens']:,} tokens"
    held = (
        f"{figures[f'{tier}_tokens']:,} tokens in {figures[f'{tier}_blocks']:,} blocks: {prefixes}"
    )
    name = "it holds" if tier == "l1" else "the disk"
    return [(name, held if tier == "l1" else f"{format_size(figures['disk_nbytes'])}: {held}")]


def _time_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    rate = f"{figures['bandwidth_nbytes_per_s'] / 2**30:.3g} GiB/s"
    rows = [("from L1", f"{_time(figures['l1_load_s'])} ({rate}: {figures['bandwidth_source']})")]
    if "disk_load_s" in figures:
        rows.append(("from disk", _time(figures["disk_load_s"])))
    if "compute_s" in figures:
        even = f"{figures['break_even_nbytes_per_s'] / 2**30:.3g} GiB/s"
        rows.append(("computed", f"{_time(figures['compute_s'])}; a tier is faster above {even}"))
    return [(f"a prefix {name}", time) for name, time in rows]


def _aibrix_note(figures: dict[str, Any]) -> str:
    ranks, rank_nbytes = figures["tensor_parallel_size"], max(0, figures["aibrix_rank_nbytes"])
    pod, engine = format_size(figures["pod_nbytes"]), format_size(figures["engine_nbytes"])
    return (
        f"AIBrix: P / TP - E = {pod} / {ranks} - {engine} = {format_size(rank_nbytes)} for each "
        f"rank, {format_size(rank_nbytes * ranks)} on the node.\n"
        "There, every rank has its own L1 and setting, and each subtracts E. Here, the ranks of\n"
        "a node share one L1: P - E, with E for the whole engine, minus the index and the page\n"
        f"tables of {ranks + 1} processes."
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
