"""Which blocks a request needs to resume after some of its tokens.

Layers of a model differ: some attend to all earlier tokens, some to a window or a chunk of them,
some keep one state. Each kind needs other blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Needs:
    """Which tokens' blocks a request needs to resume after `end` tokens.

    `tokens` is the length of the window (with any tokens that the engine retains below it), or of
    the chunk; 0 for the other kinds.
    """

    kind: Literal["all", "window", "chunk", "state"]
    tokens: int = 0

    def first_token(self, end: int) -> int:
        """Return the first token that is needed to resume after `end` tokens."""
        match self.kind:
            case "all":
                return 0
            case "window":
                return max(0, end - self.tokens + 1)
            case "chunk":
                return end // self.tokens * self.tokens
            case "state":
                return max(0, end - 1)
