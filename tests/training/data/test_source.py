"""Data files of several tools, as their documents write them: each gives the conversation that its author meant."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from keyecli.errors import InputError, UsageError
from keyecli.forge import SceneOptions, write_dataset
from keyecli.training.data import open_data
from keyecli.training.rows import Message, RowError, TrainingRow, VisualRef
from tests.training.data.conftest import WriteRows, question


def said(row: TrainingRow) -> list[tuple[Any, ...]]:
    """(role, part, …) of each message, files by their names, with the sampling of those that say it."""
    return [(message.role, *(_part(part) for part in message.parts)) for message in row.messages]


def _part(part: str | VisualRef) -> Any:
    if isinstance(part, str):
        return part
    name = f"{part.kind}:{part.path.name}"
    return (name, dict(part.sampling)) if part.sampling else name


ASKED = [("user", "video:a.mp4", "What?"), ("assistant", "A dog.")]


def test_swift_messages(write: WriteRows, media: Path) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image>Which, <video>or\n<video>?"},
            {"role": "assistant", "content": "One.", "loss": False},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes.", "loss": True},
        ],
        "videos": ["a.mp4", str(media / "b.mp4")],
        "images": "still.png",
        "audios": [],
        "tools": None,
        "solution": 3,
    }
    data = open_data(write(row))
    (only,) = data.rows()
    assert isinstance(only, TrainingRow)
    assert said(only) == [
        ("system", "Be brief."),
        ("user", "image:still.png", "Which, ", "video:a.mp4", "or\n", "video:b.mp4", "?"),
        ("assistant", "One."),
        ("user", "Sure?"),
        ("assistant", "Yes."),
    ]
    assert [message.learnt for message in only.messages] == [False, False, False, False, True]
    assert all(visual.path.is_file() for visual in only.visuals)
    assert only.extra == {"solution": 3}
    assert only.source == f"{data.path}:1"
    assert data.sha256 == hashlib.sha256(data.path.read_bytes()).hexdigest()


def test_swift_query_and_history(write: WriteRows) -> None:
    row = {
        "system": "Be brief.",
        "query": "And <video> now?",
        "response": "A cat.",
        "history": [["Hello", "Hi"]],
        "videos": ["a.mp4"],
    }
    data = open_data(write(row, {"query": "What?", "videos": ["a.mp4"]}))
    assert said(data.row(0)) == [
        ("system", "Be brief."),
        ("user", "Hello"),
        ("assistant", "Hi"),
        ("user", "And ", "video:a.mp4", " now?"),
        ("assistant", "A cat."),
    ]
    assert said(data.row(1)) == ASKED[:1]


def test_swift_conversation_pairs(write: WriteRows) -> None:
    row = {
        "system": "S",
        "conversation": [{"human": "<video>What?", "assistant": "A dog."}],
        "videos": ["a.mp4"],
    }
    assert said(open_data(write(row)).row(0)) == [("system", "S"), *ASKED]


def test_files_without_a_placeholder_stand_before_the_first_question(write: WriteRows) -> None:
    row = {
        "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "What?"}],
        "videos": ["a.mp4", "b.mp4"],
        "images": ["still.png"],
    }
    assert said(open_data(write(row)).row(0))[1] == (
        "user", "video:a.mp4", "video:b.mp4", "image:still.png", "What?"
    )  # fmt: skip


def test_tools(write: WriteRows) -> None:
    """A call is a part of the answer; what comes back is nobody's answer."""
    turns = [
        {"from": "human", "value": "<video>What?"},
        {"from": "gpt", "value": "<think>\nI look.\n</think>\n"},
        {"from": "function_call", "value": '{"name": "look"}'},
        {"from": "observation", "value": "dog"},
        {"from": "gpt", "value": "A dog."},
    ]
    row = open_data(write({"conversations": turns, "videos": ["a.mp4"]})).row(0)
    call = '<think>\nI look.\n</think>\n<tool_call>\n{"name": "look"}\n</tool_call>'
    assert said(row) == [ASKED[0], ("assistant", call), ("tool", "dog"), ("assistant", "A dog.")]
    assert [message.learnt for message in row.messages] == [False, True, False, True]


