"""Imports what engines import, in the process off which they are forked.

`tests.support.engine.process` has multiprocessing's fork server import this module. It must stay
free of threads and must run no operation of torch: neither survives a fork. It does not import
kvcache, as its import is a part of what the tests are about; nor numba, since it breaks the
replacement of Triton kernels in vLLM 0.32 (`vars()` of a module's attribute has no `get`).
"""

import atexit
import gc
import os
from contextlib import suppress
from importlib import import_module

MODULES = (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.distributed.kv_transfer.kv_connector.v1",
    "vllm.model_executor.models.llama",
)

INHERITED = frozenset(os.environ)
"""The variables that this process was started with."""

for name in MODULES:
    with suppress(ImportError):  # another version of vLLM: engines import what they need
        import_module(name)

# Garbage collections in the engines leave out what was imported; vLLM makes several.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # else extension modules report their types as leaked
