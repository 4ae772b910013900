"""A server that traces, with a tier below L1 and its worker in a process of its own.

It keeps a prompt, loses it from its own cache and from L1, and is asked for it again: the trace of
that last request has all that a load can have in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.engine.engine import BLOCK, Setup, prompt
from tests.support.engine.openai_server import Server, serving

SERVICE, MODEL = "vllm", "tiny-llama"  # what a trace calls them
Headers = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Traced:
    """A model, the bytes of its blocks, and of how many of them the prompt is."""

    checkpoint: Path
    block_nbytes: int = 32 << 10
    blocks: int = 5
    ranks: int = 1

    @property
    def l1_blocks(self) -> int:
        """All of the prompt's blocks wait to be written at once, and no more than a quarter may."""
        return 4 * self.blocks

    @property
    def asked(self) -> list[int]:
        """The prompt."""
        return prompt("traced", self.blocks * BLOCK + 9)

    @contextmanager
    def serving(self, folder: Path, endpoint: str, protocol: str) -> Iterator[Server]:
        """The server, told where to send its spans and what it is called; no more of tracing."""
        longest = self.l1_blocks + 2
        # Ranks bind their threads; one host has one memory node here, and two are pretended.
        bound = {"VLLM_CPU_OMP_THREADS_BIND": "", "OMP_NUM_THREADS": ""}
        of_ranks = bound | {"VLLM_CPU_SIM_MULTI_NUMA": "1"} if self.ranks > 1 else {}
        setup = Setup(
            str(self.checkpoint),
            blocks=2 * longest,
            l1=str(self.l1_blocks * self.block_nbytes),
            context=longest * BLOCK,
            environment=of_ranks
            | {
                "OTEL_SERVICE_NAME": SERVICE,
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": protocol,
                "OTEL_BSP_SCHEDULE_DELAY": "200",  # ms; so that a test waits less
                "KVCACHE_PROFILE": "l1-disk",
                "KVCACHE__DISK__PATH": str(folder / "disk"),
                "KVCACHE__DISK__CAPACITY": str(16 * self.l1_blocks * self.block_nbytes),
                "KVCACHE__DISK__IF_SLOWER": "load",  # small models compute faster than disks read
            },
        )
        more = [
            *("--otlp-traces-endpoint", endpoint, "--served-model-name", MODEL),
            *("--distributed-executor-backend", "mp", "--tensor-parallel-size", str(self.ranks)),
        ]
        with serving(setup, folder, *more) as server:
            yield server

    def keep(self, server: Server, headers: Headers) -> None:
        """Ask for the prompt, and have what came of it leave vLLM's own cache and L1."""
        assert server.complete(self.asked, headers) == 0
        server.complete(prompt("another", self.l1_blocks * BLOCK + 9))
        server.post("/reset_prefix_cache")

    def come_back(self, server: Server, headers: Headers) -> None:
        """Ask for the prompt again; all of it comes from the disk."""
        assert server.complete(self.asked, headers) == self.blocks * BLOCK