SHAREGPT = {
    "talk": [{"speaker": "person", "says": "<video>What?"}, {"speaker": "machine", "says": "A dog."}],
    "rules": "S",
    "clips": ["a.mp4"],
    "note": 1,
}
INFO: dict[str, Any] = {
    "theirs": {
        "file_name": "theirs.json",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "system": "rules", "videos": "clips"},
        "tags": {
            "role_tag": "speaker",
            "content_tag": "says",
            "user_tag": "person",
            "assistant_tag": "machine",
        },
    },
    "openai": {
        "file_name": "openai.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "videos": "videos"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    },
    "plain": {
        "file_name": "plain.jsonl",
        "columns": {"prompt": "ask", "response": "reply", "videos": "videos"},
    },
    "far": {"hf_hub_url": "someone/data"},
    "pairs": {"file_name": "theirs.json", "formatting": "sharegpt", "ranking": True},
}


@pytest.fixture
def described(write: WriteRows, media: Path) -> Path:
    """A folder with three data sets of LLaMA-Factory and its dataset_info.json."""
    (media / "theirs.json").write_text(json.dumps([SHAREGPT], indent=2))
    (media / "openai.json").write_text(json.dumps([question()]))
    write({"ask": "<video>What?", "input": "", "reply": "A dog.", "videos": ["a.mp4"]}, name="plain.jsonl")
    (media / "dataset_info.json").write_text(json.dumps(INFO))
    return media


def test_llama_factory_by_name(described: Path) -> None:
    for name in ("theirs", "openai", "plain"):
        data = open_data(described / "dataset_info.json", dataset=name)
        assert said(data.row(0))[-2:] == ASKED
    row = open_data(described / "dataset_info.json", dataset="theirs").row(0)
    assert row.messages[0] == Message("system", ("S",))
    assert row.extra == {"note": 1}
    assert row.source == f"{described / 'theirs.json'}:2"


def test_llama_factory_beside_the_file(described: Path) -> None:
    assert said(open_data(described / "plain.jsonl").row(0)) == ASKED
    assert said(open_data(described / "openai.json").row(0)) == ASKED
    with pytest.raises(UsageError, match="as theirs and pairs: say which"):
        open_data(described / "theirs.json")
    assert said(open_data(described / "theirs.json", dataset="theirs").row(0))[1:] == ASKED


def test_llama_factory_refused(described: Path, write: WriteRows) -> None:
    info = described / "dataset_info.json"
    with pytest.raises(UsageError, match="describes theirs, openai, plain, far, pairs: say which"):
        open_data(info)
    with pytest.raises(UsageError, match="no data set other"):
        open_data(info, dataset="other")
    with pytest.raises(InputError, match="far is not on this disk"):
        open_data(info, dataset="far")
    with pytest.raises(InputError, match="pairs compares answers"):
        open_data(info, dataset="pairs")
    write({"ask": "What?"}, name="plain.jsonl")
    with pytest.raises(
        RowError, match=r"plain\.jsonl:1: the row has no column reply, in which plain keeps its output"
    ):
        open_data(described / "plain.jsonl").row(0)
    info.write_text("{")
    with pytest.raises(InputError, match=r"dataset_info\.json is not JSON"):
        open_data(described / "plain.jsonl")


def test_alpaca_and_sharegpt_without_a_description(write: WriteRows) -> None:
    alpaca = {"instruction": "<video>What", "input": "is it?", "output": "A dog.", "videos": ["a.mp4"]}
    share = {
        "conversations": [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "A dog."}],
        "videos": ["a.mp4"],
    }
    data = open_data(write(alpaca, share))
    assert said(data.row(0)) == [("user", "video:a.mp4", "What\nis it?"), ASKED[1]]
    assert said(data.row(1)) == ASKED


def test_trl(write: WriteRows) -> None:
    """Typed parts that name their file, that take it from a column, and a prompt whose earlier answers are not learnt."""
    text = {"type": "text", "text": "What?"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}
    own = {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, text]}, answer]}
    bare = {
        "prompt": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Hm?"}]},
            {"role": "assistant", "content": "Grey."},
            {"role": "user", "content": [{"type": "video"}, text]},
        ],
        "completion": [answer],
        "images": ["still.png"],
        "videos": ["a.mp4"],
    }
    plain = {"prompt": "What?", "completion": "A dog.", "video": "a.mp4"}
    alone = {"prompt": [{"role": "user", "content": "What?"}], "videos": ["a.mp4"], "solution": "dog"}
    data = open_data(write(own, {**own, "videos": ["a.mp4"]}, bare, plain, alone))
    assert said(data.row(0)) == said(data.row(1)) == said(data.row(3)) == ASKED
    assert said(data.row(2)) == [("user", "image:still.png", "Hm?"), ("assistant", "Grey."), *ASKED]
    assert [message.learnt for message in data.row(2).messages] == [False, False, False, True]
    assert said(data.row(4)) == ASKED[:1]
    assert data.row(4).extra == {"solution": "dog"}


