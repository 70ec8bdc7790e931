"""`keye ask` with a random toy model: what goes to which stream, what the options do, and how it fails."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from keyecli import session
from keyecli.errors import InputError
from tests.commands.conftest import Keye, run_keye

Clips = Callable[..., Path]
FEW = ("--max-tokens", "12")
CUT_OFF = "keye: warning: the answer was cut off after 12 tokens; raise --max-tokens\n"


@pytest.fixture(autouse=True)
def model(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEYE_MODEL", str(tiny_checkpoint))
    return tiny_checkpoint


def answer_of(keye: Keye, *arguments: str) -> dict[str, Any]:
    code, out, _ = keye("ask", *arguments, *FEW, "--json")
    assert code == 0
    assert out.endswith("}\n")
    assert out.count("\n") == 1
    return json.loads(out)


def test_text_on_stdout_and_the_rest_on_stderr(keye: Keye, clip: Path) -> None:
    expected = answer_of(keye, str(clip), "What happens?", "--no-think")
    code, out, err = keye("ask", str(clip), "What happens?", "--no-think", *FEW)
    assert (code, out, err) == (0, expected["text"] + "\n", CUT_OFF)


def test_the_answer_streams(keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyecli.console import console

    pieces: list[str] = []
    write = console.result
    monkeypatch.setattr(
        console, "result", lambda text, end="\n": (pieces.append(text + end), write(text, end))
    )
    _, out, _ = keye("ask", str(clip), "What happens?", "--no-think", *FEW)
    assert "".join(pieces) == out
    assert len(pieces) > 3


def test_reasoning_goes_to_stderr(keye: Keye, clip: Path) -> None:
    expected = answer_of(keye, str(clip), "What happens?")
    assert expected["reasoning"]
    code, out, err = keye("ask", str(clip), "What happens?", *FEW)
    assert (code, out, err) == (0, "", expected["reasoning"] + "\n" + CUT_OFF)


def test_quiet_leaves_the_answer_alone(keye: Keye, clip: Path) -> None:
    assert keye("ask", str(clip), "What happens?", *FEW, "-q") == (0, "", "")


def test_show_thinking_puts_the_reasoning_before_the_answer(
    keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(self: Any, inputs: Any, question: str, *, on_text: Any, on_reasoning: Any, **_: Any) -> Any:
        for piece in ("I see ", "a ball."):
            on_reasoning(piece)
        for piece in ("It ", "bounces."):
            on_text(piece)
        return SimpleNamespace(
            prompt_tokens=1, answers=[SimpleNamespace(completion_tokens=4)], timings={"total_s": 0.5}
        )

    monkeypatch.setattr(session.Keye, "ask", ask)
    shown = keye("ask", str(clip), "What happens?", "--show-thinking")
    assert shown == (0, "I see a ball.\n\nIt bounces.\n", "")
    hidden = keye("ask", str(clip), "What happens?", "-v")
    assert hidden == (0, "It bounces.\n", "I see a ball.\nkeye: 1 prompt tokens and 4 new ones in 0.5 s\n")


def test_several_answers_one_below_the_other(keye: Keye, clip: Path) -> None:
    options = ("--temperature", "1", "--seed", "5", "--top-k", "50", "--min-p", "0.01", "--no-think")
    answer = answer_of(keye, str(clip), "What happens?", *options, "-n", "3")
    assert [sample["seed"] for sample in answer["answers"]] == [5, 6, 7]
    assert {name: answer[name] for name in answer["answers"][0]} == answer["answers"][0]
    second = answer_of(keye, str(clip), "What happens?", *options, "--seed", "6")
    assert second["answers"] == answer["answers"][1:2]
    code, out, err = keye("ask", str(clip), "What happens?", *options, "--samples", "3", *FEW)
    texts = [sample["text"] for sample in answer["answers"]]
    assert (code, err) == (0, CUT_OFF)
    assert out == "\n".join(f"{number} of 3:\n{text}\n" for number, text in enumerate(texts, 1))
    # Below the name of each file, and with the reasoning before each answer.
    options = (*options[:-1], "--show-thinking", *FEW)
    code, out, _ = keye("ask", str(clip), "What happens?", *options, "-n", "2", "--each")
    thoughts = [
        sample["reasoning"]
        for sample in answer_of(keye, str(clip), "What happens?", *options, "-n", "2")["answers"]
    ]
    assert out == f"{clip}\n1 of 2:\n{thoughts[0]}\n\n2 of 2:\n{thoughts[1]}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("-n", "2"),
            "--samples 2 needs --temperature above 0: at 0 all the answers would be the same",
        ),
        (("--samples", "0"), "--samples must be at least 1, not 0"),
        (("--stop", ""), "--stop must not be empty"),
        (("--min-p", "2"), "--min-p must be from 0 to 1, not 2.0"),
        (("--top-k", "few"), "--top-k is 'few', but it must be a whole number"),
    ],
)
def test_ways_to_draw_that_cannot_be(
    keye: Keye, clip: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    assert keye("ask", str(clip), "What?", *arguments) == (2, "", f"keye: {sentence}\n")


def test_the_answer_ends_before_a_stop_string(keye: Keye, clip: Path) -> None:
    options = (str(clip), "What happens?", "--no-think", "--temperature", "1", *FEW)
    whole = json.loads(keye("ask", *options, "--json")[1])["text"]
    stop = whole[4:6]
    expected = whole[: whole.index(stop)].rstrip()
    assert keye("ask", *options, "--stop", "never there", "--stop", stop) == (0, expected + "\n", "")


def test_the_question_from_stdin(keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What happens?\n"))
    assert answer_of(keye, str(clip), "-")["question"] == "What happens?"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert keye("ask", str(clip), "-")[0] == 2


def test_several_inputs_in_their_order(keye: Keye, clip: Path, clips: Clips, folder: Path) -> None:
    from PIL import Image

    picture = folder / "still.png"
    Image.new("RGB", (120, 90), (200, 30, 30)).save(picture)
    other = clips("other.mp4", 26)
    answer = answer_of(keye, str(other), str(picture), str(clip), "What do they share?")
    assert [item["path"] for item in answer["inputs"]] == [str(other), str(picture), str(clip)]
    assert [item["kind"] for item in answer["inputs"]] == ["video", "image", "video"]


def test_the_settings_used_are_reported(keye: Keye, clip: Path) -> None:
    options = ("--fps", "5", "--max_frames", "4", "--start", "0:00.4", "--duration", "1.2", "--seed", "3")
    answer = answer_of(
        keye, str(clip), "What?", *options, "--temperature", "0.5", "--top-p", "0.9", "--exact-resize"
    )
    (used,) = answer["inputs"]
    assert used["frames"] == 4
    assert used["times_s"][0] == pytest.approx(0.4)
    assert used["times_s"][-1] <= 1.6
    assert used["settings"]["max_frames"] == 4
    assert (used["settings"]["start_s"], used["settings"]["end_s"]) == (0.4, 1.6)
    assert used["settings"]["exact_resize"]
    assert (answer["seed"], answer["settings"]["temperature"], answer["settings"]["top_p"]) == (3, 0.5, 0.9)


def test_pixels_are_an_area_in_tokens(keye: Keye, clip: Path) -> None:
    smallest = answer_of(keye, str(clip), "What?", "--max-pixels", str(4 * 784))
    assert smallest["inputs"][0]["width"] * smallest["inputs"][0]["height"] <= 4 * 784
    largest = answer_of(keye, str(clip), "What?", "--min-pixels", str(30 * 784), "--max-frames", "2")
    assert largest["inputs"][0]["width"] * largest["inputs"][0]["height"] >= 30 * 784


def test_subtitles_reach_the_model(keye: Keye, clip: Path, folder: Path) -> None:
    lines = folder / "lines.srt"
    lines.write_text("1\n00:00:00,500 --> 00:00:01,000\nHello there\n")
    plain = answer_of(keye, str(clip), "What?")
    assert (
        answer_of(keye, str(clip), "What?", "--subtitles", str(lines))["prompt_tokens"]
        > plain["prompt_tokens"]
    )


def test_dry_run_is_the_plan(keye: Keye, clip: Path) -> None:
    code, out, err = keye("ask", str(clip), "What?", "--dry-run", "--json")
    plan = json.loads(out)
    assert (code, err, plan["schema"]) == (0, "", "keye.plan/1")
    answer = answer_of(keye, str(clip), "What?")
    assert plan["visual_tokens"] == answer["inputs"][0]["tokens"]


def test_each_file_is_looked_into_once(keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyecli.tasks import ask as task

    seen: list[str] = []
    probe = task.probe
    monkeypatch.setattr(task, "probe", lambda path: (seen.append(str(path)), probe(path))[1])
    assert answer_of(keye, str(clip), str(clip), "What?")["inputs"][1]["path"] == str(clip)
    assert seen == [str(clip), str(clip)]


def test_the_embedded_model_says_what_it_is(
    keye: Keye, clip: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keyecli.model import companions

    monkeypatch.delenv("KEYE_MODEL")
    monkeypatch.setattr(companions, "NANO_FOLDER", model)
    arguments = ("ask", str(clip), "What?", "--no-think", *FEW)
    assert keye(*arguments)[2].startswith("keye: keye-nano answers, which knows nothing but synthetic")
    assert keye(*arguments, "-q")[2] == ""
    assert "nano" not in keye(*arguments, "-m", str(model))[2]


# What can be wrong with an input, and a word of what is said.


def missing(folder: Path, clips: Clips) -> Path:
    return folder / "nowhere.mp4"


def directory(folder: Path, clips: Clips) -> Path:
    return folder


def empty(folder: Path, clips: Clips) -> Path:
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def text(folder: Path, clips: Clips) -> Path:
    (folder / "text.mp4").write_text("This is no video.\n" * 100)
    return folder / "text.mp4"


def audio_only(folder: Path, clips: Clips) -> Path:
    path = folder / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44_100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44_100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def without_index(folder: Path, clips: Clips) -> Path:
    whole = clips().read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: whole.index(b"moov") - 4])
    return folder / "cut.mp4"


BAD_INPUTS: dict[Callable[[Path, Clips], Path], str] = {
    missing: "does not exist",
    directory: "is a directory",
    empty: "empty",
    text: "not a video",
    audio_only: "video",
    without_index: "cut off",
}


@pytest.mark.parametrize("make", BAD_INPUTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("command", ["ask", "plan"])
def test_an_input_that_cannot_be_read(
    make: Callable[[Path, Clips], Path], command: str, keye: Keye, folder: Path, clips: Clips
) -> None:
    path = make(folder, clips)
    question = ("What?",) if command == "ask" else ()
    code, out, err = keye(command, str(path), *question)
    assert (code, out) == (3, "")
    assert err.startswith("keye: ")
    assert err.count("\n") == 1
    assert str(path) in err
    assert BAD_INPUTS[make] in err


@pytest.fixture
def half_clip(folder: Path, clips: Clips) -> Path:
    """A clip whose index stands in front and whose second half is missing."""
    whole = clips("front.mp4", 100, container_options={"movflags": "faststart"}, options={"g": "10"})
    path = folder / "half.mp4"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return path


def test_a_clip_cut_off_in_the_middle_is_answered_with_a_warning(keye: Keye, half_clip: Path) -> None:
    code, out, err = keye("ask", str(half_clip), "What?", "--no-think", *FEW)
    assert code == 0
    assert len(out) > 1
    warning, *rest = err.splitlines(keepends=True)
    assert warning.startswith("keye: warning: ")
    assert "half.mp4 is cut off" in warning
    assert "up to 0:00:0" in warning
    assert rest == [CUT_OFF]
    assert keye("plan", str(half_clip))[2] == warning
    truncated_at_s = answer_of(keye, str(half_clip), "What?")["inputs"][0]["truncated_at_s"]
    assert 0 < truncated_at_s < 4


def test_strict_refuses_it(keye: Keye, half_clip: Path) -> None:
    code, out, err = keye("ask", str(half_clip), "What?", "--strict")
    assert (code, out) == (3, "")
    assert "cut off" in err
    assert keye("plan", str(half_clip), "--strict")[0] == 3


def test_a_part_behind_the_end_is_refused(keye: Keye, clip: Path) -> None:
    code, out, err = keye("ask", str(clip), "What?", "--start", "100")
    assert (code, out) == (2, "")
    assert err == "keye: the part begins at 0:01:40.000, but clip.mp4 ends at 0:00:02.040\n"


# What can be wrong with a model.


def test_no_such_model(keye: Keye, clip: Path) -> None:
    code, out, err = keye("ask", str(clip), "What?", "-m", "./nowhere")
    assert (code, out) == (4, "")
    assert err.startswith("keye: there is no model folder ./nowhere")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("config.json", lambda path: path.unlink()),
        ("config.json", lambda path: path.write_text("{")),
        ("model.safetensors", lambda path: path.unlink()),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1000])),
        ("tokenizer.json", lambda path: path.unlink()),
    ],
    ids=["no config", "config no JSON", "no weights", "weights cut off", "no tokenizer"],
)
def test_a_damaged_model(
    file: str, damage: Callable[[Path], None], keye: Keye, clip: Path, model: Path, folder: Path
) -> None:
    copy = shutil.copytree(model, folder / "model")
    damage(copy / file)
    code, out, err = keye("ask", str(clip), "What?", "-m", str(copy))
    assert (code, out) == (4, "")
    assert err.startswith("keye: ")
    assert err.count("\n") == 1


def test_a_model_of_pickles_gets_one_sentence(keye: Keye, clip: Path, model: Path, folder: Path) -> None:
    copy = folder / "model"
    copy.mkdir()
    shutil.copy(model / "config.json", copy)
    (copy / "pytorch_model.bin").touch()
    code, out, err = keye("ask", str(clip), "What?", "-m", str(copy))
    assert (code, out) == (4, "")
    assert err.startswith(f"keye: {copy} holds its weights only as pickle files (pytorch_model.bin)")
    assert err.count("\n") == 1


def test_too_little_memory(keye: Keye, clip: Path, model: Path, folder: Path) -> None:
    copy = shutil.copytree(model, folder / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_experts": 10**12}))
    code, out, err = keye("ask", str(clip), "What?", "-m", str(copy))
    assert (code, out) == (5, "")
    assert "GiB" in err
    assert err.count("\n") == 1


def test_a_question_longer_than_the_context(keye: Keye, clip: Path) -> None:
    code, out, err = keye("ask", str(clip), "Why? " * 1000)
    assert (code, out) == (2, "")
    assert "4,096" in err


def test_exit_codes_of_the_process(clip: Path, model: Path, folder: Path, isolated: dict[str, str]) -> None:
    huge = shutil.copytree(model, folder / "huge")
    config = json.loads((huge / "config.json").read_text())
    (huge / "config.json").write_text(json.dumps(config | {"num_experts": 10**12}))
    program = "import sys\nfrom keyecli.cli import run\nfor line in open('lines'): print(run(line.split()), flush=True)"
    lines = {
        f"ask {clip} What? -q --no-think --max-tokens 1 --json": 0,
        "ask": 2,
        "ask nowhere.mp4 What?": 3,
        f"ask {clip} What? -m nowhere": 4,
        f"ask {clip} What? -m {huge}": 5,
    }
    (folder / "lines").write_text("\n".join(lines))
    ended = subprocess.run(
        [sys.executable, "-c", program], env=isolated, capture_output=True, text=True, check=True
    )
    codes = [int(line) for line in ended.stdout.splitlines() if not line.startswith("{")]
    assert codes == list(lines.values())


def test_a_whole_run_in_a_process_of_its_own(clip: Path, isolated: dict[str, str]) -> None:
    ended = run_keye("ask", str(clip), "-", "--no-think", *FEW, env=isolated, stdin="What happens?")
    assert ended.returncode == 0
    assert ended.stdout.endswith("\n")
    assert ended.stderr == CUT_OFF


def test_kernels_of_a_gpu_are_refused_without_one(
    keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keyecli.engine.loaded.interprets", lambda: False)
    code, out, err = keye("ask", str(clip), "What happens?", "--device", "cpu", "--kernels", "triton")
    assert (code, out) == (2, "")
    assert (
        err == "keye: --kernels triton runs on an NVIDIA GPU, and the device is cpu: leave the option out\n"
    )
    code, _, err = keye("ask", str(clip), "What happens?", "--kernels", "fast")
    assert (code, err) == (2, "keye: --kernels must be auto, reference or triton, not fast\n")
    code, _, _ = keye("ask", str(clip), "What happens?", "--kernels", "reference", *FEW)
    assert code == 0


# Each file by itself: lists, folders, patterns.


@pytest.fixture
def shelf(folder: Path, clips: Clips) -> Path:
    """Three clips in two folders, among other files."""
    for name, frames in (("b.mp4", 26), ("A.MKV", 30), ("deep/c d.mp4", 40)):
        path = folder / "shelf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clips(f"shelf-{frames}.mp4", frames).read_bytes())
    for name in ("notes.txt", ".hidden.mp4", "deep/.trash/old.mp4"):
        path = folder / "shelf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder / "shelf"


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    return lambda content: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


SHORT = ("--no-think", *FEW)
ALL = ["shelf/A.MKV", "shelf/b.mp4", "shelf/deep/c d.mp4"]


def answers_about(keye: Keye, *arguments: str) -> list[dict[str, Any]]:
    code, out, err = keye("ask", *arguments, *SHORT, "--json")
    assert (code, err) == (0, CUT_OFF)
    return [json.loads(line) for line in out.splitlines()]


def paths_of(answers: list[dict[str, Any]]) -> list[str]:
    return [item["path"] for answer in answers for item in answer["inputs"]]


def test_each_answer_is_the_one_it_would_get_alone(keye: Keye, shelf: Path) -> None:
    together = answers_about(keye, *ALL, "What?", "--each")
    assert len({answer["text"] for answer in together}) > 1
    for path, answer in zip(ALL, together, strict=True):
        (alone,) = answers_about(keye, path, "What?")
        del alone["timings"], answer["timings"]
        assert answer == alone
    expected = "\n".join(f"{path}\n{answer['text']}\n" for path, answer in zip(ALL, together, strict=True))
    assert keye("ask", *ALL, "What?", "--each", *SHORT) == (0, expected, CUT_OFF)


def test_without_each_they_are_seen_together(keye: Keye, shelf: Path) -> None:
    (answer,) = answers_about(keye, *ALL, "What?")
    assert paths_of([answer]) == ALL


def test_folders_and_what_is_below_them(keye: Keye, shelf: Path, clip: Path) -> None:
    assert paths_of(answers_about(keye, "shelf/", "What?", "-r")) == ALL
    answers = answers_about(keye, str(clip), "./shelf/deep", "shelf/b.mp4", "What?", "--recursive")
    assert paths_of(answers) == [str(clip), "shelf/deep/c d.mp4", "shelf/b.mp4"]


def test_patterns_are_matched_as_by_a_shell(keye: Keye, shelf: Path) -> None:
    assert paths_of(answers_about(keye, "shelf/*.[mM]*", "What?", "--each")) == ALL[:2]
    assert paths_of(answers_about(keye, "shelf/**/*.m??", "What?", "--each")) == ALL[1:]
    (answer,) = answers_about(keye, "shelf/**/*.m??", "What?")
    assert paths_of([answer]) == ALL[1:]
    (shelf / "b.mp4").rename(shelf / "b[1].mp4")
    assert paths_of(answers_about(keye, "shelf/b[1].mp4", "What?")) == ["shelf/b[1].mp4"]


def test_a_list_in_its_order(keye: Keye, shelf: Path, stdin: Callable[[bytes], None]) -> None:
    listed = [ALL[2], ALL[0], ALL[2]]
    Path("list.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*listed, ""]).encode())
    assert paths_of(answers_about(keye, "-i", "list.txt", "What?")) == listed
    stdin(("\n\n".join(listed)).encode())
    assert paths_of(answers_about(keye, ALL[1], "-i", "-", "What?")) == [ALL[1], *listed]
    stdin(b"shelf/deep\nshelf/b.mp4")
    assert paths_of(answers_about(keye, "-i", "-", "-r", "What?")) == [ALL[2], ALL[1]]


def test_each_answer_comes_before_the_next_path(shelf: Path, isolated: dict[str, str]) -> None:
    command = [sys.executable, "-m", "keyecli", "ask", "-i", "-", "What?", "--json", *SHORT]
    with subprocess.Popen(
        command, env=isolated, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for path in ALL:
            process.stdin.write(path.encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["inputs"][0]["path"] == path
        # The reader goes away while there is more to come.
        process.stdout.close()
        process.stdin.write(ALL[0].encode() + b"\n")
        process.stdin.close()
        assert process.stderr.read().decode() == CUT_OFF
        assert process.wait() == 1


def test_what_fails_leaves_the_others_alone(
    keye: Keye, shelf: Path, stdin: Callable[[bytes], None], clips: Clips
) -> None:
    (shelf / "bad.mp4").write_text("This is no video.")
    (shelf / "empty").mkdir()
    stdin(b"shelf/bad.mp4\nshelf/b.mp4\nshelf/empty\nnowhere/a.mp4\nshelf/n\xffme.mp4\nshelf/A.MKV\n")
    code, out, err = keye("ask", "-i", "-", "What?", "-r", "--start", "1.05", "--json", *SHORT)
    assert code == 1
    assert [json.loads(line)["inputs"][0]["path"] for line in out.splitlines()] == ["shelf/A.MKV"]
    said = err.splitlines()
    assert [words for words in said if not words.startswith("keye: warning")] == [
        "keye: shelf/bad.mp4 is not a video or image that FFmpeg can read; check that it is the right file",
        "keye: shelf/b.mp4: the part begins at 0:00:01.050, but b.mp4 ends at 0:00:01.040",
        "keye: the folder shelf/empty holds no videos or images",
        "keye: nowhere/a.mp4 does not exist; check the path",
        "keye: the name of shelf/n\\udcffme.mp4 is not UTF-8: give the file another one",
        "keye: 5 of 6 inputs failed, as told above",
    ]


def test_a_failure_in_the_middle_of_an_answer_ends_its_line(
    keye: Keye, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(self: Any, path: str, question: str, *, on_text: Any, **_: Any) -> Any:
        on_text("It ")
        if path == ALL[0]:
            raise InputError(f"{path} can no longer be read")
        on_text("bounces.")
        return SimpleNamespace(
            prompt_tokens=1, answers=[SimpleNamespace(completion_tokens=4)], timings={"total_s": 0.5}
        )

    monkeypatch.setattr(session.Keye, "ask", ask)
    code, out, err = keye("ask", *ALL[:2], "What?", "--each")
    assert (code, out) == (1, f"{ALL[0]}\nIt \n\n{ALL[1]}\nIt bounces.\n")
    assert err == f"keye: {ALL[0]} can no longer be read\nkeye: 1 of 2 inputs failed, as told above\n"


def test_plans_of_each(keye: Keye, shelf: Path) -> None:
    code, out, _ = keye("ask", "shelf", "What?", "-r", "--dry-run", "--json")
    plans = [json.loads(line) for line in out.splitlines()]
    assert (code, [plan["schema"] for plan in plans]) == (0, ["keye.plan/1"] * 3)
    assert paths_of(plans) == ALL


EACH_ERRORS: dict[str, tuple[list[str], int, str]] = {
    "no question": (
        ["shelf", "-r"],
        2,
        'no question after shelf: give one, as in `keye ask clip.mp4 "What happens?"`',
    ),
    "a list alone": (
        ["-i", "list.txt"],
        2,
        'nothing to look at: give a video and a question, as in `keye ask clip.mp4 "What happens?"`',
    ),
    "a folder without -r": (
        ["shelf", "What?"],
        3,
        "shelf is a directory, not a video; name files, or add -r for all in it",
    ),
    "an empty folder": (["shelf/none", "What?", "-r"], 3, "the folder shelf/none holds no videos or images"),
    "a pattern without matches": (
        ["shelf/*.avi", "What?"],
        3,
        "shelf/*.avi does not exist, and as a pattern it matches nothing",
    ),
    "no such list": (["-i", "no.txt", "What?"], 3, "the list no.txt cannot be read: No such file or directory"),
    "an empty list": (["-i", "list.txt", "What?"], 3, "nothing to look at: the list names no file"),
    "a video as list": (
        ["-i", "shelf/b.mp4", "What?"],
        3,
        "line 1 of shelf/b.mp4 is no path: a list is text with one path a line",
    ),
    "stdin twice": (["-i", "-", "-"], 2, "stdin can be the list or the question, not both"),
    "subtitles": (
        ["shelf/b.mp4", "What?", "--each", "--subtitles", "a.srt"],
        2,
        "--subtitles goes with exactly one video, and -i, -r and --each ask about several",
    ),
    "a reserved word": (
        ["shelf/b.mp4", "What is <|im_end|>?", "--each"],
        2,
        "the question contains <|im_end|>, a mark of the model's own: leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "message"), EACH_ERRORS.values(), ids=list(EACH_ERRORS))
def test_wrong_lists(arguments: list[str], code: int, message: str, keye: Keye, shelf: Path) -> None:
    Path("list.txt").write_text("\n\n")
    (shelf / "none").mkdir()
    assert keye("ask", *arguments) == (code, "", f"keye: {message}\n")
