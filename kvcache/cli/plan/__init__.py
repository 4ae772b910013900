"""How much KV cache fits, what to give L1, and whether loading is faster than computing.

From a model's config.json (or --layers, --kv-heads and --head-dim), its tensor-parallel ranks, and
the memory of the pod and of the engine in it. Sizes are "64GiB", "80%" of this container's memory,
or bytes; L1 is one for the node, whatever the ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kvcache import host_memory
from kvcache.cli.plan.capacity import Blocks, blocks_of, copy_rate, cores
from kvcache.cli.plan.model import ELEMENT_NBYTES, MOST, Model, read_model
from kvcache.cli.table import YELLOW, Painter, painter, pairs
from kvcache.sizes import format_size, parse_size

_SHAPE = ("layers", "kv_heads", "head_dim", "latent_dim")
_DTYPES = ("auto", *ELEMENT_NBYTES, "fp8_e4m3", "fp8_e5m2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `kvcache plan` takes."""
    add = parser.add_argument
    add("config", nargs="?", type=Path, help="the model's config.json, or the folder that has it")
    add("--layers", type=int, help="instead of num_hidden_layers")
    add("--kv-heads", type=int, help="instead of num_key_value_heads")
    add("--head-dim", type=int, help="elements of a head, instead of the config's")
    add("--latent-dim", type=int, help="MLA: kv_lora_rank + qk_rope_head_dim")
    add("--dtype", choices=_DTYPES, default="auto", help="of the KV cache; auto is the model's")
    add("--block-tokens", type=int, default=16, help="the engine's block size (16)")
    add("--tensor-parallel-size", "--tp", type=int, default=1, metavar="N", help="ranks (1)")
    add("--pod-memory", metavar="P", help="what the pod may use (this container's limit)")
    add("--engine-memory", metavar="E", help="that all of the engine needs (half of P)")
    add("--prefix-tokens", type=int, default=4096, help="of a prefix that is used again (4096)")
    add("--prefill-tokens-per-s", type=float, help="that the engine computes, to compare with")
    add("--bandwidth", metavar="SIZE", help="of a load, per second (a copy, measured here)")
    add("--disk", metavar="SIZE", help="capacity of a disk tier below L1")
    add("--disk-bandwidth", metavar="SIZE", help="that it reads per second")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 2 for what cannot be planned."""
    try:
        model, found = plan(args)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found))
    else:
        print(text(model, found, painter(sys.stdout)))
    return 0


def plan(args: argparse.Namespace) -> tuple[Model, dict[str, Any]]:
    """The model, and all figures by name: `*_nbytes`, `*_s`, counts. ValueError says what not."""
    for name in (*_SHAPE, "block_tokens", "tensor_parallel_size", "prefix_tokens"):
        if (number := getattr(args, name)) is not None and not 1 <= number <= MOST:
            raise ValueError(f"--{name.replace('_', '-')} is {number}; it must be 1 to {MOST}")
    model = read_model(args.config, {name: getattr(args, name) for name in _SHAPE})
    dtype = model.dtype if args.dtype == "auto" else args.dtype
    ranks = args.tensor_parallel_size
    blocks = blocks_of(
        model,
        dtype_nbytes=ELEMENT_NBYTES[dtype.partition("_")[0]],
        ranks=ranks,
        block_tokens=args.block_tokens,
    )
    here = host_memory.limit()
    pod = _size(args, "pod_memory", here.nbytes) or here.nbytes
    engine = _size(args, "engine_memory", pod) or pod // 2
    count = blocks.in_memory(pod - engine, ranks)
    if not count:
        raise ValueError(
            f"of the {format_size(pod)} of --pod-memory the engine takes {format_size(engine)}, "
            f"and not one block of {format_size(blocks.slot_nbytes)} fits into the rest"
        )
    theirs = pod // ranks - engine
    found = {
        "model": model.name,
        "dtype": dtype,
        "tensor_parallel_size": ranks,
        "rank_token_nbytes": blocks.rank_token_nbytes,
        "token_nbytes": blocks.token_nbytes,
        "block_tokens": blocks.block_tokens,
        "block_nbytes": blocks.block_nbytes,
        "pod_nbytes": pod,
        "pod_source": "--pod-memory" if args.pod_memory else here.source,
        "engine_nbytes": engine,
        "engine_source": "--engine-memory" if args.engine_memory else "assumed",
        "l1_nbytes": count * blocks.slot_nbytes,
        "aibrix_rank_nbytes": theirs,
        "aibrix_node_nbytes": theirs * ranks,
        "prefix_tokens": args.prefix_tokens,
        **_holds("l1", blocks, count, args.prefix_tokens),
        **_times(args, blocks),
        "warnings": list(model.warnings),
    }
    return model, found


def _size(args: argparse.Namespace, name: str, whole: int | None = None) -> int | None:
    given = getattr(args, name)
    try:
        # argparse gives text; a bare number is bytes.
        return (
            None if given is None else parse_size(int(given) if given.isdigit() else given, whole)
        )
    except ValueError as error:
        raise ValueError(f"--{name.replace('_', '-')} is {given!r}: {error}") from error


def _holds(tier: str, blocks: Blocks, count: int, prefix_tokens: int) -> dict[str, int]:
    return {
        f"{tier}_blocks": count,
        f"{tier}_tokens": count * blocks.block_tokens,
        f"{tier}_prefixes": blocks.prefixes(count, prefix_tokens),
    }


def _times(args: argparse.Namespace, blocks: Blocks) -> dict[str, Any]:
    """How long a prefix takes to load from each tier, and to compute where that is known."""
    prefix = args.prefix_tokens // blocks.block_tokens * blocks.block_nbytes
    given = _size(args, "bandwidth")
    rate = given or copy_rate(cores())
    found: dict[str, Any] = {
        "bandwidth_nbytes_per_s": rate,
        "bandwidth_source": "--bandwidth" if given else f"a copy of memory, {cores()} threads",
        "l1_load_s": prefix / rate,
    }
    if disk := _size(args, "disk"):
        found |= {"disk_nbytes": disk}
        found |= _holds("disk", blocks, blocks.on_disk(disk), args.prefix_tokens)
    if disk_rate := _size(args, "disk_bandwidth"):
        found["disk_load_s"] = prefix / disk_rate
    if (prefill := args.prefill_tokens_per_s) is not None:
        if not 0 < prefill <= MOST:
            raise ValueError(f"--prefill-tokens-per-s is {prefill}; it must be above 0, to {MOST}")
        found["compute_s"] = args.prefix_tokens / prefill
        found["break_even_nbytes_per_s"] = blocks.token_nbytes * prefill
    return found


def text(model: Model, found: dict[str, Any], paint: Painter) -> str:
    """The same for people."""
    size, ranks = format_size, found["tensor_parallel_size"]
    token, block = found["token_nbytes"], found["block_nbytes"]
    each = f" ({size(found['rank_token_nbytes'])} in each of {ranks} ranks)" if ranks > 1 else ""
    engine = f"{size(found['engine_nbytes'])} for the engine ({found['engine_source']})"
    rows = [
        ("model", f"{model.described()}, {found['dtype']}"),
        ("a token", size(token) + each),
        ("a block", f"{size(block)}: {found['block_tokens']} tokens, all layers and ranks"),
        ("memory", f"{size(found['pod_nbytes'])} ({found['pod_source']}), {engine}"),
        ("L1", f"KVCACHE__L1__CAPACITY={size(found['l1_nbytes'])}"),
        *_holding(found, "l1"),
        *_holding(found, "disk"),
    ]
    parts = [pairs(rows), pairs(_moving(found)), _differs(found)]
    parts += [paint(f"warning: {warning}", YELLOW) for warning in found["warnings"]]
    return "\n\n".join(parts)


def _holding(found: dict[str, Any], tier: str) -> list[tuple[str, str]]:
    if f"{tier}_blocks" not in found:
        return []
    prefixes = f"{found[f'{tier}_prefixes']:,} prefixes of {found['prefix_tokens']:,} tokens"
    held = f"{found[f'{tier}_tokens']:,} tokens in {found[f'{tier}_blocks']:,} blocks: {prefixes}"
    name = "it holds" if tier == "l1" else "the disk"
    return [(name, held if tier == "l1" else f"{format_size(found['disk_nbytes'])}: {held}")]


def _moving(found: dict[str, Any]) -> list[tuple[str, str]]:
    rate = f"{found['bandwidth_nbytes_per_s'] / 2**30:.3g} GiB/s"
    rows = [("from L1", f"{_time(found['l1_load_s'])} ({rate}: {found['bandwidth_source']})")]
    if "disk_load_s" in found:
        rows.append(("from disk", _time(found["disk_load_s"])))
    if "compute_s" in found:
        even = f"{found['break_even_nbytes_per_s'] / 2**30:.3g} GiB/s"
        rows.append(("computed", f"{_time(found['compute_s'])}; a tier is faster above {even}"))
    return [(f"a prefix {name}", what) for name, what in rows]


def _differs(found: dict[str, Any]) -> str:
    ranks, theirs = found["tensor_parallel_size"], max(0, found["aibrix_rank_nbytes"])
    pod, engine = format_size(found["pod_nbytes"]), format_size(found["engine_nbytes"])
    return (
        f"AIBrix: P / TP - E = {pod} / {ranks} - {engine} = {format_size(theirs)} for each rank, "
        f"{format_size(theirs * ranks)} on the node.\n"
        "There every rank has an L1 and a setting of its own, and each takes E off. Here the\n"
        "ranks of a node share one L1: P - E, with E of the whole engine, less what the index and\n"
        f"the page tables of {ranks + 1} processes take."
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
