"""The result of one check of the doctor: its status, the finding, and the fix."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from kvcache.cli.table import GREEN, RED, YELLOW, Painter

Status = Literal["OK", "WARN", "FAIL"]

COLOURS: dict[Status, str] = {"OK": GREEN, "WARN": YELLOW, "FAIL": RED}
_STATUS_WIDTH, _SUBJECT_WIDTH = 4, 12


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check. The field names are the keys of ``--json``.

    FAIL: an engine would not start, or would not do what its profile asks for. WARN: it works, but
    not as well as it could, or the check could not run.

    Attributes:
        subject: what was checked, such as a tier's name or "memory".
        what: the finding.
        fix: what to do about a WARN or a FAIL.
        measured: numbers, by a name that ends with the unit.
    """

    status: Status
    subject: str
    what: str
    fix: str = ""
    measured: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        return asdict(self)

    def text(self, paint: Painter) -> str:
        """Return the result as text; the fix has a line of its own."""
        status = paint(self.status.ljust(_STATUS_WIDTH), COLOURS[self.status])
        lines = [f"{status}  {self.subject.ljust(_SUBJECT_WIDTH)}  {self.what}"]
        if self.fix:
            lines.append(f"{' ' * (_STATUS_WIDTH + _SUBJECT_WIDTH + 4)}fix: {self.fix}")
        return "\n".join(lines)


def ok(subject: str, what: str, **measured: float) -> CheckResult:
    """Return the result of a check that found no problem."""
    return CheckResult("OK", subject, what, measured=measured)


def warn(subject: str, what: str, fix: str, **measured: float) -> CheckResult:
    """Return the result of a check that found something to improve, or could not run."""
    return CheckResult("WARN", subject, what, fix, measured)


def fail(subject: str, what: str, fix: str) -> CheckResult:
    """Return the result of a check that found a failure."""
    return CheckResult("FAIL", subject, what, fix)
