"""The namespace of a stack's blocks in one tier: what it is called there, and what a reset does.

1. A tier is asked once what the namespace is called there; until it has answered, a call fails.
2. After ``clear`` the stack has a random namespace. The one before it is left for good: what is
   still on its way to the tier under that one is not stored, or stored where no stack looks.
3. The stack asks the tier to forget the namespace that was left, and asks again before each write
   until that succeeds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from kvcache.guards.calls import TierError, result_of
from kvcache.keys import DIGEST_NBYTES, namespaced_key
from kvcache.tier import Tier


class Namespace:
    """The namespace of one stack in one tier.

    Args:
        tier: whose namespace it is.
        space: what another engine must have to find these blocks.
        about: for people, as JSON.
    """

    def __init__(self, tier: Tier, namespace: bytes, about: str = "") -> None:
        self.namespace = namespace  # of what is stored now
        self._tier = tier
        self._shared = namespace
        self._about = about
        self._name: bytes | None = None  # of the shared one in the tier
        self._naming = threading.Lock()  # held while the tier is asked for the name, or to forget
        self.unforgotten = False  # the shared one was left, and the tier may not know

    def names(self, namespace: bytes, keys: Sequence[bytes]) -> list[bytes]:
        """What blocks with ``keys`` in the namespace ``namespace`` are called in the tier.

        Raises:
            TierError: when the tier does not say, or ``namespace`` was left before it was asked.
        """
        name = self._called() if namespace == self._shared else namespace
        return [namespaced_key(name, key) for key in keys]

    def _called(self) -> bytes:
        if self._name is None:
            with self._naming:
                if self.namespace != self._shared:
                    # The tier may have forgotten it by now, and would return its next name.
                    raise TierError("reset", "the namespace was reset")
                if self._name is None:
                    self._name = result_of(self._resolve)
        return self._name

    def _resolve(self) -> bytes:
        name: object = self._tier.resolve(self._shared, self._about)
        if not isinstance(name, bytes) or len(name) not in (len(self._shared), DIGEST_NBYTES):
            raise TypeError("resolve returned no namespace")
        return name

    def clear(self) -> None:
        """Take a random namespace."""
        self.unforgotten |= self.namespace == self._shared
        self.namespace = os.urandom(len(self.namespace) or DIGEST_NBYTES)

    def forget(self) -> bool:
        """Have the tier forget the namespace that was left; whether it has, or none was left.

        Raises:
            TierError: when the tier fails to.
        """
        if not self.unforgotten:
            return True
        with self._naming:
            try:
                result_of(lambda: self._tier.forget(self._shared))
            except TierError as failure:
                if failure.error != NotImplementedError.__name__:
                    raise
                return False
            self.unforgotten = False
            return True
