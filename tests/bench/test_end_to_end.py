"""The end-to-end benchmark in small: its clip is what it says, its runs agree, and a wrong token is not measured."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keyecli.bench import end_to_end
from keyecli.bench.end_to_end import Run, figures, measure, write_clip
from keyecli.engine.encoded import FrameCache
from keyecli.engine.loaded import LoadedModel
from keyecli.errors import UsageError
from keyecli.video.decode import decode_frames
from keyecli.video.sampling import SamplingPlan
from keyecli.video.source import probe
from tests.engine.scenes import loaded_from

SIZE = (160, 96)


@pytest.fixture
def loaded(tiny_checkpoint: Path, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> LoadedModel:
    plain = loaded_from(tiny_checkpoint, tiny_model, tiny_tokenizer)
    return replace(plain, frame_cache=FrameCache(folder=tmp_path / "frames"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("end") / "clip.mp4", 12, size=SIZE, part_s=4)


def test_the_clip_repeats_its_part(clip: Path) -> None:
    info = probe(clip)
    assert (info.width, info.height, len(info.frame_times)) == (*SIZE, 300)
    assert [info.frame_times[index] for index in (0, 99, 100, 299)] == [
        Fraction(index, 25) for index in (0, 99, 100, 299)
    ]
    plan = SamplingPlan(tuple(Fraction(index, 25) for index in range(300)), 96, 160, "video", 25.0)
    frames = np.concatenate([chunk.frames for chunk in decode_frames(info, plan, strict=True)])
    assert np.array_equal(frames[:100], frames[100:200])
    assert np.array_equal(frames[:100], frames[200:])
    assert not np.array_equal(frames[0], frames[60])


def test_the_figures(loaded: LoadedModel, clip: Path) -> None:
    decoding, model, first, again = figures(loaded, clip)
    assert decoding.case == "24 frames of 0.0033 h"
    assert [name.split()[0] for name in model.case.split(", ")] == ["decode", "encode", "prefill", "generate"]
    assert first.case.startswith("360 tokens; host ")
    assert first.baseline_s == max(decoding.seconds, model.seconds)
    assert [name.split()[0] for name in again.case.split(", ")] == ["cache", "prefill", "generate"]
    assert again.baseline_s == first.seconds
    assert all(figure.seconds > 0 for figure in (decoding, model, first, again))


def test_other_tokens_are_a_failure(loaded: LoadedModel, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = end_to_end.to_first_token, iter(range(9))

    def odd(*arguments: Any) -> Run:
        run = plain(*arguments)
        return replace(run, token_ids=(0, 0)) if next(calls) == 2 else run

    monkeypatch.setattr(end_to_end, "to_first_token", odd)
    with pytest.raises(RuntimeError, match=r"without decoding the tokens are \(0, 0\), and they should be"):
        list(figures(loaded, clip))


@pytest.mark.parametrize("hours", [0.0, -1.0, float("inf")])
def test_no_length(hours: float) -> None:
    with pytest.raises(UsageError, match="--hours must be above 0"):
        next(measure(hours))
