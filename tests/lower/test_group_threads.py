"""Threads that store, promote and load blocks of several groups in a small L1."""

import random

import pytest

from kvcache.resume import Needs
from kvcache.slab import PAGE
from kvcache.testing import block_of
from kvcache.testing.blocks import run_in_threads
from tests.support.group_blocks import BLOCK_TOKENS, GroupedRequest, put_branches
from tests.support.stack_under_test import LONG, NEVER, StackUnderTest

BLOCKS = 8
TURNS = 60


@pytest.mark.parametrize("lookup", ["ask", "load"])
def test_threads_read_the_bytes_of_their_keys_and_leave_no_pin(lookup: str) -> None:
    under_test = StackUnderTest(
        slots=48, calls=3, blocks_per_call=5, breaker_failures=NEVER, lookup=lookup
    )
    stack = under_test.stack
    under_test.lower[0].write_behind.queue_blocks = 48
    requests = [
        GroupedRequest(Needs("window", 9), Needs("state"), name=name, common=3) for name in "abcd"
    ]
    hits = []

    def work(thread: int) -> None:
        choose = random.Random(thread)
        for turn in range(TURNS):
            request = choose.choice(requests)
            top = choose.randint(1, BLOCKS) * BLOCK_TOKENS
            if choose.random() < 0.5:
                future = stack.prefetch_resume(request.groups, top, BLOCK_TOKENS)
                if future is not None:
                    future.result(LONG)
            found = stack.fetch_resume(request.groups, 0, top, BLOCK_TOKENS)
            with found.lease as lease:
                assert list(lease.keys) == (request.needed(0, found.tokens) if lease.keys else [])
                for key, view in zip(lease.keys, lease.views, strict=True):
                    assert view == block_of(key, PAGE), "wrong bytes"
                hits.append(found.tokens)
                first = found.tokens // BLOCK_TOKENS
                put_branches(stack, *request.branches(first, top // BLOCK_TOKENS))
            if turn % 20 == 19 and thread == 0:
                stack.clear()

    run_in_threads(4, work)
    assert stack.flush(LONG)
    assert any(hits)
    under_test.check_invariants()
    assert under_test.stack.lower.reads.in_flight == {}
