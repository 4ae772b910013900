"""A program that lends memory to a Mooncake pool, and calls the pool for a test.

It is a process of its own, so that a test can stop or kill it, and it does not use the code under
test. It reads one JSON object per line: ``{"call": NAME, "arguments": [...]}``, and answers each
with one line that begins with ``ANSWER``. Bytes are hex.
"""

from __future__ import annotations

import json
import sys
from typing import Any

ANSWER = "@answer "
"""Begins each answer, because the library may print lines of its own."""


def main(settings: dict[str, Any]) -> None:
    from mooncake.store import MooncakeDistributedStore

    client = MooncakeDistributedStore()
    code = client.setup(settings)
    print(ANSWER + json.dumps(code), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(
            ANSWER + json.dumps(answer(client, request["call"], request["arguments"])), flush=True
        )


def answer(client: Any, call: str, arguments: list[Any]) -> Any:
    """Call the pool; return what JSON can represent."""
    if call == "put":
        key, value = arguments
        return client.put(key, bytes.fromhex(value))
    if call == "get":
        [key] = arguments
        return bytes(client.get(key)).hex()
    return getattr(client, call)(*arguments)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