def test_qwen_sampling(write: WriteRows, media: Path) -> None:
    """Keys of qwen-vl-utils become those of `keye ask`; a limit of all pixels is this video's own."""
    video = {
        "type": "video",
        "video": f"file://{media / 'a.mp4'}",
        "fps": 4,
        "max_frames": 8,
        "min_pixels": 784,
        "max_pixels": 7840,
        "total_pixels": 78400,
        "video_start": 0.5,
        "video_end": 1.5,
    }
    other = {"type": "video", "video": "b.mp4", "nframes": 3, "resized_height": 56, "resized_width": 84}
    messages = [{"role": "user", "content": [video, other, {"type": "text", "text": "What?"}]}]
    path = media / "talk.json"
    path.write_text(json.dumps([messages]))  # a conversation without columns
    sampling = {"fps": 4, "max_frames": 8, "min_pixels": 784, "max_pixels": 7840}
    first, second = (visual.sampling for visual in open_data(path).row(0).visuals)
    assert first == {**sampling, "start": 0.5, "end": 1.5, "max_tokens_video": 200}
    assert second == {"fps": 1000.0, "max_frames": 3, "min_pixels": 4704, "max_pixels": 4704}


def test_timelens(write: WriteRows, media: Path) -> None:
    """A row for each event, with the question of `keye ground`; its videos lie in a folder of their own."""
    (media / "videos" / "didemo").mkdir(parents=True)
    (media / "a.mp4").rename(media / "videos" / "didemo" / "a.mp4")
    events = [
        {"query": "A  dog\nbarks.", "span": [[1.2345, 2.0], [0.0, 0.5]]},
        {"query": "When is it dark?", "span": [0.5, 1]},
    ]
    row = {"source": "didemo", "video_path": "didemo/a.mp4", "duration": 2.0, "events": events}
    apart = {"source": "x", "video_path": "b.mp4", "duration": 1.0, "query": "rain", "span": [[0.1, 0.2]]}
    data = open_data(write(row, "{", apart))
    assert len(data) == 4
    first, second, third, fourth = data.rows()
    assert isinstance(first, TrainingRow)
    assert isinstance(second, TrainingRow)
    assert isinstance(third, RowError)
    assert isinstance(fourth, TrainingRow)
    assert [row.messages[1].text for row in (first, second)] == ["[[0.0, 0.5], [1.2, 2.0]]", "[[0.5, 1.0]]"]
    lines = [row.messages[0].text.splitlines()[0] for row in (first, second, fourth)]
    assert lines == [
        "Find every time span of the video in which this happens: " + query
        for query in ("A dog barks", "When is it dark?", "rain")
    ]
    assert first.visuals[0].path == media / "videos" / "didemo" / "a.mp4"
    assert (first.source, second.source) == (f"{data.path}:1 event 1", f"{data.path}:1 event 2")
    assert (fourth.source, data.line(3)) == (f"{data.path}:3", 3)
    assert first.extra["duration"] == 2.0


def test_forged_rows(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", 1, 0, SceneOptions(2.0, 2.0), questions_per_clip=2)
    data = open_data(tmp_path / "set" / "data.jsonl")
    for number, line in enumerate((tmp_path / "set" / "data.jsonl").read_text().splitlines()):
        row, value = data.row(number), json.loads(line)
        assert said(row)[0] == ("user", "video:000000.mp4", value["question"])
        assert row.messages[1].text.endswith(f"</think>\n\n{value['answer']}")
        assert {**row.extra, "messages": value["messages"], "videos": value["videos"]} == value
        assert row.visuals[0].path.is_file()


def test_parquet(media: Path) -> None:
    rows = [question(images=None), question("A cat.", images=["still.png"], text="<video><image>What?")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), media / "data.parquet")
    data = open_data(media / "data.parquet")
    assert said(data.row(0)) == ASKED
    assert said(data.row(1)) == [("user", "video:a.mp4", "image:still.png", "What?"), ("assistant", "A cat.")]


