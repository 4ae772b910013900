"""Calculate how much KV cache fits, a capacity for L1, and whether loading beats computing.

The input is a model's config.json, the name of a known model, or --layers, --kv-heads and
--head-dim; its tensor-parallel ranks; and the memory of the pod and of the engine. Sizes are
"64GiB", "80%" of this container's memory, or bytes. All ranks of a node share one L1.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from kvcache import host_memory
from kvcache.cli.plan.capacity import CacheSizes, cache_sizes, copy_rate, cores
from kvcache.cli.plan.text import text
from kvcache.cli.table import painter
from kvcache.models import PRESETS, Model, find_model, read_model
from kvcache.models.config import ELEMENT_NBYTES
from kvcache.models.values import MAX_NUMBER
from kvcache.sizes import format_size, parse_size

_SHAPE = ("layers", "kv_heads", "head_dim", "latent_dim")
_COUNTS = ("block_tokens", "tensor_parallel_size", "prefix_tokens", "max_num_batched_tokens")
_DTYPES = ("auto", *ELEMENT_NBYTES, "fp8_e4m3", "fp8_e5m2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kvcache plan`."""
    add = parser.add_argument
    add(
        "config",
        nargs="?",
        help=f"the model's config.json, or its folder, or one of: {', '.join(PRESETS)}",
    )
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
    add(
        "--max-num-batched-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="tokens of a prefill chunk; the engine stores a state at its end (8192)",
    )
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
    for name in (*_SHAPE, *_COUNTS):
        if (number := getattr(args, name)) is not None and not 1 <= number <= MAX_NUMBER:
            raise ValueError(
                f"--{name.replace('_', '-')} is {number}; it must be 1 to {MAX_NUMBER}"
            )
    model = _model(args)
    dtype = model.dtype if args.dtype == "auto" else args.dtype
    ranks = args.tensor_parallel_size
    sizes = cache_sizes(
        model,
        cache_nbytes=ELEMENT_NBYTES[dtype.partition("_")[0]],
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
        "block_nbytes": sizes.groups[0].block_nbytes,
        "groups": _groups(sizes),
        "slot_nbytes": sizes.slot_nbytes,
        "pod_nbytes": pod,
        "pod_source": "--pod-memory" if args.pod_memory else limit.source,
        "engine_nbytes": engine,
        "engine_source": "--engine-memory" if args.engine_memory else "assumed",
        "l1_nbytes": count * sizes.slot_nbytes,
        "aibrix_rank_nbytes": aibrix_rank,
        "aibrix_node_nbytes": aibrix_rank * ranks,
        "prefix_tokens": args.prefix_tokens,
        **_prefix(args, sizes),
        **_capacity("l1", sizes, count, args),
        **_times(args, sizes),
        "warnings": list(model.warnings),
    }
    return model, figures


def _model(args: argparse.Namespace) -> Model:
    given = {name: getattr(args, name) for name in _SHAPE if getattr(args, name) is not None}
    return find_model(args.config, given) if args.config else read_model(None, given)


def _size(args: argparse.Namespace, name: str, whole: int | None = None) -> int | None:
    """Return the size in an argument; a number without a unit is bytes."""
    text = getattr(args, name)
    if text is None:
        return None
    try:
        return parse_size(int(text) if text.isdigit() else text, whole)
    except ValueError as error:
        raise ValueError(f"--{name.replace('_', '-')} is {text!r}: {error}") from error


def _groups(sizes: CacheSizes) -> list[dict[str, Any]]:
    return [
        {
            "kind": group.needs.kind,
            "needed_tokens": group.needs.tokens,
            "layers": group.layers,
            "block_tokens": group.block_tokens,
            "block_nbytes": group.block_nbytes,
            "parts": parts,
        }
        for group, parts in zip(sizes.groups, sizes.parts, strict=True)
    ]


def _prefix(args: argparse.Namespace, sizes: CacheSizes) -> dict[str, Any]:
    """Return what a prefix takes: to be resumed, and with every block that the engine stores."""
    resume = sizes.resume_blocks(args.prefix_tokens)
    stored = sizes.stored_blocks(args.prefix_tokens, args.max_num_batched_tokens)
    return {
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "resume_blocks": resume,
        "resume_nbytes": sizes.nbytes(resume),
        "stored_blocks": stored,
        "stored_nbytes": sizes.nbytes(stored),
    }


def _capacity(tier: str, sizes: CacheSizes, count: int, args: argparse.Namespace) -> dict[str, int]:
    """Return what `count` slots hold: if they hold only what prefixes need, and if all of it."""
    resume = sizes.slots(sizes.resume_blocks(args.prefix_tokens))
    stored = sizes.slots(sizes.stored_blocks(args.prefix_tokens, args.max_num_batched_tokens))
    prefixes = count // max(1, resume)
    several = len(sizes.groups) > 1 or sizes.groups[0].needs.kind != "all"
    return {
        f"{tier}_blocks": count,
        f"{tier}_tokens": prefixes * args.prefix_tokens if several else count * sizes.block_tokens,
        f"{tier}_prefixes": prefixes,
        f"{tier}_stored_prefixes": count // max(1, stored),
    }


def _times(args: argparse.Namespace, sizes: CacheSizes) -> dict[str, Any]:
    """Return the time to load a prefix from each tier, and to compute it if that is known."""
    prefix = sizes.nbytes(sizes.resume_blocks(args.prefix_tokens))
    bandwidth = _size(args, "bandwidth")
    rate = bandwidth or copy_rate(cores())
    figures: dict[str, Any] = {
        "bandwidth_nbytes_per_s": rate,
        "bandwidth_source": "--bandwidth" if bandwidth else f"a copy of memory, {cores()} threads",
        "l1_load_s": prefix / rate,
    }
    if disk := _size(args, "disk"):
        figures |= {"disk_nbytes": disk}
        figures |= _capacity("disk", sizes, sizes.on_disk(disk), args)
    if disk_rate := _size(args, "disk_bandwidth"):
        figures["disk_load_s"] = prefix / disk_rate
    if (prefill := args.prefill_tokens_per_s) is not None:
        if not 0 < prefill <= MAX_NUMBER:
            raise ValueError(
                f"--prefill-tokens-per-s is {prefill}; it must be above 0, to {MAX_NUMBER}"
            )
        figures["compute_s"] = args.prefix_tokens / prefill
        token = sizes.token_nbytes if len(sizes.groups) == 1 else prefix / args.prefix_tokens
        figures["break_even_nbytes_per_s"] = token * prefill
    return figures
