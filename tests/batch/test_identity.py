"""What a job is found under again: the same work has the same key, also in a version that knows more options."""

from __future__ import annotations

from typing import Any

import pytest

from keyecli.batch.identity import Fingerprints, settings_of, work_of
from keyecli.batch.jobs import make_jobs
from keyecli.model.checkpoint import Preprocessor
from keyecli.video.sampling import FrameBudget

HALF = (0.5, 0.5, 0.5)
PREPROCESSOR = Preprocessor(HALF, HALF, FrameBudget(min_tokens=4, max_tokens=16, total_tokens=2048), 2.0)


def key_of(task: str = "ask", defaults: Any = None, **options: Any) -> str:
    prompt = {"question" if task == "ask" else "query": "What?"}
    line = {"id": "a", "task": task, "inputs": "none.mp4", **prompt, "options": options}
    (job,) = make_jobs([("line 1", line)])
    files: Any = type("Files", (), {"preprocessor": PREPROCESSOR})
    return work_of(job, settings_of(job, files, defaults or {}), Fingerprints(), "r", "fp32").key


def test_keys_stay_as_they_were() -> None:
    """Another key makes every job of every output that there is a new one."""
    assert key_of(temperature=0.5, seed=3).startswith("065a25d3b7cefb1f")
    assert key_of("ground").startswith("d72d073896fb654a")


@pytest.mark.parametrize("task", ["ask", "ground"])
def test_options_that_change_nothing_change_no_key(task: str) -> None:
    same: dict[str, Any] = {"top_k": 0, "min_p": 0, "repetition_penalty": 1.0, "stop": []}
    assert key_of(task, **same) == key_of(task) == key_of(task, defaults=same)
    others: list[dict[str, Any]] = [
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"stop": "a"},
        {"stop": ["a", "b"]},
    ]
    keys = {key_of(task, **other) for other in others}
    assert len(keys) == 5
    assert key_of(task) not in keys
    assert key_of(task, stop="a") == key_of(task, stop=["a"]) == key_of(task, defaults={"stop": ["a"]})
