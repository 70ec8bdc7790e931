"""Frames that other processes decode ahead are the frames, whatever happens to these processes; memory is bounded."""

from __future__ import annotations

import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from keyecli.engine import stream
from keyecli.engine.encoded import FrameCache
from keyecli.engine.plan import InputPlan, plan_inputs
from keyecli.engine.stream import group_frames
from keyecli.errors import InputError, KeyeError, KeyeWarning
from keyecli.session import Keye, load
from keyecli.tasks.options import ask_settings
from keyecli.training import decoders, frames
from keyecli.training.frames import DecodePool, RowFrames, needs_decoding
from keyecli.video.decode import FrameChunk, decode_frames
from keyecli.video.sampling import SamplingSettings
from keyecli.video.source import VideoInfo, probe
from tests.video.conftest import numbered_picture, write_clip
from tests.video.movies import write_movie

CIRCLE = Path(__file__).parents[2] / "examples" / "clips" / "red-circle.mp4"


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three of one to two seconds, one with B-frames and turned, and the example."""
    folder = tmp_path_factory.mktemp("rows")
    paths = [write_clip(folder / f"{name}.mp4", count) for name, count in (("a", 26), ("b", 51))]
    write_movie(folder / "c.mkv", 30, sound=None, rotation=90)
    return [*paths, folder / "c.mkv", CIRCLE]


def plans_of(*paths: Path, fps: float = 25) -> tuple[InputPlan, ...]:
    return plan_inputs([probe(path) for path in paths], SamplingSettings(fps=fps, max_frames=40))


def in_process(plans: Iterable[InputPlan], chunk_frames: int = 16) -> list[FrameChunk]:
    return [
        chunk
        for item in plans
        for chunk in decode_frames(item.info, item.sampling, chunk_frames=chunk_frames)
    ]


def assert_same(found: Iterable[FrameChunk], expected: Sequence[FrameChunk]) -> None:
    found = list(found)
    assert [chunk.times_s for chunk in found] == [chunk.times_s for chunk in expected]
    for chunk, other in zip(found, expected, strict=True):
        assert chunk.frames.flags.c_contiguous
        assert chunk.frames.flags.writeable
        assert np.array_equal(chunk.frames, other.frames)


def wait_for(pool: DecodePool, condition: Callable[[], object]) -> None:
    with pool._changed:
        assert pool._changed.wait_for(condition, timeout=60)


def kill_worker(pool: DecodePool) -> None:
    """Kill the only worker of a pool; returns when it is gone."""
    (process_id,) = pool.process_ids
    os.kill(process_id, signal.SIGKILL)
    wait_until_gone([process_id])


def wait_until_gone(process_ids: Iterable[int]) -> None:
    for process_id in process_ids:
        try:
            descriptor = os.pidfd_open(process_id)
        except ProcessLookupError:
            continue
        try:
            assert select.select([descriptor], [], [], 60)[0], "the process does not end"
        finally:
            os.close(descriptor)


def is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def bytes_of_frame(item: InputPlan) -> int:
    return item.sampling.height * item.sampling.width * 3


def hanging(path: Path) -> InputPlan:
    """A clip that has become a pipe since it was planned: whoever reads it waits until somebody writes."""
    (item,) = plans_of(write_clip(path))
    path.unlink()
    os.mkfifo(path)
    return item


def noting_decoder(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded in this process from now on."""
    noted: list[str] = []
    decode = decoders.decode_frames

    def noting(info: VideoInfo, *arguments: Any, **options: Any) -> Iterator[FrameChunk]:
        noted.append(info.path.name)
        return decode(info, *arguments, **options)

    for module in (decoders, stream):
        monkeypatch.setattr(module, "decode_frames", noting)
    return noted


@pytest.fixture
def left_behind() -> Callable[[], set[Path]]:
    """What is new in the folders of shared memory and of temporary files."""

    def names() -> set[Path]:
        return {path for folder in ("/dev/shm", tempfile.gettempdir()) for path in Path(folder).iterdir()}

    before = names()
    return lambda: {path for path in names() - before if re.match("keye|psm|tmp.*frames", path.name)}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_frames_are_the_frames(clips: list[Path], tmp_path: Path, workers: int) -> None:
    picture = tmp_path / "picture.png"
    PIL.Image.fromarray(numbered_picture(5)).save(picture)
    rows = [plans_of(*clips), plans_of(picture), (), plans_of(*clips[1:3], clips[1])]
    with DecodePool(workers) as pool:
        for key, plans in enumerate(rows):
            pool.request(key, plans, [3] * len(plans))
        for key, plans in enumerate(rows):
            assert_same(pool.frames(key), in_process(plans, 3))
        assert pool.waiting_bytes == 0
        assert len(pool.process_ids) == workers


