"""A server that exports traces, with a disk tier and its worker in a process of its own.

It computes a prompt, loses its blocks from vLLM's own cache and from L1, and serves them from disk:
the trace of that last request has every span that a load can have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.engine.engine import BLOCK, EngineSettings, prompt
from tests.support.engine.openai_server import OpenAIServer, serve_openai

SERVICE, MODEL = "vllm", "tiny-llama"  # their names in a trace
Headers = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TracedModel:
    """A model, and the prompt that is traced on it."""

    checkpoint: Path
    block_nbytes: int = 32 << 10
    blocks: int = 5  # of the prompt
    ranks: int = 1

    @property
    def l1_blocks(self) -> int:
        """The prompt's blocks fill the write queue, which holds a quarter of L1."""
        return 4 * self.blocks

    @property
    def prompt(self) -> list[int]:
        return prompt("traced", self.blocks * BLOCK + 9)

    @contextmanager
    def serve(self, folder: Path, endpoint: str, protocol: str) -> Iterator[OpenAIServer]:
        """Run the server; of tracing, only the endpoint, the protocol and the names are set."""
        longest = self.l1_blocks + 2
        # Ranks bind their threads to memory nodes; vLLM simulates a second node.
        bound = {"VLLM_CPU_OMP_THREADS_BIND": "", "OMP_NUM_THREADS": ""}
        of_ranks = bound | {"VLLM_CPU_SIM_MULTI_NUMA": "1"} if self.ranks > 1 else {}
        settings = EngineSettings(
            str(self.checkpoint),
            blocks=2 * longest,
            l1=str(self.l1_blocks * self.block_nbytes),
            context=longest * BLOCK,
            environment=of_ranks
            | {
                "OTEL_SERVICE_NAME": SERVICE,
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": protocol,
                "OTEL_BSP_SCHEDULE_DELAY": "200",  # ms
                "KVCACHE_PROFILE": "l1-disk",
                "KVCACHE__DISK__PATH": str(folder / "disk"),
                "KVCACHE__DISK__CAPACITY": str(16 * self.l1_blocks * self.block_nbytes),
                "KVCACHE__DISK__IF_SLOWER": "load",  # small models compute faster than disks read
            },
        )
        options = [
            *("--otlp-traces-endpoint", endpoint, "--served-model-name", MODEL),
            *("--distributed-executor-backend", "mp", "--tensor-parallel-size", str(self.ranks)),
        ]
        with serve_openai(settings, folder, *options) as server:
            yield server

    def compute_and_evict(self, server: OpenAIServer, headers: Headers) -> None:
        """Complete the prompt, then evict its blocks from vLLM's own cache and from L1."""
        assert server.complete(self.prompt, headers) == 0
        server.complete(prompt("another", self.l1_blocks * BLOCK + 9))
        server.post("/reset_prefix_cache")

    def load_from_disk(self, server: OpenAIServer, headers: Headers) -> None:
        """Complete the prompt again; all its blocks come from disk."""
        assert server.complete(self.prompt, headers) == self.blocks * BLOCK
