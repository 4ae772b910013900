"""CUDA: the `streams.Device` of a GPU, pinned memory, and the backends that copy pages."""

from kvcache.connectors.transfer.cuda.device import CudaDevice

__all__ = ["CudaDevice"]