def test_media_root(write: WriteRows, media: Path, tmp_path: Path) -> None:
    path = write(question())
    moved = path.rename(tmp_path / "elsewhere.jsonl")
    assert not open_data(moved).row(0).visuals[0].path.exists()
    assert open_data(moved, media_root=media).row(0).visuals[0].path == media / "a.mp4"
    with pytest.raises(UsageError, match="is not a folder"):
        open_data(moved, media_root=media / "none")


USER, ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x", "label": 1}, "the row has text, label, which is no known form: known are messages"),
        ({}, "the row has no columns at all"),
        ({"messages": [USER], "conversations": []}, "may be read as messages and conversations: say which"),
        (
            {"prompt": "x", "chosen": "y", "rejected": "z"},
            r"compares two answers \(prompt, chosen, rejected\)",
        ),
        (question(text="<video><video>What?"), "have 2 <video> placeholders, and the row names 1 video$"),
        (question(text="<video>What?", videos=[]), "have 1 <video> placeholder, and the row names 0 videos"),
        (question(text="<image>What?"), "have 0 <video> placeholders, and the row names 1 video"),
        ({"messages": [ANSWER], "videos": ["a.mp4"]}, "neither a placeholder nor a question"),
        (question(videos=[["1.jpg", "2.jpg"]]), "list of frames"),
        (question(videos=["https://x.org/a.mp4"]), "download the file"),
        (question(videos=["data:video/mp4;base64,AA"]), "spelled out inside the row"),
        (question(videos=[{"bytes": "AA"}]), "must be the path of a file"),
        (question(audios=["a.wav"]), "sound files.*take out audios"),
        (question(tools="[]"), "tools.*take out tools"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": "What?"}, "must be a list of messages"),
        ({"messages": [{"role": "user"}]}, "message 1 has no content"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "message 1 is of 'narrator'"),
        ({"messages": [USER, {**ANSWER, "loss": "yes"}]}, "a loss of 'yes'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]}, "of type 'audio'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 0}]}]},
            "fps is 0",
        ),
        (
            {
                "messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
                "videos": ["b.mp4"],
            },
            "the column of videos names others",
        ),
        ({"query": "x", "response": "y", "history": ["z"]}, r"list of \[question, answer\] pairs"),
    ],
)
def test_rows_that_are_wrong(write: WriteRows, row: dict[str, Any], words: str) -> None:
    data = open_data(write(question(), row))
    assert said(data.row(0)) == ASKED
    with pytest.raises(RowError, match=words) as raised:
        data.row(1)
    assert str(raised.value).startswith(f"{data.path}:2: ")


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"query": "x", "span": "1-2"}, 'has the span "1-2"'),
        ({"query": " . ", "span": [[0, 1]]}, "empty query"),
        ({"span": [[0, 1]]}, "must have a query"),
    ],
)
def test_events_that_are_wrong(write: WriteRows, event: dict[str, Any], words: str) -> None:
    good = {"query": "x", "span": [[0, 1]]}
    data = open_data(write({"video_path": "a.mp4", "events": [good, event]}))
    assert data.row(0).messages[1].text == "[[0.0, 1.0]]"
    with pytest.raises(RowError, match=f":1 event 2: .*{words}"):
        data.row(1)


def test_an_explicit_format_decides(write: WriteRows) -> None:
    both = {**question(), "query": "Who?", "response": "Me."}
    path = write(both)
    assert said(open_data(path, format="swift").row(0)) == ASKED
    with pytest.raises(RowError, match="known are timelens has video_path with events"):
        open_data(path, format="timelens").row(0)
    with pytest.raises(UsageError, match="no format other; known are swift, sharegpt"):
        open_data(path, format="other")


def test_a_data_file_goes_to_another_process(described: Path, write: WriteRows) -> None:
    events = [{"query": "x", "span": [[0, 1]]}, {"query": "y", "span": [[1, 2]]}]
    timed = open_data(write({"video_path": "a.mp4", "events": events}, name="timed.jsonl"))
    for data in (open_data(described / "theirs.json", dataset="theirs"), timed):
        copy = pickle.loads(pickle.dumps(data))
        assert list(copy.rows()) == list(data.rows())


def test_events_among_other_rows_are_not_lost(write: WriteRows) -> None:
    events = [{"query": "x", "span": [[0, 1]]}] * 2
    data = open_data(write(question(), {"video_path": "a.mp4", "events": events}))
    with pytest.raises(RowError, match="a file of their own"):
        data.row(1)
