"""Written clips and rows: the same for a seed, equal to what was drawn, complete or absent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from keyecli.cli import run
from keyecli.errors import KeyeError, UsageError
from keyecli.forge import SceneOptions, frame_states, render, sample_scene, write_dataset
from keyecli.forge import write as write_module
from keyecli.video.sampling import SamplingSettings, plan_video
from keyecli.video.source import probe

SHORT = SceneOptions(2.0, 3.0, size=(160, 120), rate=12)
SHORT_FLAGS = ["--max-duration", "3", "--size", "160x120", "--rate", "12"]


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("seed", [0, 1])
def test_files_hold_the_drawn_frames_at_their_times(tmp_path: Path, seed: int) -> None:
    write_dataset(tmp_path, 1, seed, SceneOptions(2.0, 4.0))
    scene = sample_scene(read_rows(tmp_path)[0]["seed"], SceneOptions(2.0, 4.0))
    with av.open(str(tmp_path / "clips/000000.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == scene.rate
        decoded = [
            (frame.pts * frame.time_base, frame.to_ndarray(format="rgb24")) for frame in container.decode(0)
        ]
    times = scene.frame_times()
    assert [float(time) for time, _ in decoded] == times.tolist()
    drawn = render(frame_states(scene, times), scene.height, scene.width).numpy().astype(float)
    for (_, picture), expected in zip(decoded, drawn, strict=True):
        psnr = 10 * np.log10(255**2 / np.mean((picture - expected) ** 2))
        assert psnr > 32


def test_the_video_room_samples_the_frames_that_training_draws(tmp_path: Path) -> None:
    write_dataset(tmp_path, 3, 5, SceneOptions(2.0, 10.0, size=(160, 120)))
    for index in range(3):
        scene = sample_scene(5_000_000 + index, SceneOptions(2.0, 10.0, size=(160, 120)))
        plan = plan_video(probe(tmp_path / f"clips/{index:06d}.mp4"), SamplingSettings())
        assert [float(time) for time in plan.times_s] == scene.sampled_times().tolist()


def test_rows_say_what_trainers_read(tmp_path: Path) -> None:
    written = write_dataset(tmp_path, 2, 9, SHORT, questions_per_clip=5)
    rows = read_rows(tmp_path)
    assert (written.clips, written.questions) == (2, len(rows))
    assert written.duration_s == sum({row["videos"][0]: row["duration_s"] for row in rows}.values())
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == [
            "id",
            "messages",
            "videos",
            "task",
            "question",
            "answer",
            "reasoning",
            "solution",
            "duration_s",
            "seed",
        ]
        user, assistant = row["messages"]
        assert user == {"role": "user", "content": "<video>" + row["question"]}
        reply = f"<think>\n{row['reasoning']}\n</think>\n\n{row['answer']}"
        assert assistant == {"role": "assistant", "content": reply}
        assert (tmp_path / row["videos"][0]).is_file()
        if row["task"] in ("ground", "ground_motion"):
            assert json.loads(row["answer"]) == row["solution"]


def test_a_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_dataset(tmp_path / name, 2, seed, SHORT)
    assert names(tmp_path / "a") == ["clips", "clips/000000.mp4", "clips/000001.mp4", "data.jsonl"]
    for name in ("clips/000000.mp4", "clips/000001.mp4", "data.jsonl"):
        first, second, third = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert first == second
        assert first != third


def test_tasks_limit_the_questions(tmp_path: Path) -> None:
    write_dataset(tmp_path, 2, 0, SHORT, questions_per_clip=50, tasks=("ground", "summary"))
    assert {row["task"] for row in read_rows(tmp_path)} == {"ground", "summary"}


def test_present_files_are_kept_unless_told(tmp_path: Path) -> None:
    write_dataset(tmp_path, 1, 0, SHORT)
    before = (tmp_path / "data.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"data\.jsonl exists"):
        write_dataset(tmp_path, 1, 1, SHORT)
    assert (tmp_path / "data.jsonl").read_bytes() == before
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(UsageError, match=r"000000\.mp4 exists"):
        write_dataset(tmp_path, 1, 1, SHORT)
    write_dataset(tmp_path, 1, 1, SHORT, overwrite=True)
    assert (tmp_path / "data.jsonl").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"count": 0}, "--count"),
        ({"count": 1_000_001}, "--count"),
        ({"seed": -1}, "--seed"),
        ({"questions_per_clip": 0}, "--questions"),
        ({"tasks": ("ground", "guess")}, "no task guess"),
    ],
)
def test_impossible_requests_write_nothing(tmp_path: Path, arguments: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        write_dataset(tmp_path / "out", **{"count": 1, "options": SHORT, **arguments})
    assert not (tmp_path / "out").exists()


def test_interrupted_between_clips(tmp_path: Path) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, 3, 0, SHORT, on_clip=stop)
    assert names(tmp_path) == ["clips", "clips/000000.mp4"]


def test_interrupted_inside_a_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def render_once(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return render(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(write_module, "render", render_once)
    monkeypatch.setattr(write_module, "_CHUNK_FRAMES", 8)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, 1, 0, SHORT)
    assert names(tmp_path) == ["clips"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        write_dataset(tmp_path / "file", 1, 0, SHORT)
    with pytest.raises(KeyeError, match="cannot write to"):
        write_dataset(tmp_path / "file" / "deeper", 1, 0, SHORT)


def test_the_command_writes_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["forge", str(out), "--count", "2", "--seed", "3", "--questions", "2", *SHORT_FLAGS]) == 0
    streams = capsys.readouterr()
    seconds = sum({row["videos"][0]: row["duration_s"] for row in read_rows(out)}.values())
    assert streams.out == f"{out}: 2 clips, 4 questions, {seconds:.1f} s of video\n"
    assert streams.err == ""
    expected = tmp_path / "expected"
    write_dataset(expected, 2, 3, SHORT, questions_per_clip=2)
    assert (out / "data.jsonl").read_bytes() == (expected / "data.jsonl").read_bytes()


def test_the_command_speaks_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["forge", str(tmp_path), "-n", "1", "--tasks", "ground,count-objects", "--json", *SHORT_FLAGS])
        == 0
    )
    summary = json.loads(capsys.readouterr().out)
    rows = read_rows(tmp_path)
    assert summary == {
        "schema": "keye.forge/1",
        "folder": str(tmp_path),
        "seed": 0,
        "clips": 1,
        "questions": len(rows),
        "frames": round(rows[0]["duration_s"] * 12) + 1,
        "duration_s": rows[0]["duration_s"],
    }
    assert {row["task"] for row in rows} == {"ground", "count_objects"}


def test_the_command_draws_other_shapes_and_motions(tmp_path: Path) -> None:
    flags = ["--shapes", "heart, ring", "--motions", "grow,left", "--tasks", "shape,motion", *SHORT_FLAGS]
    assert run(["forge", str(tmp_path / "out"), "-n", "6", *flags]) == 0
    expected = tmp_path / "expected"
    options = replace(SHORT, shapes=("heart", "ring"), motions=("grow", "left"))
    write_dataset(expected, 6, 0, options, tasks=("shape", "motion"))
    assert (tmp_path / "out" / "data.jsonl").read_bytes() == (expected / "data.jsonl").read_bytes()
    answers = {row["answer"] for row in read_rows(expected)}
    assert (
        {"heart", "it grows"} <= answers <= {"heart", "ring", "it grows", "it moves left", "it stays still"}
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--size", "big"], "--size is 'big'"),
        (["--size", "31x240"], "31x240"),
        (["--tasks", "dance"], "there is no task dance"),
        (["--min-duration", "9", "--max-duration", "3"], "above the longest"),
        (["--count", "0"], "--count must be from 1"),
        (["--rate", "7"], "even number"),
        (["--shapes", "heart,blob"], "there is no shape 'blob'; known are circle, "),
        (["--motions", "grow,dance"], "there is no motion 'dance'; known are left, "),
    ],
)
def test_wrong_usage_is_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    assert run(["forge", str(tmp_path / "out"), *flags]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert says in streams.err
    assert len(streams.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_present_files_are_code_2_and_an_unwritable_place_is_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text("mine")
    assert run(["forge", str(tmp_path), *SHORT_FLAGS]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "data.jsonl").read_text() == "mine"
    assert run(["forge", str(tmp_path / "data.jsonl" / "x"), "-n", "1", *SHORT_FLAGS]) == 1
    assert "cannot write to" in capsys.readouterr().err


def test_interrupted_is_code_130(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write_module, "write_clip", interrupt)
    assert run(["forge", str(tmp_path), "-n", "1", *SHORT_FLAGS]) == 130
    assert capsys.readouterr().out == ""
    assert names(tmp_path) == ["clips"]
