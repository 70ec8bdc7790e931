"""A Hugging Face hub of one model on 127.0.0.1: the parts of its protocol that a pull speaks, and its troubles on demand."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1a2b3c4d5e" * 4
NAME = "someone/toy-keye"
SLOW_BYTES, SLOW_S = 100, 0.05


@dataclass
class Hub:
    """The model's files and what goes wrong. Attributes may be changed between requests.

    cuts: file → how many bytes to send before the connection breaks, one number an attempt. stalls: file → how many bytes to
    send before the rest comes slowly. corrupt: files whose first byte is sent wrong. statuses: path of a request (a part of
    it is enough) → (status, X-Error-Code), every time.
    """

    files: dict[str, bytes]
    commit: str = COMMIT
    token: str | None = None
    ranges: bool = True
    cuts: dict[str, list[int]] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    statuses: dict[str, tuple[int, str]] = field(default_factory=dict)
    stalls: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Of every request: method, path, Range."""
    tokens: list[str | None] = field(default_factory=list)
    """Of every request: Authorization."""
    elsewhere: str | None = None
    """Another endpoint, to which large files are redirected."""
    sent: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    endpoint: str = ""

    @classmethod
    def of(cls, folder: Path) -> Hub:
        return cls({path.name: path.read_bytes() for path in sorted(folder.iterdir())})

    def checksum(self, name: str) -> str:
        content = self.files[name]
        if is_lfs(name):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def fetched(self) -> list[str]:
        """The names of the files that were asked for, once each."""
        return sorted({path.rsplit("/", 1)[-1] for _, path, _ in self.requests if "/resolve/" in path})

    def listing(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        for name, content in self.files.items():
            size = len(content)
            entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": self.checksum(name)}
            if is_lfs(name):
                entry |= {
                    "oid": "0" * 40,
                    "lfs": {"oid": self.checksum(name), "size": size, "pointerSize": 134},
                }
            entries.append(entry)
        return [*entries, {"type": "directory", "path": "figures", "oid": "1" * 40}]


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, with_body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        hub.tokens.append(self.headers.get("Authorization"))
        for part, (status, code) in hub.statuses.items():
            if part in path:
                return self.refuse(status, code)
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.refuse(401, "GatedRepo")
        if match := re.fullmatch(rf"/api/models/{NAME}/(revision|tree)/(.+)", path):
            if match[2] not in ("main", hub.commit):
                return self.refuse(404, "RevisionNotFound")
            body = {"id": NAME, "sha": hub.commit} if match[1] == "revision" else hub.listing()
            return self.send(json.dumps(body).encode(), {"Content-Type": "application/json"}, with_body)
        if (match := re.fullmatch(rf"/{NAME}/resolve/{hub.commit}/(.+)", path)) and match[1] in hub.files:
            return self.send_file(match[1], with_body)
        return self.refuse(404, "RepoNotFound" if "/api/" in path else "EntryNotFound")

    def send_file(self, name: str, with_body: bool) -> None:
        hub = self.hub
        content, checksum = hub.files[name], hub.checksum(name)
        if hub.elsewhere is not None and is_lfs(name):
            return self.send(
                b"", {"Location": hub.elsewhere + self.path, "X-Linked-ETag": checksum}, False, 302
            )
        if name in hub.corrupt:
            content = bytes([content[0] ^ 1]) + content[1:]
        headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{checksum}"', "Accept-Ranges": "bytes"}
        if is_lfs(name):
            headers |= {"X-Linked-ETag": f'"{checksum}"', "X-Linked-Size": str(len(content))}
        status, start = 200, 0
        if hub.ranges and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            status, start = 206, int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(content[start:], headers, with_body, status, name)

    def send(
        self, body: bytes, headers: Mapping[str, str], with_body: bool, status: int = 200, name: str = ""
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_body:
            return
        cuts = self.hub.cuts.get(name)
        if cuts:
            body = body[: cuts.pop(0)]
            self.close_connection = True
        first = self.hub.stalls.get(name, len(body))
        self.hub.sent[name] += len(body)
        self.wfile.write(body[:first])
        for place in range(first, len(body), SLOW_BYTES):
            Event().wait(SLOW_S)  # a test may have switched time.sleep off
            self.wfile.write(body[place : place + SLOW_BYTES])

    def refuse(self, status: int, code: str) -> None:
        self.send(b"{}", {"X-Error-Code": code, "X-Error-Message": "no"}, True, status)


class Quiet(ThreadingHTTPServer):
    """Says nothing about a client that goes away."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Server:
    """Serves a hub while the block lasts."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._server = Quiet(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
        hub.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self.hub

    def __exit__(self, *reason: object) -> None:
        self._server.shutdown()
        self._server.server_close()
