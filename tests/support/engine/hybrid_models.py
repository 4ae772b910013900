"""Settings of engines for models with several KV cache groups, and how closely they agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class HybridModel:
    """How to start engines for one of `checkpoints.HYBRIDS`.

    Attributes:
        blocks: of vLLM's own cache with kvcache: enough for a prompt of 1,024 tokens, and too few
            for six requests of `several_groups.preempted_requests`.
        l1: capacity: enough for each scenario but `several_groups.more_chats_than_l1_holds`.
        dtype: of the model.
        tolerance: of logprobs that two engines have computed in other steps.
    """

    blocks: int
    l1: str
    dtype: str = "float32"
    tolerance: float = 1e-3

    @property
    def options(self) -> dict[str, Any]:
        """Fields of `EngineSettings` for engines with and without kvcache."""
        return {"options": {"dtype": self.dtype}, "stub_torchvision": True}


MODELS = {
    "gpt-oss": HybridModel(50, "6MiB"),
    "gemma-2": HybridModel(50, "6MiB"),
    "gemma-3": HybridModel(95, "9MiB"),
    "gemma-3n": HybridModel(95, "8MiB"),
    "cohere2": HybridModel(66, "6MiB"),
    "llama-4": HybridModel(63, "4MiB"),
    "mistral": HybridModel(15, "6MiB"),
    # On a CPU, vLLM rotates the keys of this model differently in steps of another length.
    "lfm2": HybridModel(60, "3MiB", tolerance=0.3),
    # Linear attention on a CPU needs bfloat16. Its rounding depends on where a step ends.
    "qwen3-next": HybridModel(30, "16MiB", dtype="bfloat16", tolerance=0.3),
    "qwen3.5": HybridModel(30, "16MiB", dtype="bfloat16", tolerance=0.3),
}
"""By the names of `checkpoints.HYBRIDS`."""

LARGE = 2000
"""Blocks of a cache of vLLM's own that keeps everything."""
