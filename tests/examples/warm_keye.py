"""`keye` without the seconds that every process needs to import torch: one process imports it and forks for each call.

`python warm_keye.py SOCKET` serves; the program that `client` writes sends it its arguments, folder and open files, and ends
with the exit code. What runs is `keyecli.cli.run`, in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

_CLIENT = """\
#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
socket.send_fds(server, [json.dumps([os.getcwd(), sys.argv[1:]]).encode()], [0, 1, 2])
sys.exit(server.recv(1)[0])
"""


def write_client(program: Path, address: Path) -> None:
    """Write a program that does what `keye` does, by the server at this address."""
    program.write_text(_CLIENT.format(python=sys.executable, socket=str(address)))
    program.chmod(0o755)


def serve(address: str) -> None:
    """Serve until the process is ended; says "ready" on stdout when it can be called."""
    import keyecli.session  # noqa: F401  # what takes so long

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    from keyecli.cli import run

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, files, _, _ = socket.recv_fds(connection, 2**20, 3)
    for place, file in enumerate(files):
        os.dup2(file, place)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (open(place, mode) for place, mode in enumerate("rww"))  # noqa: PTH123, SIM115
    folder, arguments = json.loads(message)
    os.chdir(folder)
    code = run(arguments)
    sys.stderr.flush()
    connection.send(bytes([code]))
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
