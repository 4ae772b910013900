"""A scenario in which the engine's process is forked."""

from __future__ import annotations

import os
from typing import Any

from kvcache.process import ForkedError
from tests.support.engine.engine import BLOCK, Engine, prompt
from tests.support.forked_children import ignore_fork_warnings


def fork_of_the_engine(engine: Engine) -> dict[str, Any]:
    """The child tries to fill L1 with zeros and closes what it inherited; the parent goes on."""
    engine.reset_all_caches()
    asked = prompt("forked", 6 * BLOCK + 1)
    right = engine.complete(asked)
    engine.reset_own_cache()
    keys = [number.to_bytes(32, "big") for number in range(engine.l1_stats.capacity_blocks)]
    with ignore_fork_warnings():
        child = os.fork()
    if not child:
        refused = False
        try:
            with engine.stack.reserve(keys) as lease:
                for view in lease.views:
                    view[:] = bytes(len(view))
        except ForkedError:
            refused = True
        finally:
            engine.worker_side.close()
            engine.scheduler_side.close()
            os._exit(not refused)
    refused = not os.waitpid(child, 0)[1]
    again = engine.complete(asked)
    return {"refused": refused, "right": right, "again": again, "ends": engine.open_state()}
