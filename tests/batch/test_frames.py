"""Frames that were decoded ahead are the frames; what is damaged is left to the job that reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keyecli.batch import frames
from keyecli.batch.frames import FramesAhead
from keyecli.engine.loaded import ModelFiles, open_model
from keyecli.engine.plan import InputPlan, plan_inputs
from keyecli.engine.stream import group_frames
from keyecli.errors import KeyeWarning
from keyecli.session import load
from keyecli.tasks.options import ask_settings
from keyecli.video.decode import FrameChunk, decode_frames
from keyecli.video.source import VideoInfo, probe
from tests.video.conftest import write_clip


@pytest.fixture
def files(tiny_checkpoint: Path) -> ModelFiles:
    return open_model(tiny_checkpoint, device="cpu")


def plans_of(files: ModelFiles, *paths: Path) -> tuple[InputPlan, ...]:
    return plan_inputs([probe(path) for path in paths], ask_settings(files.preprocessor, fps=25).sampling)


def assert_same(found: Iterable[FrameChunk], expected: Iterable[FrameChunk]) -> None:
    for chunk, other in zip(found, expected, strict=True):
        assert chunk.times_s == other.times_s
        assert np.array_equal(chunk.frames, other.frames)


@pytest.mark.parametrize("budget_bytes", [0, 1, 2**29])
def test_the_same_chunks_whatever_the_budget(
    files: ModelFiles, short_clips: list[Path], budget_bytes: int
) -> None:
    ahead = FramesAhead(budget_bytes)
    plans = plans_of(files, *short_clips)
    for group in (plans[:2], plans[2:]):  # the second is begun before the first is read
        ahead.begin(files, group, exact_resize=False, strict=False)
    for plan in plans:
        size = group_frames(files, plan)
        found = ahead.read(plan.info, plan.sampling, chunk_frames=size)
        assert_same(found, decode_frames(plan.info, plan.sampling, chunk_frames=size))


def test_other_frames_than_were_begun(files: ModelFiles, short_clips: list[Path]) -> None:
    ahead = FramesAhead()
    (plan,) = plans_of(files, short_clips[0])
    ahead.begin(files, [plan], exact_resize=False, strict=False)
    size = group_frames(files, plan)
    exact = ahead.read(plan.info, plan.sampling, exact_resize=True, chunk_frames=size)
    assert_same(exact, decode_frames(plan.info, plan.sampling, exact_resize=True, chunk_frames=size))


@pytest.mark.filterwarnings("ignore:the answer was cut off")
def test_what_is_kept_encoded_is_not_decoded(
    tiny_checkpoint: Path, short_clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []

    def noting(info: VideoInfo, *arguments: Any, **options: Any) -> Iterator[FrameChunk]:
        decoded.append(info.path.name)
        return decode_frames(info, *arguments, **options)

    monkeypatch.setattr(frames, "decode_frames", noting)
    keye = load(tiny_checkpoint, device="cpu")
    keye.ask(short_clips[0], "What?", fps=25, max_tokens=2)
    ahead = FramesAhead()
    plans = plans_of(keye.loaded, *short_clips[:2])
    for served in (False, True):
        if served:
            ahead.serve(keye.loaded)
        ahead.begin(keye.loaded, plans, exact_resize=False, strict=False)
        for begun in ahead._next.values():
            begun.ready.wait()
    assert decoded == ["a.mp4", "b.mp4", "b.mp4"]


def test_damage_is_told_when_the_frames_are_read(files: ModelFiles, tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mkv", 51).read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    ahead = FramesAhead()
    (plan,) = plans_of(files, cut)
    ahead.begin(files, [plan], exact_resize=False, strict=False)
    with pytest.warns(KeyeWarning, match="cut off"):
        chunks = list(ahead.read(plan.info, plan.sampling, chunk_frames=group_frames(files, plan)))
    assert chunks
