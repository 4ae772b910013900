"""What a check found: fine, worth knowing, or in the way; and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from kvcache.cli.table import GREEN, RED, YELLOW, Painter

Status = Literal["OK", "WARN", "FAIL"]

COLOURS: dict[Status, str] = {"OK": GREEN, "WARN": YELLOW, "FAIL": RED}
_STATUS_WIDTH, _SUBJECT_WIDTH = 4, 12


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the doctor's.

    FAIL: with this an engine would not start, or not do what was asked for. WARN: it works, and
    less well than it could; or it could not be tried. `fix` is what to do then; `measured` are
    numbers, by name with their unit.
    """

    status: Status
    subject: str
    what: str
    fix: str = ""
    measured: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def text(self, paint: Painter) -> str:
        """For people; the fix is on a line of its own."""
        status = paint(self.status.ljust(_STATUS_WIDTH), COLOURS[self.status])
        lines = [f"{status}  {self.subject.ljust(_SUBJECT_WIDTH)}  {self.what}"]
        if self.fix:
            lines.append(f"{' ' * (_STATUS_WIDTH + _SUBJECT_WIDTH + 4)}fix: {self.fix}")
        return "\n".join(lines)


def ok(subject: str, what: str, **measured: float) -> Result:
    """Fine."""
    return Result("OK", subject, what, measured=measured)


def warn(subject: str, what: str, fix: str, **measured: float) -> Result:
    """Worth knowing."""
    return Result("WARN", subject, what, fix, measured)


def fail(subject: str, what: str, fix: str) -> Result:
    """In the way."""
    return Result("FAIL", subject, what, fix)
