"""The namespace of a stack's blocks in one lower tier: its name there, and what a reset changes.

1. The stack asks the tier once for the name of the namespace; calls fail until the tier answers.
2. A reset replaces the stack's namespace by a random one. Blocks of the old namespace that are
   still on their way to the tier are not stored, or stored under a name that no stack asks for.
3. After a reset the stack asks the tier to forget the old namespace, and asks again before each
   write until that succeeds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from kvcache.guards.calls import TierError, result_of
from kvcache.keys import DIGEST_NBYTES, namespaced_key
from kvcache.tier import Tier


class TierNamespace:
    """The namespace of one stack in one tier.

    Args:
        tier: the tier.
        namespace: the namespace that this stack shares with engines of the same identity.
        about: a JSON object that describes the namespace to people.
    """

    def __init__(self, tier: Tier, namespace: bytes, about: str = "") -> None:
        self.current = namespace  # of the blocks that are stored now
        self._tier = tier
        self._shared = namespace
        self._about = about
        self._name: bytes | None = None  # the tier's name of the shared namespace, once resolved
        self._tier_lock = threading.Lock()  # held while the tier resolves or forgets
        self.forget_pending = False  # it was reset, and the tier has not forgotten it

    def names(self, namespace: bytes, keys: Sequence[bytes]) -> list[bytes]:
        """Return the tier's names of the blocks ``keys`` of ``namespace``.

        Raises:
            TierError: when the tier fails to resolve ``namespace``, or ``namespace`` was reset
                before it was resolved.
        """
        name = self._resolved_name() if namespace == self._shared else namespace
        return [namespaced_key(name, key) for key in keys]

    def _resolved_name(self) -> bytes:
        if self._name is None:
            with self._tier_lock:
                if self.current != self._shared:
                    # The tier may have forgotten it already, and would return its next name.
                    raise TierError("reset", "the namespace was reset")
                if self._name is None:
                    self._name = result_of(self._resolve)
        return self._name

    def _resolve(self) -> bytes:
        name: object = self._tier.resolve(self._shared, self._about)
        if not isinstance(name, bytes) or len(name) not in (len(self._shared), DIGEST_NBYTES):
            raise TypeError("resolve returned no namespace")
        return name

    def reset(self, namespace: bytes | None = None) -> None:
        """Replace the current namespace by ``namespace``; ``None`` is a random one.

        A given one was never used before.
        """
        self.forget_pending |= self.current == self._shared
        self.current = namespace or os.urandom(len(self.current) or DIGEST_NBYTES)

    def forget(self) -> bool:
        """Make the tier forget the shared namespace, if it was reset.

        Returns:
            ``False`` if the tier does not support that.

        Raises:
            TierError: when the tier fails.
        """
        if not self.forget_pending:
            return True
        with self._tier_lock:
            try:
                result_of(lambda: self._tier.forget(self._shared))
            except TierError as failure:
                if failure.error != NotImplementedError.__name__:
                    raise
                return False
            self.forget_pending = False
            return True
