"""The contracts of tiers, front tiers and eviction policies, as tests to inherit. Needs pytest.

Give the suite of a tier a fixture ``tier``, and the suite of a policy the class::

    class TestMyTier(TierTests):
        @pytest.fixture
        def tier(self):
            with closing(MyTier(block_nbytes=self.block_nbytes)) as tier:
                yield tier

    class TestMyPolicy(PolicyTests):
        policy = MyPolicy
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
