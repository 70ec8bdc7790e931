"""All checks in their order, and the report they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from keyecli import __version__
from keyecli.doctor.answers import Graded, judge, known_answers
from keyecli.doctor.caches import check_caches
from keyecli.doctor.codecs import check_codecs
from keyecli.doctor.finding import Finding, exit_code, worst
from keyecli.doctor.kernels import check_kernels
from keyecli.doctor.machine import check_machine
from keyecli.doctor.model import check_model
from keyecli.doctor.room import Fit, check_room, model_fits, official_fits
from keyecli.engine.loaded import choose_device
from keyecli.errors import ExitCode, KeyeError, UsageError
from keyecli.hub.models import hub_folder
from keyecli.session import load

Progress = Callable[[], AbstractContextManager[Callable[[str, float, float | None], None]]]
"""A block in which progress is shown: what is being done, how much of it, and of how much."""


@dataclass
class Report:
    """What the doctor found. `model` is the name of the model on trial, None: none, or keye-nano for the answers."""

    model: str | None
    findings: list[Finding] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)
    answers: list[Graded] = field(default_factory=list)

    @property
    def code(self) -> ExitCode:
        return exit_code(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Schema keye.doctor/1."""
        return {
            "schema": "keye.doctor/1",
            "status": worst(self.findings),
            "model": self.model,
            "findings": [finding.to_dict() for finding in self.findings],
            "fits": [row.to_dict() for row in self.fits],
            "answers": [item.to_dict() for item in self.answers],
            "keye_version": __version__,
        }


def examine(
    loading: dict[str, Any],
    progress: Progress,
    on_finding: Callable[[Finding], None],
    *,
    hashes: bool = False,
    ask: bool = False,
) -> Report:
    """Look at the machine, then at the model that `loading`, the arguments of `load`, names, and with `ask` at its answers.

    `on_finding` hears every finding as it is made. Answers are asked for only where nothing else is wrong with the model.
    UsageError: a revision of a folder, a device that is not there.
    """
    report = Report(loading["model"])
    device = choose_device(loading["device"])

    def add(findings: Iterator[Finding]) -> None:
        for finding in findings:
            report.findings.append(finding)
            on_finding(finding)

    add(check_machine(hub_folder()))
    with progress() as on_progress:
        kernels = list(check_kernels(lambda what: on_progress(what, 0, None)))
    add(iter(kernels))
    add(check_codecs())
    report.fits = official_fits(device)
    add(check_room(report.fits))
    add(check_caches())
    if report.model is not None:
        with progress() as on_progress:
            trial = list(
                check_model(
                    report.model,
                    loading["revision"],
                    hashes=hashes,
                    on_bytes=lambda done, total: on_progress("comparing hashes", done, total),
                )
            )
        add(iter(trial))
        report.fits = model_fits(report.model, loading["revision"], device) + report.fits
    if ask and report.code is not ExitCode.MODEL:
        add(_answers(report, loading, progress))
    return report


def _answers(report: Report, loading: dict[str, Any], progress: Progress) -> Iterator[Finding]:
    """Load the model and ask; a model that cannot be loaded is a finding too."""
    try:
        with progress() as on_progress:
            keye = load(**loading, on_progress=on_progress)
            report.answers.extend(known_answers(keye, on_progress=on_progress))
    except UsageError:
        raise
    except KeyeError as error:
        remedy = "see what it needs under `memory`, and choose with --device, --dtype and --kernels"
        yield Finding("answers", "questions", "problem", str(error), remedy)
        return
    yield from judge(report.answers, keye.name)
