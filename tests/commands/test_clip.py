"""`keye clip`: the files that it cuts, what it prints of them, and how it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keyecli.video.source import probe
from tests.commands.conftest import Keye
from tests.commands.test_export import Stdin, grounding, lines, stdin, summary
from tests.video.test_scenes import shots

Clips = Callable[..., Path]
__all__ = ["stdin"]


def seconds(path: Path) -> float:
    return float(probe(path).duration_s)


@pytest.fixture
def found(clip: Path, folder: Path) -> Path:
    """Two spans of the dog and one of the cat, which lies between them."""
    dog = grounding(clip, "the dog", (0.2, 0.8, 0.934), (1.2, 1.6, 0.4))
    (folder / "found.jsonl").write_text(
        lines(dog, grounding(clip, "a cat", (0.4, 1.0, None)), grounding(clip, "a cow"))
    )
    return folder / "found.jsonl"


def test_the_paths_of_the_parts(keye: Keye, found: Path, folder: Path) -> None:
    names = [f"cuts/clip_{name}.mp4" for name in ("001_0.2-0.8", "002_0.4-1.0", "003_1.2-1.6")]
    code, out, err = keye("clip", "found.jsonl", "cuts/", "--exact")
    assert (code, out.splitlines(), err) == (0, names, "")
    assert [seconds(folder / name) for name in names] == pytest.approx([0.6, 0.6, 0.4], abs=0.001)
    assert sorted(path.name for path in (folder / "cuts").iterdir()) == [Path(name).name for name in names]


def test_the_same_as_a_search_with_clip(
    keye: Keye, clip: Path, folder: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, stdin: Stdin
) -> None:
    monkeypatch.setenv("KEYE_MODEL", str(tiny_checkpoint))
    words = "--temperature 3 --seed 2 --no-think --max-tokens 60 --json --clip direct"
    code, saved, _ = keye("ground", str(clip), "the dog", "a cat", "a bird", *words.split())
    assert code == 0
    stdin(saved)
    assert keye("clip", "later")[0] == 0
    direct = {path.name: path.read_bytes() for path in (folder / "direct").iterdir()}
    assert len(direct) > 1
    assert {path.name: path.read_bytes() for path in (folder / "later").iterdir()} == direct


def test_json_says_what_was_cut_from_where(keye: Keye, found: Path, clip: Path) -> None:
    from keyecli import __version__

    code, out, _ = keye("clip", "found.jsonl", "cuts", "--json")
    first, *others = map(json.loads, out.splitlines())
    assert (code, len(others)) == (0, 2)
    assert first == {
        "schema": "keye.clip/1",
        "path": "cuts/clip_001_0.2-0.8.mp4",
        "source": str(clip),
        "title": "the dog",
        "score": 0.934,
        "span_start_s": 0.2,
        "span_end_s": 0.8,
        "start_s": 0.0,  # the keyframe before it
        "end_s": first["end_s"],
        "keye_version": __version__,
    }
    assert 0.8 <= first["end_s"] <= 1.0


def test_chapters_and_scenes(keye: Keye, clip: Path, clips: Clips, folder: Path, stdin: Stdin) -> None:
    stdin(lines(summary(clip, "sun", "rain")))
    code, out, _ = keye("clip", "chapters", "--exact")
    assert (code, [seconds(folder / path) for path in out.split()]) == (0, [1.0, 1.0])
    _, scenes, _ = keye("scenes", str(clips("talk-cut.mp4", 80, rate=2, picture=shots(25, 55))), "--json")
    stdin(scenes)
    code, out, _ = keye("clip", "-", "shots", "--exact")
    assert (code, [seconds(folder / path) for path in out.split()]) == (0, [12.5, 27.5])


def test_videos_of_one_name_do_not_meet(keye: Keye, clip: Path, folder: Path) -> None:
    results = []
    for camera in ("a", "b", "c"):
        (folder / camera).mkdir()
        name = "Clip.mp4" if camera == "b" else "clip.mp4"
        (folder / camera / name).write_bytes(clip.read_bytes())
        results.append(grounding(f"{camera}/{name}", "dog", (0, 1, 0.5)))
    (folder / "found.jsonl").write_text(lines(*results))
    code, out, _ = keye("clip", "found.jsonl", "cuts", "--overwrite")
    assert code == 0
    assert out.splitlines() == [
        "cuts/clip_001_0.0-1.0.mp4",
        "cuts/2/Clip_001_0.0-1.0.mp4",
        "cuts/3/clip_001_0.0-1.0.mp4",
    ]


def test_what_is_there_stays(keye: Keye, found: Path, folder: Path) -> None:
    (folder / "cuts").mkdir()
    taken = folder / "cuts" / "clip_002_0.4-1.0.mp4"
    taken.write_text("mine")
    code, out, err = keye("clip", "found.jsonl", "cuts")
    said = "keye: cuts/clip_002_0.4-1.0.mp4 exists; give another folder, or --overwrite to replace it\n"
    assert (code, out, err) == (2, "", said)
    assert [path.name for path in (folder / "cuts").iterdir()] == [taken.name]
    assert keye("clip", "found.jsonl", "cuts", "--overwrite")[0] == 0
    assert seconds(taken) > 0.6


def test_nothing_is_written_when_a_later_video_is_gone(keye: Keye, clip: Path, folder: Path) -> None:
    gone = grounding("gone.mp4", "dog", (0, 1, 0.5))
    (folder / "found.jsonl").write_text(lines(grounding(clip, "dog", (0, 1, 0.5)), gone))
    code, out, err = keye("clip", "found.jsonl", "cuts")
    assert (code, out) == (3, "")
    assert err.startswith("keye: gone.mp4, which line 2 of found.jsonl is about, does not exist")
    assert not (folder / "cuts").exists()


def test_no_span(keye: Keye, folder: Path, stdin: Stdin) -> None:
    stdin(lines(grounding("gone.mp4", "a unicorn")))
    assert keye("clip", "cuts") == (0, "", "keye: there is no span to cut out\n")
    assert not (folder / "cuts").exists()


BEHIND = "say where the clips go, as in `keye clip found.jsonl cuts/`"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, f"no folder: {BEHIND}"),
        (["found.jsonl"], 2, f"no folder after found.jsonl: {BEHIND}"),
        (["found.jsonl", "-"], 2, f"no folder after -: {BEHIND}"),
        (["no.jsonl", "cuts"], 3, "the results in no.jsonl cannot be read: No such file or directory"),
        (["-", "-", "cuts"], 2, "stdin can be read only once: name - once"),
        (["-", "cuts"], 3, "there is no result in stdin; give what keye printed with --json"),
    ],
)
def test_wrong_usage(
    arguments: list[str], code: int, message: str, keye: Keye, found: Any, stdin: Stdin
) -> None:
    stdin("")
    assert keye("clip", *arguments) == (code, "", f"keye: {message}\n")
