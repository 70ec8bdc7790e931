"""The cache of encoded frames: the same tokens as without it, nothing decoded, and whatever is wrong with it is a miss."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keyecli.engine import encoded, framestore, stream
from keyecli.engine.encoded import FrameCache
from keyecli.engine.framestore import DESCRIPTION, Entry
from keyecli.engine.loaded import LoadedModel
from keyecli.engine.plan import InputPlan
from keyecli.engine.stream import StreamSettings
from keyecli.errors import InputError, KeyeWarning
from keyecli.session import Keye, load
from tests.video.conftest import write_clip

ANSWER = {"max_tokens": 8, "think": False, "fps": 5}
pytestmark = pytest.mark.filterwarnings("ignore:the answer was cut off")


@pytest.fixture(scope="module")
def keye(tiny_checkpoint: Path) -> Keye:
    return load(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def made_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("encoded") / "clip.mp4", 76)


@pytest.fixture
def clip(made_clip: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made_clip, tmp_path / "clip.mp4"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded, as they are."""
    names: list[str] = []
    decode = stream.decode_frames

    def note(info: Any, *arguments: Any, **options: Any) -> Any:
        names.append(info.path.name)
        return decode(info, *arguments, **options)

    monkeypatch.setattr(stream, "decode_frames", note)
    return names


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read to know their content."""
    names: list[str] = []

    def sha256(*content: bytes) -> Any:
        if not content:
            names.append("file")
        return hashlib.sha256(*content)

    monkeypatch.setattr(framestore, "hashlib", SimpleNamespace(sha256=sha256))
    return names


def told(answer: Any) -> dict[str, Any]:
    return {name: value for name, value in answer.to_dict().items() if name != "timings"}


def entries(keye: Keye) -> list[Entry]:
    assert keye.loaded.frame_cache is not None
    return keye.loaded.frame_cache.entries()


def leftovers(own_cache: Path) -> list[str]:
    return [path.name for path in (own_cache / "frames").glob("unfinished-*")]


def without_cache(keye: Keye) -> Keye:
    return Keye(replace(keye.loaded, frame_cache=None))


def test_the_second_answer_is_the_first_without_decoding(
    keye: Keye, clip: Path, decoded: list[str], own_cache: Path
) -> None:
    expected = without_cache(keye).ask(clip, "What?", **ANSWER)
    assert decoded.pop() == "clip.mp4"
    assert not own_cache.exists()
    first = keye.ask(clip, "What?", **ANSWER)
    assert decoded == ["clip.mp4"]
    second = keye.ask(clip, "What?", **ANSWER)
    assert decoded == ["clip.mp4"]
    assert told(first) == told(second) == told(expected)
    assert "cache_s" not in first.timings
    assert second.timings["cache_s"] > 0 == second.timings["decode_s"] == second.timings["encode_s"]
    (entry,) = entries(keye)
    assert (entry.clip, entry.frames, entry.tokens) == ("clip.mp4", 16, first.inputs[0].tokens)
    assert leftovers(own_cache) == []


@pytest.mark.parametrize("shard_bytes", [1, 9000, 2**24])
def test_embeddings_come_back_bit_for_bit(
    keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(encoded, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(stream, "StreamSettings", lambda: StreamSettings(group_patches=48))
    seen: list[list[torch.Tensor]] = [[], []]
    add = stream.PromptFeeder.add
    for run in seen:
        monkeypatch.setattr(
            stream.PromptFeeder, "add", lambda self, embeds, run=run: (run.append(embeds), add(self, embeds))
        )
        keye.ask(clip, "What?", **ANSWER)
    first, second = map(torch.cat, seen)
    assert torch.equal(first, second)
    assert len(list(entries(keye)[0].folder.glob("*.safetensors"))) == {1: 16, 9000: 6, 2**24: 1}[shard_bytes]


def test_a_search_profits_too(keye: Keye, clip: Path, decoded: list[str]) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "think": False, "refine": False}
    expected = told(without_cache(keye).ground(clip, "a bar", **options))
    assert told(keye.ground(clip, "a bar", **options)) == expected
    decoded.clear()
    assert told(keye.ground(clip, "a bar", **options)) == expected
    assert decoded == []


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"fps": 2}, False),
        ({"exact_resize": True}, False),
        ({"start": 1.0}, False),
        ({"max_frames": 3}, False),
        ({"max_pixels": 28 * 28 * 6}, False),
        ({"seed": 7, "temperature": 0.5}, True),
        ({"strict": True}, True),
    ],
)
def test_what_makes_another_entry(
    keye: Keye, clip: Path, decoded: list[str], changed: dict[str, Any], same: bool
) -> None:
    keye.ask(clip, "What?", **ANSWER)
    keye.ask(clip, "Who?", **{**ANSWER, **changed})
    assert len(decoded) == len(entries(keye)) == 2 - same


def test_other_weights_and_types_are_other_entries(keye: Keye, clip: Path, decoded: list[str]) -> None:
    keye.ask(clip, "What?", **ANSWER)
    preprocessor = replace(keye.preprocessor, mean=(0.4, 0.5, 0.5))
    for change in (
        {"revision": "another"},
        {"dtype": "bf16"},
        {"kernels": "triton"},
        {"preprocessor": preprocessor},
    ):
        other = replace(keye.loaded, **change)
        item = stream_item(keye, clip)
        assert keye.loaded.frame_cache is not None
        assert keye.loaded.frame_cache.holds(keye.loaded, item, False)
        assert not keye.loaded.frame_cache.holds(other, item, False)


def stream_item(keye: Keye, clip: Path) -> Any:
    return keye.plan(clip, "What?", **ANSWER).inputs[0]


def test_the_same_content_elsewhere_is_found_and_another_is_not(
    keye: Keye, clip: Path, decoded: list[str], hashed: list[str], tmp_path: Path
) -> None:
    keye.ask(clip, "What?", **ANSWER)
    assert len(hashed) == 1
    keye.ask(clip, "What?", **ANSWER)
    assert len(hashed) == 1  # unchanged, so not read again
    moved = Path(shutil.copy(clip, tmp_path / "other.mp4"))
    answer = keye.ask(moved, "What?", **ANSWER)
    assert (len(decoded), len(hashed)) == (1, 2)
    assert answer.inputs[0].path == str(moved)

    status = clip.stat()
    content = bytearray(clip.read_bytes())
    content[-5] ^= 1  # in a box behind the pictures
    clip.write_bytes(content)
    os.utime(clip, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    keye.ask(clip, "What?", **ANSWER)
    assert (len(decoded), len(hashed)) == (2, 3)
    assert len(entries(keye)) == 2


def test_several_inputs_have_an_entry_each(
    keye: Keye, clip: Path, decoded: list[str], tmp_path: Path
) -> None:
    other = write_clip(tmp_path / "b.mp4", 26)
    expected = told(without_cache(keye).ask([clip, other], "What?", **ANSWER))
    decoded.clear()
    keye.ask(other, "What?", **ANSWER)
    sampled = stream_item(keye, other).sampling
    assert decoded == ["b.mp4"]
    assert told(keye.ask([clip, other], "What?", **ANSWER)) == expected
    both = keye.plan([clip, other], "What?", **ANSWER).inputs[1].sampling
    assert decoded == ["b.mp4", "clip.mp4"] + ["b.mp4"] * (both != sampled)
    decoded.clear()
    assert told(keye.ask([clip, other], "What?", **ANSWER)) == expected
    assert decoded == []


def damage_bytes(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)


def cut_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-3])


def lose_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def spoil_description(folder: Path) -> None:
    (folder / DESCRIPTION).write_text('{"shards": [{}]}')


def empty_description(folder: Path) -> None:
    (folder / DESCRIPTION).write_bytes(b"")


@pytest.mark.parametrize("harm", [damage_bytes, cut_shard, lose_shard, spoil_description, empty_description])
def test_a_damaged_entry_is_a_miss_and_made_again(
    keye: Keye, clip: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(encoded, "SHARD_BYTES", 1)
    monkeypatch.setattr(stream, "StreamSettings", lambda: StreamSettings(group_patches=48))
    fresh = Keye(replace(keye.loaded, frame_cache=FrameCache()))
    expected = told(fresh.ask(clip, "What?", **ANSWER))
    harm(entries(fresh)[0].folder)
    with pytest.warns(KeyeWarning, match=r"the encoded frames of clip\.mp4 are damaged in the cache"):
        assert told(fresh.ask(clip, "What?", **ANSWER)) == expected
    assert len(decoded) == 2
    while not entries(fresh):  # where some of it could be used, the run after that makes it
        assert len(decoded) == 2
        fresh.ask(clip, "What?", **ANSWER)
    decoded.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", KeyeWarning)
        warnings.filterwarnings("ignore", message="the answer was cut off")
        assert told(fresh.ask(clip, "What?", **ANSWER)) == expected
    assert decoded == []


def test_an_entry_that_goes_while_it_is_read(
    keye: Keye, clip: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "SHARD_BYTES", 1)
    monkeypatch.setattr(stream, "StreamSettings", lambda: StreamSettings(group_patches=48))
    expected = told(keye.ask(clip, "What?", **ANSWER))
    find = FrameCache.find

    def evicted(self: FrameCache, *arguments: Any) -> Iterator[Any]:
        for number, group in enumerate(find(self, *arguments) or ()):
            yield group
            if number == 2:
                self.remove(self.entries()[0].folder)

    monkeypatch.setattr(FrameCache, "find", evicted)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KeyeWarning)
        warnings.filterwarnings("ignore", message="the answer was cut off")
        assert told(keye.ask(clip, "What?", **ANSWER)) == expected
    assert len(decoded) == 2


def test_damaged_and_cut_off_clips_are_not_kept(keye: Keye, tmp_path: Path, own_cache: Path) -> None:
    whole = write_clip(tmp_path / "whole.mkv", 76, options={"g": "25"}).read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    harmed = tmp_path / "harmed.mkv"
    harmed.write_bytes(whole[: len(whole) // 2] + bytes(400) + whole[len(whole) // 2 + 400 :])
    for path in (cut, harmed):
        for _ in range(2):  # each run says it
            with pytest.warns(KeyeWarning, match="is cut off|is damaged"):
                keye.ask(path, "What?", **{**ANSWER, "fps": 25})
    assert entries(keye) == []
    assert leftovers(own_cache) == []


@pytest.mark.parametrize("stage", ["decode_frames", "frames_to_patches", "progress"])
@pytest.mark.parametrize("error", [InputError("broken"), KeyboardInterrupt()])
def test_an_interrupted_run_leaves_nothing(
    keye: Keye,
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_cache: Path,
    stage: str,
    error: BaseException,
) -> None:
    monkeypatch.setattr(encoded, "SHARD_BYTES", 1)
    monkeypatch.setattr(stream, "StreamSettings", lambda: StreamSettings(group_patches=48))
    calls = 0

    def fail_at_third(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error

    if stage == "decode_frames":
        decode = stream.decode_frames

        def failing(*arguments: Any, **options: Any) -> Iterator[Any]:
            for chunk in decode(*arguments, **options):
                fail_at_third()
                yield chunk

        monkeypatch.setattr(stream, "decode_frames", failing)
    elif stage == "frames_to_patches":
        prepare = stream.frames_to_patches
        monkeypatch.setattr(
            stream, "frames_to_patches", lambda *arguments: (fail_at_third(), prepare(*arguments))[1]
        )
    with pytest.raises(type(error)) as raised:
        keye.ask(clip, "What?", on_progress=fail_at_third if stage == "progress" else None, **ANSWER)
    assert raised.value is error
    assert entries(keye) == []
    assert leftovers(own_cache) == []


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    decode = stream.decode_frames

    def touched(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield from decode(*arguments, **options)
        os.utime(clip, ns=(1, 1))

    monkeypatch.setattr(stream, "decode_frames", touched)
    keye.ask(clip, "What?", **ANSWER)
    assert entries(keye) == []
    assert leftovers(own_cache) == []


def test_a_huge_file_of_which_little_is_read_is_not_waited_for(
    keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    def slow(cache: FrameCache, state: Any, stop: threading.Event) -> None:
        assert stop.wait(60)

    monkeypatch.setattr(encoded, "PATIENCE_S", 0.05)
    monkeypatch.setattr(FrameCache, "content_of", slow)
    begin = time.monotonic()
    keye.ask(clip, "What?", **ANSWER)
    assert time.monotonic() - begin < 50
    assert entries(keye) == []
    assert leftovers(own_cache) == []


def test_the_least_recently_used_goes(keye: Keye, clip: Path, decoded: list[str]) -> None:
    keye.ask(clip, "What?", **ANSWER)
    size = entries(keye)[0].bytes
    small = Keye(replace(keye.loaded, frame_cache=FrameCache(limit_bytes=int(size * 2.5))))
    for number, seed in enumerate((5, 6, 7), 1):
        options = {**ANSWER, "fps": 5, "start": number / 100}
        small.ask(clip, "What?", **{**options, "seed": seed})
        if number == 1:
            small.ask(clip, "What?", **ANSWER)  # used again
        for age, entry in enumerate(entries(small)):
            os.utime(entry.folder, (10**9 - age, 10**9 - age))
    left = entries(small)
    assert len(left) == 2
    decoded.clear()
    small.ask(clip, "What?", **{**ANSWER, "start": 0.03})
    assert decoded == []
    tiny = Keye(replace(keye.loaded, frame_cache=FrameCache(limit_bytes=size // 2)))
    tiny.ask(clip, "What?", **{**ANSWER, "start": 0.05})  # more than there is room for: nothing is written
    assert len(entries(small)) == 2


def test_a_folder_that_cannot_be_written(keye: Keye, clip: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    cached = Keye(replace(keye.loaded, frame_cache=FrameCache(folder=blocked / "frames")))
    expected = told(without_cache(keye).ask(clip, "What?", **ANSWER))
    with pytest.warns(
        KeyeWarning, match=r"encoded frames cannot be kept in .*\(Not a directory\).*--no-cache"
    ):
        assert told(cached.ask(clip, "What?", **ANSWER)) == expected
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KeyeWarning)
        cached.ask(clip, "What?", **ANSWER)
    assert not any("cannot be kept" in str(item.message) for item in caught)


def test_what_a_killed_process_left_goes_after_a_day(keye: Keye, clip: Path, own_cache: Path) -> None:
    old, young = (own_cache / "frames" / f"unfinished-{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "00000.safetensors").write_bytes(b"half")
    os.utime(old, (0, 0))
    keye.ask(clip, "What?", **ANSWER)
    assert not old.exists()
    assert young.exists()
    assert len(entries(keye)) == 1


def exercise(loaded: LoadedModel, items: Sequence[InputPlan], limit: int) -> None:
    """Look entries up and make them, all with numbers of their own; AssertionError where one holds others."""
    cache = FrameCache(limit_bytes=limit)
    for number in range(60):
        which = number * 7 % len(items)
        item = items[which]
        stored = cache.find(loaded, item, False)
        tokens = item.sampling.tokens_per_frame
        for frames, embeds in stored or ():
            assert embeds.shape[0] == frames * tokens
            assert bool((embeds == which).all())
        if stored is None:
            with cache.recorder([item]) as recorder:
                draft = recorder.draft(loaded, item, False)
                assert draft is not None
                for _ in range(item.sampling.frames):
                    draft.add(1, torch.full((tokens, loaded.config.hidden_size), float(which)))
                recorder.keep()
    assert cache._complaint is None


def test_several_at_once(keye: Keye, clip: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # They share nothing but the folder, as processes do.
    monkeypatch.setattr(encoded, "SHARD_BYTES", 4096)
    items = [keye.plan(clip, "What?", **{**ANSWER, "start": number / 25}).inputs[0] for number in range(4)]
    limit = 2 * items[0].sampling.tokens * 64 * 4 + 4096  # so that they evict each other's
    with ThreadPoolExecutor(4) as users:
        for done in [users.submit(exercise, keye.loaded, items, limit) for _ in range(4)]:
            done.result()
    assert leftovers(own_cache) == []
    assert 0 < len(entries(keye)) <= 4
