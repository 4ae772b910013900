"""An act for an engine that is forked, and goes on."""

from __future__ import annotations

import os
from typing import Any

from kvcache.process import ForkedError
from tests.support.engine.engine import BLOCK, Engine, prompt
from tests.support.forked_children import ignore_fork_warnings


def forked(engine: Engine) -> dict[str, Any]:
    """A fork of the engine fills all of L1 with zeros and closes what it inherited."""
    engine.fresh()
    asked = prompt("forked", 6 * BLOCK + 1)
    right = engine.ask(asked)
    engine.evict_own()
    keys = [number.to_bytes(32, "big") for number in range(engine.l1.capacity_blocks)]
    with ignore_fork_warnings():
        child = os.fork()
    if not child:
        refused = False
        try:
            with engine.side.stack.reserve(keys) as lease:
                for view in lease.views:
                    view[:] = bytes(len(view))
        except ForkedError:
            refused = True
        finally:
            engine.worker.close()
            engine.side.close()
            os._exit(not refused)
    refused = not os.waitpid(child, 0)[1]
    again = engine.ask(asked)
    return {"refused": refused, "right": right, "again": again, "ends": engine.open_ends()}
