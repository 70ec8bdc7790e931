"""A worker's process: groups of jobs come on stdin, outcomes go to stdout, both as JSON, a message a line."""

from __future__ import annotations

import json
import os
import platform
import queue
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO


def main() -> None:
    """Load the model that the first message describes, then answer until stdin ends.

    The first message: keye_version and weights_revision, of whoever gives the work, which must be the same here; load,
    what `keyecli.load` is given; defaults, timeout_s and debug, as in a batch. Said are: ready, once; then an outcome a
    job; fault, the traceback of a fault of keye's own, where debug is on; and stopped, the error after which it ends.
    """
    # Anything that a library prints must not get between the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, lines), daemon=True).start()
    given = json.loads(lines.get())
    send = _Sender(out)

    from keyecli import __version__

    if given["keye_version"] != __version__:
        text = f"{platform.node()} has keye {__version__}, and {given['keye_version']} gives it work: install the same"
        send({"stopped": {"kind": "KeyeError", "message": text}})
        return

    from keyecli import session
    from keyecli.batch.advance import in_advance
    from keyecli.batch.answering import answer_group, error_of, open_group, reading_ahead
    from keyecli.batch.frames import FramesAhead
    from keyecli.batch.identity import settings_of
    from keyecli.batch.jobs import make_jobs
    from keyecli.batch.manifest import machine
    from keyecli.errors import KeyeError, KeyeWarning, ModelError

    frames = FramesAhead()

    def groups() -> Iterator[Any]:
        while True:
            described = json.loads(lines.get())
            jobs = make_jobs((line["id"], line) for line in described)
            assignments = [(job, settings_of(job, keye.loaded, given["defaults"])) for job in jobs]
            yield open_group(assignments, keye.loaded, frames)

    def fault(error: BaseException) -> None:
        if given["debug"]:
            send({"fault": "".join(traceback.format_exception(error))})

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", KeyeWarning)
            keye = reading_ahead(session.load(**given["load"]), frames)
        if given["weights_revision"] != keye.loaded.revision:
            raise ModelError(
                f"{platform.node()} has {keye.loaded.name} in the revision {keye.loaded.revision}, and the work is for "
                f"{given['weights_revision']}: give all machines the same weights"
            )
        said = [str(item.message) for item in caught if issubclass(item.category, KeyeWarning)]
        send({"ready": {"is_nano": keye.is_nano, "warnings": said, "machine": machine()}})
        for group in in_advance(groups()):
            for job, outcome in answer_group(keye, group, timeout_s=given["timeout_s"], on_fault=fault):
                send({"id": job.id, "outcome": outcome.to_dict()})
    except KeyeError as error:
        send({"stopped": error_of(error)})


class _Sender:
    def __init__(self, out: BinaryIO) -> None:
        self._out = out

    def __call__(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message).encode() + b"\n")
        self._out.flush()


def _read(source: BinaryIO, lines: queue.SimpleQueue[bytes]) -> None:
    for line in source:
        lines.put(line)
    # Whoever gave the work is gone: nobody waits for what is being done.
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # The interpreter's own end would abort at the thread that is reading stdin.
    os._exit(0)
