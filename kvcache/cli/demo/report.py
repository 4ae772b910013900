"""Compare three engines' answers to the same chats: equality, speed and cached tokens.

No I/O: turns in, figures and text out. The three TTFT figures are medians over the same turns: the
prompt has `LONG_PROMPT` tokens or more, the small cache alone lacked almost all of it, and kvcache
had almost all of it.
"""

from dataclasses import dataclass
from itertools import zip_longest
from statistics import median
from typing import Any

from kvcache.cli.demo.chats import Answer, ChatTurn
from kvcache.cli.demo.engine import EngineRun
from kvcache.cli.table import GREEN, RED, Painter, render
from kvcache.sizes import format_size

LONG_PROMPT = 2000
ALMOST_NONE = 0.1
ALMOST_ALL = 0.9


def first_difference(turns: list[ChatTurn], reference: list[ChatTurn]) -> str | None:
    """Describe the first token or logprob in which two runs differ; None if there is none."""
    for turn, expected_turn in zip(turns, reference, strict=True):
        steps = zip_longest(_steps(turn.answer), _steps(expected_turn.answer))
        for number, (found, expected) in enumerate(steps, start=1):
            if found != expected:
                return (
                    f"user {turn.user}, turn {turn.turn}, token {number} of the answer: "
                    f"{found}, expected {expected}"
                )
    return None


def _steps(answer: Answer) -> list[tuple[int, list[tuple[int, float]]]]:
    return list(zip(answer.tokens, answer.logprobs, strict=True))


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Three runs of the same chats, with their turns in the same order.

    Attributes:
        without: a small engine cache.
        with_kvcache: the same engine cache, and kvcache.
        large: an engine cache that keeps everything.
    """

    without: EngineRun
    with_kvcache: EngineRun
    large: EngineRun

    @property
    def difference(self) -> str | None:
        """The first answer that kvcache changed.

        `without` is not compared: it computes other shapes, so it may round differently.
        """
        return first_difference(self.with_kvcache.turns, self.large.turns)

    @property
    def passed(self) -> bool:
        """Whether all answers are equal, and no slot is pinned after the chats."""
        return self.difference is None and self.with_kvcache.l1.pinned_slots == 0

    @property
    def prompt_tokens(self) -> int:
        """The prompt tokens of all turns of one run."""
        return sum(turn.prompt_tokens for turn in self.with_kvcache.turns)

    def ttft_p50_s(self, run: EngineRun) -> float | None:
        """The median TTFT of `run` over the turns to compare; None without such turns."""
        times = [
            turn.answer.ttft_s
            for turn, cold, hit in zip(
                run.turns, self.without.turns, self.with_kvcache.turns, strict=True
            )
            if hit.prompt_tokens >= LONG_PROMPT
            and _cached(cold) <= ALMOST_NONE
            and _cached(hit) >= ALMOST_ALL
        ]
        return median(times) if times else None

    def to_json(self) -> dict[str, Any]:
        """Return the figures of `kvcache demo --json`. A time is in seconds, None if not known."""
        cold, hit, large = map(self.ttft_p50_s, (self.without, self.with_kvcache, self.large))
        l1 = self.with_kvcache.l1
        runs = {"without": self.without, "kvcache": self.with_kvcache, "own_cache": self.large}
        return {
            "identical_outputs": self.difference is None,
            "first_difference": self.difference,
            "l1_hit_tokens": l1.hit_tokens,
            "prompt_tokens": self.prompt_tokens,
            "ttft_p50_cold_s": cold,
            "ttft_p50_hit_s": hit,
            "ttft_p50_own_cache_s": large,
            "ttft_speedup": cold / hit if cold and hit else None,
            "ttft_vs_own_cache": hit / large if hit and large else None,
            "pinned_slots_after": l1.pinned_slots,
            "dram_used_bytes": l1.used_nbytes,
            "dram_capacity_bytes": l1.capacity_nbytes,
            "turns_played": [
                {
                    "engine": name,
                    "user": turn.user,
                    "turn": turn.turn,
                    "prompt_tokens": turn.prompt_tokens,
                    "cached_tokens": turn.answer.cached_tokens,
                    "ttft_s": turn.answer.ttft_s,
                }
                for name, run in runs.items()
                for turn in run.turns
            ],
        }

    def text(self, paint: Painter) -> str:
        """Return the comparison as text: a table by turn, four facts, and a conclusion."""
        l1 = self.with_kvcache.l1
        outputs = (
            paint("identical", GREEN) + " to those of the engine with a large cache"
            if self.difference is None
            else paint("DIFFERENT", RED) + f": {self.difference}"
        )
        pinned = paint(str(l1.pinned_slots), RED if l1.pinned_slots else GREEN)
        hits = f"{l1.hit_tokens:,} of {self.prompt_tokens:,}"
        share = l1.hit_tokens / self.prompt_tokens
        facts = [
            f"hit rate      {share:.0%}: {hits} prompt tokens came back from DRAM",
            f"DRAM used     {format_size(l1.used_nbytes)} of {format_size(l1.capacity_nbytes)}",
            f"outputs       {outputs}",
            f"pinned slots  {pinned}",
        ]
        return "\n\n".join([self._table(paint), "\n".join(facts), self._conclusion()])

    def _table(self, paint: Painter) -> str:
        groups = [
            ("", ["turn", "prompt"]),
            ("without kvcache", ["TTFT", "cached"]),
            ("with kvcache", ["TTFT", "cached"]),
            ("large engine cache", ["TTFT", "cached"]),
        ]
        rows = []
        for number in sorted({turn.turn for turn in self.with_kvcache.turns}):
            row = [str(number)]
            for run in (self.without, self.with_kvcache, self.large):
                turns = [turn for turn in run.turns if turn.turn == number]
                if len(row) == 1:
                    row.append(f"{median(turn.prompt_tokens for turn in turns):,.0f}")
                row.append(f"{median(turn.answer.ttft_s for turn in turns) * 1000:,.0f} ms")
                row.append(f"{median(turn.answer.cached_tokens for turn in turns):,.0f}")
            rows.append(row)
        note = "medians over users; TTFT: time to first token; prompt and cached in tokens"
        return render(groups, rows, paint=paint, strong="with kvcache") + "\n" + note

    def _conclusion(self) -> str:
        cold, hit, large = map(self.ttft_p50_s, (self.without, self.with_kvcache, self.large))
        if not (cold and hit and large):
            return (
                "There are no times to compare: no turn had a prompt of "
                f"{LONG_PROMPT:,} tokens that\nthe small cache had evicted and kvcache still had."
            )
        if not self.passed:
            return (
                "kvcache changed an answer or kept a slot pinned. That is a bug: please report it\n"
                "with the output of `kvcache demo --json`."
            )
        return (
            "When a user came back, the small engine cache had evicted the conversation.\n"
            f"Time to first token: {cold * 1000:,.0f} ms when the engine computed it again, "
            f"{hit * 1000:,.0f} ms with kvcache: {cold / hit:.1f} times less.\n"
            f"An engine with room for everything took {large * 1000:,.0f} ms, and returned the "
            "same tokens and logprobs."
        )


def _cached(turn: ChatTurn) -> float:
    return turn.answer.cached_tokens / turn.prompt_tokens
