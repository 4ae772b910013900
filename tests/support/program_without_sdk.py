"""A program that imports the OpenTelemetry API and no SDK; `test_tracing.py` starts it.

It stores blocks, and finds them in a lower tier, as part of a trace that another process started:
the first argument is the `traceparent`. It prints, as JSON, the class of the tracer provider, the
names of its threads, and whether an SDK is loaded.
"""

from __future__ import annotations

import json
import sys
import threading

from opentelemetry import context, propagate, trace

from kvcache import block_keys
from kvcache.profiles import open_stack

BLOCKS = 4
BLOCK_NBYTES = 4096
LONG = 60.0


def main(traceparent: str) -> None:
    caller = propagate.extract({"traceparent": traceparent})
    keys = block_keys(range(BLOCKS * 32), block_tokens=32)
    with open_stack(block_nbytes=BLOCK_NBYTES) as stack:
        with stack.reserve(keys, context=caller) as lease:
            for view in lease.views:
                view[:] = b"\x01" * BLOCK_NBYTES
        assert stack.flush(LONG)
        stack.front.clear()
        match = stack.match(keys, context=caller).result(LONG)
        with stack.fetch(match, context=caller).result(LONG) as lease:
            assert bytes(lease.views[-1]) == b"\x01" * BLOCK_NBYTES
        stack.front.clear()
        context.attach(caller)  # the prefetch below uses the current context
        prefetched = stack.prefetch(keys)
        assert prefetched is not None
        prefetched.result(LONG)
    print(
        json.dumps(
            {
                "provider": type(trace.get_tracer_provider()).__name__,
                "threads": [thread.name for thread in threading.enumerate()],
                "sdk": "opentelemetry.sdk" in sys.modules,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