def test_options_go_to_the_workers(clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (item,) = plans_of(clips[0])
    options = {"exact_resize": True, "strict": True}
    expected = list(decode_frames(item.info, item.sampling, **options))
    assert not np.array_equal(expected[0].frames, in_process([item])[0].frames)
    with DecodePool(1, **options) as pool:
        pool.request("row", [item])
        noted = noting_decoder(monkeypatch)
        assert_same(pool.reader("row")(item.info, item.sampling, **options), expected)
        assert not noted


@pytest.mark.parametrize("room_chunks", [1, 9])
def test_what_waits_is_bounded(clips: list[Path], room_chunks: int) -> None:
    rows = {number: plans_of(path) for number, path in enumerate([*clips[:2], clips[0]])}
    chunk_bytes = 2 * bytes_of_frame(rows[0][0])
    with DecodePool(2, ahead_bytes=room_chunks * chunk_bytes) as pool:
        for key, plans in rows.items():
            pool.request(key, plans, [2])
        wait_for(pool, lambda: len(pool._held_up) == 2)  # without anybody taking frames
        assert pool.waiting_bytes == room_chunks * 3 // 4 * chunk_bytes
        for key, plans in rows.items():
            assert_same(pool.frames(key), in_process(plans, 2))
        assert pool.most_waiting_bytes <= max(1, room_chunks) * chunk_bytes


def test_rows_that_nobody_takes_hold_up_nobody(clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plans = plans_of(*clips[:2])
    with DecodePool(1, ahead_bytes=4 * bytes_of_frame(plans[0])) as pool:
        for key in ("passed over", "wanted", "forgotten", "last"):
            pool.request(key, plans, [1, 1])
        wait_for(pool, lambda: pool._held_up)
        read = pool.reader("wanted")
        for item in reversed(plans):
            assert_same(read(item.info, item.sampling, chunk_frames=1), in_process([item], 1))
        pool.forget("passed over")
        pool.forget("forgotten")
        noted = noting_decoder(monkeypatch)
        assert_same(pool.frames("last"), in_process(plans, 1))
        assert not noted


@pytest.mark.parametrize("taken", [0, 20])
def test_a_killed_worker_neither_drops_nor_repeats_frames(
    clips: list[Path], taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = plans_of(*clips[:2])
    with DecodePool(1, ahead_bytes=4 * bytes_of_frame(plans[0])) as pool:
        pool.request("row", plans, [1, 1])
        pool.request("next", plans[:1])
        chunks = pool.frames("row")
        found = [next(chunks) for _ in range(taken)]
        wait_for(pool, lambda: pool._held_up)
        kill_worker(pool)
        noted = noting_decoder(monkeypatch)
        assert_same([*found, *chunks], in_process(plans, 1))
        assert_same(pool.frames("next"), in_process(plans[:1]))
        assert not noted


def test_killing_at_random_moments(clips: list[Path]) -> None:
    plans, draw = plans_of(*clips[:2]), random.Random(0)
    expected = in_process(plans, 2)
    with DecodePool(2, ahead_bytes=6 * bytes_of_frame(plans[0])) as pool:
        for key in range(4):
            pool.request(key, plans, [2, 2])
        for key in range(4):
            kill_before = draw.randrange(len(expected))
            found = []
            for chunk in pool.frames(key):
                if len(found) == kill_before:
                    wait_for(pool, lambda: pool.process_ids)
                    with suppress(ProcessLookupError):
                        os.kill(draw.choice(pool.process_ids), signal.SIGKILL)
                found.append(chunk)
            assert_same(found, expected)


def test_an_input_that_ends_its_workers_is_refused(clips: list[Path], tmp_path: Path) -> None:
    broken = hanging(tmp_path / "broken.mp4")
    with DecodePool(1) as pool:
        pool.request("bad", [broken])
        pool.request("good", plans_of(clips[0]))
        with ExitStack() as writers:
            for _ in range(1 + frames.MOST_RETRIES):
                writers.enter_context(broken.info.path.open("wb"))  # once a worker is reading it
                kill_worker(pool)
        with pytest.raises(InputError, match=r"broken\.mp4 cannot be decoded, 4 processes .*SIGKILL"):
            list(pool.frames("bad"))
        assert_same(pool.frames("good"), in_process(plans_of(clips[0])))


def test_a_decoder_that_never_comes_back(clips: list[Path], tmp_path: Path) -> None:
    slow = hanging(tmp_path / "slow.mp4")
    with DecodePool(1, timeout_s=2) as pool:
        pool.request("bad", [slow])
        pool.request("good", plans_of(clips[0]))
        wait_for(pool, lambda: pool.process_ids)
        first = pool.process_ids
        with pytest.raises(InputError, match=r"slow\.mp4 gives no frames within 2 s"):
            list(pool.frames("bad"))
        assert_same(pool.frames("good"), in_process(plans_of(clips[0])))
        assert pool.process_ids != first
        wait_until_gone(first)


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_cannot_be_read(clips: list[Path], tmp_path: Path, workers: int) -> None:
    gone, text, good = (tmp_path / f"{name}.mp4" for name in ("gone", "text", "good"))
    for path in (gone, text, good):
        shutil.copy(clips[0], path)
    rows = {path.stem: plans_of(good, path) for path in (gone, text, good)}
    gone.unlink()
    text.write_text("not a video")
    with DecodePool(workers) as pool:
        for key, plans in rows.items():
            pool.request(key, plans)
        for key in ("gone", "text"):
            found: list[FrameChunk] = []
            with pytest.raises(InputError, match=rf"{key}\.mp4"):
                found += pool.frames(key)
        assert_same(pool.frames("good"), in_process(rows["good"]))


def test_what_a_decoder_raises_is_an_error_of_the_file(clips: list[Path]) -> None:
    (item,) = plans_of(clips[0])
    other = replace(item, sampling=replace(item.sampling, times_s=(Fraction(1, 7),)))
    with DecodePool(1) as pool:
        pool.request("row", [other])
        with pytest.raises(InputError, match=r"a\.mp4 cannot be decoded \(ValueError: the plan names times"):
            list(pool.frames("row"))


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_told_once_where_the_frames_are_taken(tmp_path: Path, workers: int) -> None:
    whole = write_clip(tmp_path / "whole.mkv", 51).read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    plans = plans_of(cut)
    with warnings.catch_warnings(record=True) as expected:
        warnings.simplefilter("always")
        chunks = in_process(plans, 1)
    with DecodePool(workers, ahead_bytes=2 * bytes_of_frame(plans[0])) as pool:
        pool.request("row", plans, [1])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            taking = pool.frames("row")
            found = [next(taking)]
            if workers:
                kill_worker(pool)  # the next one meets the same damage
            found += taking
        assert_same(found, chunks)
    assert [str(item.message) for item in caught] == [str(item.message) for item in expected]
    assert {item.category for item in caught} == {KeyeWarning}


@pytest.mark.parametrize("workers", [0, 1])
def test_the_reader_serves_what_was_requested_and_decodes_the_rest(
    clips: list[Path], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = plans_of(*clips[:2])
    with DecodePool(workers) as pool:
        pool.request("row", [first], [4])
        read = pool.reader("row")
        noted = noting_decoder(monkeypatch)
        assert_same(read(first.info, first.sampling, chunk_frames=7), in_process([first], 7))
        assert noted == (["a.mp4"] if not workers else [])
        assert_same(read(first.info, first.sampling, chunk_frames=7), in_process([first], 7))
        assert_same(read(second.info, second.sampling), in_process([second]))
        assert noted[-2:] == ["a.mp4", "b.mp4"]


def test_a_reader_that_is_closed_early_frees_what_waits(clips: list[Path]) -> None:
    with DecodePool(1) as pool:
        pool.request("row", plans_of(clips[1]), [2])
        pool.request("next", plans_of(clips[0]))
        (item,) = plans_of(clips[1])
        with closing(pool.reader("row")(item.info, item.sampling, chunk_frames=2)) as chunks:
            next(chunks)
        assert_same(pool.frames("next"), in_process(plans_of(clips[0])))
        assert pool.waiting_bytes == 0


def test_nothing_is_left_behind(clips: list[Path], left_behind: Callable[[], set[Path]]) -> None:
    pool = DecodePool(2, ahead_bytes=2**20)

    def stumble() -> None:
        with pool:
            for key in range(4):
                pool.request(key, plans_of(*clips[:2]), [1, 1])
            next(pool.frames(0))
            wait_for(pool, lambda: len(pool._held_up) == 2)
            ids.extend(pool.process_ids)
            raise ZeroDivisionError

    ids: list[int] = []
    with pytest.raises(ZeroDivisionError):
        stumble()
    assert len(ids) == 2
    assert not any(is_running(process_id) for process_id in ids)
    assert not left_behind()
    assert (pool.waiting_bytes, pool.process_ids) == (0, ())
    with pytest.raises(ValueError, match="closed"):
        pool.request("more", [])


PARENT = """
import sys
from keyecli.engine.plan import plan_inputs
from keyecli.training.frames import DecodePool
from keyecli.video.sampling import SamplingSettings
from keyecli.video.source import probe
with DecodePool(2, ahead_bytes=2**20) as pool:
    for key in range(4):
        pool.request(key, plan_inputs([probe(sys.argv[1])], SamplingSettings(fps=25)), [1])
    with pool._changed:
        pool._changed.wait_for(lambda: len(pool._held_up) == 2)
    print(*pool.process_ids, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_quietly_with_their_parent(
    clips: list[Path], how: signal.Signals, left_behind: Callable[[], set[Path]]
) -> None:
    command = [sys.executable, "-c", PARENT, str(clips[1])]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        ids = [int(word) for word in parent.stdout.readline().split()]
        assert len(ids) == 2
        assert parent.pid not in map(os.getpgid, ids)  # so that Ctrl-C does not reach them
        if how == signal.SIGINT:
            os.killpg(parent.pid, how)  # as a terminal does
        else:
            parent.kill()
        _, errors = parent.communicate()
    wait_until_gone(ids)
    told = ["KeyboardInterrupt"] if how == signal.SIGINT else []
    assert [line for line in errors.splitlines() if line and line[0].isupper()][-1:] == told
    assert errors.count("Traceback") == len(told)
    assert not left_behind()


def test_workers_that_cannot_start(clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_SERVE", "raise SystemExit(7)")
    with DecodePool(1) as pool:
        pool.request("row", plans_of(clips[0]))
        with pytest.raises(KeyeError, match=r"cannot be started \(exit code 7\)"):
            list(pool.frames("row"))


def test_a_worker_imports_no_torch() -> None:
    script = (
        "import sys; from keyecli.training.decoders import preload; preload(); "
        "print('av' in sys.modules, 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("depth", [0, 2])
def test_rows_come_in_order_and_are_decoded_ahead(
    tiny_checkpoint: Path, clips: list[Path], depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(tiny_checkpoint, device="cpu").loaded
    rows = [(path.name, plans_of(path)) for path in [clips[0], clips[1], clips[0], clips[0]]]
    noted = noting_decoder(monkeypatch)
    asked: list[str] = []

    def source() -> Iterator[tuple[str, Sequence[InputPlan]]]:
        for row in rows:
            asked.append(row[0])
            yield row

    with DecodePool(1) as pool:
        came = []
        for key, plans, read in RowFrames(pool, loaded).ahead(source(), depth):
            assert len(asked) == min(len(rows), len(came) + 1 + depth)
            (item,) = plans
            size = group_frames(loaded, item)
            assert_same(read(item.info, item.sampling, chunk_frames=size), in_process(plans, size))
            came.append(key)
        assert came == asked == [key for key, _ in rows]
        assert not noted
        assert not pool._rows


def test_rows_that_are_left_early_leave_nothing(tiny_checkpoint: Path, clips: list[Path]) -> None:
    loaded = load(tiny_checkpoint, device="cpu").loaded
    with DecodePool(1) as pool:
        ahead = RowFrames(pool, loaded).ahead(((n, plans_of(clips[0])) for n in range(9)), 3)
        assert next(ahead)[0] == 0
        assert len(pool._rows) == 4
        ahead.close()
        assert not pool._rows
        assert not pool._queue


@pytest.mark.filterwarnings("ignore:the answer was cut off")
def test_the_model_sees_the_same_and_what_is_kept_encoded_is_not_decoded(
    tiny_checkpoint: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    keye = load(tiny_checkpoint, device="cpu")
    settings = ask_settings(keye.loaded.preprocessor, fps=25).sampling
    rows = [(path, plan_inputs([probe(path)], settings)) for path in [*clips[:2], *clips[:2]]]
    expected = {path: keye.ask(path, "What?", fps=25, max_tokens=4).text for path in clips[:2]}
    loaded = replace(keye.loaded, frame_cache=FrameCache(folder=clips[0].parent / "kept"))
    assert needs_decoding(loaded, rows[0][1])
    noted = noting_decoder(monkeypatch)
    requested: list[int] = []
    with DecodePool(1) as pool:
        request = pool.request
        monkeypatch.setattr(
            pool,
            "request",
            lambda key, plans, sizes: (requested.append(len(plans)), request(key, plans, sizes)),
        )
        for path, _, read in RowFrames(pool, loaded).ahead(iter(rows), 0):
            seeing = Keye(replace(loaded, read_frames=read))
            assert seeing.ask(path, "What?", fps=25, max_tokens=4).text == expected[path]
    assert requested == [1, 1, 0, 0]
    assert not noted
    assert not needs_decoding(loaded, [*rows[0][1], *rows[1][1]])
    assert needs_decoding(loaded, [*rows[0][1], *plans_of(clips[2])])
