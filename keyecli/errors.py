"""The errors a user can meet, each with the exit code the command line answers with."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every keye command."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    INPUT = 3
    MODEL = 4
    MEMORY = 5
    INTERRUPTED = 130


class KeyeError(Exception):
    """A failure that has a one-sentence explanation for the user; the message is that sentence."""

    exit_code = ExitCode.FAILURE


class UsageError(KeyeError):
    """Options or arguments that cannot be combined or understood."""

    exit_code = ExitCode.USAGE


class InputError(KeyeError):
    """An input that cannot be read: missing, not a video, damaged, empty."""

    exit_code = ExitCode.INPUT


class ModelError(KeyeError):
    """A model that cannot be used: missing, incomplete, wrong shape, wrong kind."""

    exit_code = ExitCode.MODEL


class KernelError(KeyeError):
    """A kernel that cannot be compiled for this machine's GPU; the message names both."""


class MemoryLimitError(KeyeError):
    """Not enough memory; the message says what was needed, what there is and what to change."""

    exit_code = ExitCode.MEMORY


class KeyeWarning(UserWarning):
    """Something the user should know that does not stop the work; the command line prints it as one line."""
