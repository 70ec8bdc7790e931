"""Every sentence for a user has the form in which the command line prints it: `keye: <sentence>`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import keyecli
from keyecli import errors

PACKAGE = Path(keyecli.__file__).parent
SAYS = {name for name, value in vars(errors).items() if isinstance(value, type)} | {"warn"}


def sentences() -> Iterator[tuple[str, str, str]]:
    """(place, beginning, end) of every literal message of a KeyeError or a warning; "" where a value stands there."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            parts = literal_parts(node.args[0])
            if called in SAYS and parts:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", parts[0], parts[-1]


def literal_parts(node: ast.expr) -> list[str]:
    if isinstance(node, ast.BinOp):
        return literal_parts(node.left) + literal_parts(node.right)
    values = node.values if isinstance(node, ast.JoinedStr) else [node]
    return [str(value.value) if isinstance(value, ast.Constant) else "" for value in values]


def test_sentences_begin_small_and_end_without_a_stop() -> None:
    found = list(sentences())
    assert len(found) > 100
    assert [place for place, begin, _ in found if begin[:1].isupper()] == []
    assert [place for place, _, end in found if end.endswith((".", "!", " "))] == []
