"""What three engines' answers to the same chats say: equal or not, how fast, from where.

Pure: turns in, figures and text out. The three TTFT figures are medians over the same turns: those
with a prompt of `LONG_PROMPT` tokens or more that the small cache alone had to compute almost whole
and that kvcache found almost whole.
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


def first_difference(ours: list[ChatTurn], reference: list[ChatTurn]) -> str | None:
    """Where two runs first disagree in a token or a logprob, in words; None if nowhere."""
    for mine, theirs in zip(ours, reference, strict=True):
        steps = zip_longest(_steps(mine.answer), _steps(theirs.answer))
        for number, (got, expected) in enumerate(steps, start=1):
            if got != expected:
                return (
                    f"user {mine.user}, turn {mine.turn}, token {number} of the answer: "
                    f"{got}, expected {expected}"
                )
    return None


def _steps(answer: Answer) -> list[tuple[int, list[tuple[int, float]]]]:
    return list(zip(answer.tokens, answer.logprobs, strict=True))


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Three runs of the same chats, turn by turn in the same order.

    `without`: a small engine cache; `kvcache`: the same, and kvcache; `own`: an engine cache that
    keeps everything.
    """

    without: EngineRun
    kvcache: EngineRun
    own: EngineRun

    @property
    def difference(self) -> str | None:
        """Where kvcache changed an answer. `without` computes other shapes and may round apart."""
        return first_difference(self.kvcache.turns, self.own.turns)

    @property
    def passed(self) -> bool:
        """No answer differs, and no slot is pinned when nothing is in flight."""
        return self.difference is None and self.kvcache.l1.pinned_slots == 0

    @property
    def prompt_tokens(self) -> int:
        """Of all turns of one run."""
        return sum(turn.prompt_tokens for turn in self.kvcache.turns)

    def ttft_p50_s(self, run: EngineRun) -> float | None:
        """The median of `run` over the turns that compare; None when there are none."""
        times = [
            turn.answer.ttft_s
            for turn, cold, hit in zip(
                run.turns, self.without.turns, self.kvcache.turns, strict=True
            )
            if hit.prompt_tokens >= LONG_PROMPT
            and _cached(cold) <= ALMOST_NONE
            and _cached(hit) >= ALMOST_ALL
        ]
        return median(times) if times else None

    def figures(self) -> dict[str, Any]:
        """What `kvcache demo --json` prints about the runs. Times in seconds, None if not known."""
        cold, hit, own = map(self.ttft_p50_s, (self.without, self.kvcache, self.own))
        l1 = self.kvcache.l1
        runs = {"without": self.without, "kvcache": self.kvcache, "own_cache": self.own}
        return {
            "identical_outputs": self.difference is None,
            "first_difference": self.difference,
            "l1_hit_tokens": l1.hit_tokens,
            "prompt_tokens": self.prompt_tokens,
            "ttft_p50_cold_s": cold,
            "ttft_p50_hit_s": hit,
            "ttft_p50_own_cache_s": own,
            "ttft_speedup": cold / hit if cold and hit else None,
            "ttft_vs_own_cache": hit / own if hit and own else None,
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
        """The same for people: a table by turn, four facts, and what was seen."""
        l1 = self.kvcache.l1
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
        return "\n\n".join([self._table(paint), "\n".join(facts), self._seen()])

    def _table(self, paint: Painter) -> str:
        groups = [
            ("", ["turn", "prompt"]),
            ("without kvcache", ["TTFT", "cached"]),
            ("with kvcache", ["TTFT", "cached"]),
            ("large engine cache", ["TTFT", "cached"]),
        ]
        rows = []
        for number in sorted({turn.turn for turn in self.kvcache.turns}):
            row = [str(number)]
            for run in (self.without, self.kvcache, self.own):
                turns = [turn for turn in run.turns if turn.turn == number]
                if len(row) == 1:
                    row.append(f"{median(turn.prompt_tokens for turn in turns):,.0f}")
                row.append(f"{median(turn.answer.ttft_s for turn in turns) * 1000:,.0f} ms")
                row.append(f"{median(turn.answer.cached_tokens for turn in turns):,.0f}")
            rows.append(row)
        note = "medians over users; TTFT: time to first token; prompt and cached in tokens"
        return render(groups, rows, paint=paint, strong="with kvcache") + "\n" + note

    def _seen(self) -> str:
        cold, hit, own = map(self.ttft_p50_s, (self.without, self.kvcache, self.own))
        if not (cold and hit and own):
            return (
                f"No turn had a prompt of {LONG_PROMPT:,} tokens that the small cache had lost and "
                "kvcache still had,\nso there are no times to compare."
            )
        if not self.passed:
            return (
                "kvcache changed an answer or kept a slot pinned. That is a bug: please report it\n"
                "with the output of `kvcache demo --json`."
            )
        return (
            "When users came back, the small engine cache had lost their conversation.\n"
            f"The first token took {cold * 1000:,.0f} ms where it was computed again, and "
            f"{hit * 1000:,.0f} ms where kvcache had it: {cold / hit:.1f} times less.\n"
            f"An engine with room for everything took {own * 1000:,.0f} ms, and gave the same "
            "tokens and logprobs."
        )


def _cached(turn: ChatTurn) -> float:
    return turn.answer.cached_tokens / turn.prompt_tokens
