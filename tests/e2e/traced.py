"""A server that traces, with a tier below L1 and its worker in a process of its own.

`from_below` has it keep a prompt, lose it from its own cache and from L1, and be asked for it
again: the trace of the last request has all that a load can have in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.engine import BLOCK, Setup, prompt
from tests.e2e.server import Server, serving

SERVICE, MODEL = "vllm", "tiny-llama"  # what a trace calls them
BLOCK_NBYTES = 32 << 10
L1_BLOCKS = 20
BLOCKS = 5  # of a prompt; a quarter of L1 may wait to be written


@contextmanager
def tracing(checkpoint: Path, folder: Path, endpoint: str, protocol: str) -> Iterator[Server]:
    """The server, with two things of tracing: where to send it, and what it is called."""
    setup = Setup(
        str(checkpoint),
        blocks=40,
        l1=str(L1_BLOCKS * BLOCK_NBYTES),
        environment={
            "OTEL_SERVICE_NAME": SERVICE,
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": protocol,
            "OTEL_BSP_SCHEDULE_DELAY": "200",  # ms; so that a test waits less
            "KVCACHE_PROFILE": "l1-disk",
            "KVCACHE__DISK__PATH": str(folder / "disk"),
            "KVCACHE__DISK__CAPACITY": "16MiB",
            "KVCACHE__DISK__IF_SLOWER": "load",  # this model computes faster than any disk reads
        },
    )
    more = ("--served-model-name", MODEL, "--distributed-executor-backend", "mp")
    options = ("--otlp-traces-endpoint", endpoint, *more)
    with serving(setup, folder, *options) as server:
        yield server


def traceparent(trace_id: str, span_id: str) -> dict[str, str]:
    """The header by which a caller makes a request part of its trace."""
    return {"traceparent": f"00-{trace_id}-{span_id}-01"}


def asked() -> list[int]:
    """The prompt whose blocks come and go."""
    return prompt("traced", BLOCKS * BLOCK + 9)


def from_below(server: Server, first: dict[str, str], again: dict[str, str]) -> None:
    """Ask with the headers `first`, have what came of it leave L1, ask with those of `again`."""
    assert server.complete(asked(), first) == 0
    server.complete(prompt("another", L1_BLOCKS * BLOCK + 9))
    server.post("/reset_prefix_cache")
    assert server.complete(asked(), again) == BLOCKS * BLOCK
