"""What a run makes of its model."""

from __future__ import annotations

from pathlib import Path

from keyecli.batch.jobs import make_jobs
from keyecli.batch.run import Batch, BatchSettings
from keyecli.engine.loaded import open_model
from keyecli.session import load


def test_weights_quantised_on_the_way_are_other_work(
    short_clips: list[Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    job = {"task": "ask", "inputs": str(short_clips[0]), "question": "What?", "options": {"max_tokens": 4}}
    keys = []
    for quant in (None, "int4", "int8", None):
        files = open_model(tiny_checkpoint, device="cpu", quant=quant)
        with Batch(make_jobs([("a line", job)]), files, tmp_path / "out.jsonl", {}, BatchSettings()) as batch:
            tally = batch.run(lambda: load(tiny_checkpoint, device="cpu"), {})
            assert (tally.done, tally.done_before) == ((0, 1) if len(keys) == 3 else (1, 0))
            keys.append(batch.keys()[0][1])
    assert keys[0] == keys[3]
    assert len(set(keys)) == 3
