"""CUDA as `streams` has devices: streams and events, pinned memory, and ways to copy pages."""

from kvcache.connectors.transfer.cuda.device import Cuda

__all__ = ["Cuda"]
