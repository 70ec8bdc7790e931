"""What a check has to say: a status, a sentence, and what to do when it is not well."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from keyecli.errors import ExitCode

Status = Literal["ok", "warning", "problem"]
Section = Literal["machine", "kernels", "video", "room", "caches", "model", "answers"]

# What is wrong there is wrong with a model: it cannot be used.
MODEL_SECTIONS: tuple[Section, ...] = ("model", "answers")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    ok: as it should be; warning: works, but not as well as it could; problem: does not work. `remedy` says what to do
    about anything but ok. `details` are the figures behind `text`, as plain data.
    """

    section: Section
    name: str
    status: Status
    text: str
    remedy: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.status == "ok") is not (self.remedy is None):
            raise ValueError(
                f"{self.name}: a remedy belongs to every finding that is not ok, and to no other"
            )

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def worst(findings: Iterable[Finding]) -> Status:
    """The status of them all together."""
    seen = {finding.status for finding in findings}
    if "problem" in seen:
        return "problem"
    return "warning" if "warning" in seen else "ok"


def exit_code(findings: Iterable[Finding]) -> ExitCode:
    """4 for a model that cannot be used, 1 for any other problem, else 0."""
    sections = {finding.section for finding in findings if finding.status == "problem"}
    if sections.intersection(MODEL_SECTIONS):
        return ExitCode.MODEL
    return ExitCode.FAILURE if sections else ExitCode.OK
