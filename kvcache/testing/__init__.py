"""What a tier promises, as tests: inherit a class, give it a ``tier`` fixture. Needs pytest.

What an eviction policy promises, too: ``class TestMine(PolicyTests): policy = Mine``.

::

    class TestMyTier(TierTests):
        @pytest.fixture
        def tier(self):
            with closing(MyTier(block_nbytes=self.block_nbytes)) as tier:
                yield tier
"""

from kvcache.testing.blocks import block_of, keys_of, run_in_threads
from kvcache.testing.front import FrontTierTests
from kvcache.testing.policy import PolicyTests, evict_blocks
from kvcache.testing.tier import TierTests

__all__ = [
    "FrontTierTests",
    "PolicyTests",
    "TierTests",
    "block_of",
    "evict_blocks",
    "keys_of",
    "run_in_threads",
]
