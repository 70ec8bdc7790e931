"""What runs on a machine of a Ray cluster beside a worker's process. It imports little, so that it is there at once."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

from keyecli.batch.hosts import Ended
from keyecli.batch.processes import WorkerProcess
from keyecli.errors import UsageError


class Outpost:
    """A Ray actor that keeps a worker's process on its machine and passes on what is said.

    In a process of its own, and not in the actor, a job can be stopped by a signal when its time is up, and a crash leaves
    its exit code. When the actor ends, however that happens, the process reads the end of its stdin and ends too.
    """

    def start(self, first_message: Mapping[str, Any], environment: Mapping[str, str], folder: str) -> str:
        """Returns the machine's name. UsageError when it has not the folder to which paths are relative."""
        present = dict(os.environ)
        if first_message["load"]["device"] == "cuda":
            present.pop(
                "OMP_NUM_THREADS", None
            )  # Ray's, of the cores that an actor asks for; this one asks for a GPU
        try:
            self._process = WorkerProcess(first_message, {**present, **environment}, folder=folder)
        except OSError as error:
            raise UsageError(
                f"{folder}, to which paths are relative, cannot be entered on {platform.node()} ({error.strerror}): "
                "start keye in a folder that all machines of the cluster share"
            ) from None
        return platform.node()

    def send(self, message: Any) -> None:
        self._process.send(message)

    def hear(self) -> list[dict[str, Any]] | Ended:
        return self._process.hear()
