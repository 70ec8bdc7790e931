"""A judge that knows the forged clips: `python examples/rl_nano/judge.py --port 8765`, for `--judge http://127.0.0.1:8765/v1`.

It stands for a language model behind an OpenAI-compatible endpoint, and compares what an answer about counts says that it saw,
names of objects or spans of one, with the verified solution: the same names, or as many spans that lie where the true ones do.
A right count of the wrong things fails.
"""

from __future__ import annotations

import argparse
import html
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from keyecli.tasks.spans import parse_spans, temporal_iou

NEAR_IOU = 0.5  # of spans that are told from one frame in two seconds


def block(text: str, name: str) -> str:
    """What stands in a block of the question to the judge."""
    found = re.search(rf"<{name}>\n(.*?)\n</{name}>", text, re.DOTALL)
    return html.unescape(found[1]) if found else ""


def verdict(question: str) -> dict[str, str]:
    """Whether the reasoning in it agrees with the solution."""
    solution = block(question, "verified_solution").partition("\n\n")[0]
    reasoning = block(question, "rollout_reasoning")
    (name, _, spans), (own_name, _, own_spans) = (text.partition(": ") for text in (solution, reasoning))
    if spans:
        true, told = parse_spans(spans), parse_spans(own_spans)
        agrees = (
            name == own_name
            and true is not None
            and told is not None
            and len(true) == len(told)
            and temporal_iou(told, true) >= NEAR_IOU
        )
    else:
        agrees = sorted(solution.split(", ")) == sorted(reasoning.split(", "))
    return {"process": "pass" if agrees else "fail", "why": "" if agrees else "it saw something else"}


class Handler(BaseHTTPRequestHandler):
    """Answers `POST …/chat/completions`."""

    def do_POST(self) -> None:
        body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = json.dumps(verdict(body["messages"][-1]["content"]))
        reply = {
            "choices": [{"message": {"role": "assistant", "content": said}}],
            "usage": {"total_tokens": 0},
        }
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nobody reads it."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8765)
    ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler).serve_forever()


if __name__ == "__main__":
    main()
