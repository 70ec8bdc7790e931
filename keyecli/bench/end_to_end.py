"""A question about a long clip from the file to the first token, beside its two halves alone: decoding, and the model.

The model has the shape of the released one and random weights, the tokenizer is keye-nano's, and the clip is made here, so that
nobody needs a download. The goal: the two halves overlap, so that together they take little more than the slower one alone.
"""

from __future__ import annotations

import gc
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keyecli.bench import video
from keyecli.bench.measure import Measurement
from keyecli.bench.network import official_config, random_network
from keyecli.engine.encoded import FrameCache
from keyecli.engine.generate import GenerationSettings
from keyecli.engine.loaded import LoadedModel, choose_kv
from keyecli.engine.plan import InputPlan, gib, plan_inputs
from keyecli.engine.shared import SharedPrefix, question_tokens
from keyecli.engine.stream import group_frames
from keyecli.errors import UsageError
from keyecli.model.checkpoint import Preprocessor, load_config, load_tokenizer, resolve_model
from keyecli.video.decode import FrameChunk, decode_frames
from keyecli.video.sampling import FrameBudget, SamplingPlan, SamplingSettings
from keyecli.video.source import probe

QUESTION = "What happens?"
PART_S = 20  # of the clip that is really encoded; the rest repeats its packets
SAMPLE_S = 0.02  # between two looks at the process's memory
SPECIAL_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class Run:
    """One way from a clip to the first token: `token_ids` came after `seconds`."""

    seconds: float
    token_ids: tuple[int, ...]
    stages: dict[str, float]


def measure(hours: float = 1.0) -> Iterator[Measurement]:
    """Both halves and the whole for a clip of so many hours, 1920x1080 H.264; UsageError for no length.

    RuntimeError when two of the runs give different tokens.
    """
    if not 0 < hours < float("inf"):
        raise UsageError(f"--hours must be above 0, not {hours:g}")
    with tempfile.TemporaryDirectory(prefix="keye-bench-") as folder:
        clip = write_clip(Path(folder) / "clip.mp4", hours * 3600)
        yield from figures(
            replace(random_model(), frame_cache=FrameCache(folder=Path(folder) / "frames")), clip
        )


def random_model(quant: str | None = None, kv: str | None = None) -> LoadedModel:
    """The released shape with random weights on the GPU, which reads what keye-nano's tokenizer writes."""
    folder = resolve_model(None)
    nano, config = load_config(folder), official_config(quant)
    for name in SPECIAL_IDS:
        setattr(config, name, getattr(nano, name))
    model = random_network(config)
    for part in (model.visual, model.mlp_AR):
        part.to_empty(device="cuda")
        part.apply(model._init_weights)
    return LoadedModel(
        name="30B-A3B with random weights",
        folder=folder,
        config=config,
        preprocessor=Preprocessor(mean=(0.5,) * 3, std=(0.5,) * 3, budget=FrameBudget(), fps=2.0),
        device="cuda",
        dtype="bf16",
        kernels="triton",
        kv=choose_kv(kv),
        revision="random",
        model=model,
        tokenizer=load_tokenizer(folder),
        generation_config=None,
    )


def figures(loaded: LoadedModel, clip: Path) -> Iterator[Measurement]:
    """Decoding alone, the model alone, the first token of both together, and once more from the frames kept on disk.

    The model sees noise first, so that kernels are compiled before anything is timed. RuntimeError as in `measure`.
    """
    assert loaded.frame_cache is not None
    uncached = replace(loaded, frame_cache=None)
    item = plan_of(loaded, clip)
    to_first_token(replace(uncached, read_frames=noise), item)

    on_gpu = loaded.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    with watched_memory() as memory:
        begin = time.perf_counter()
        whole = to_first_token(loaded, plan_of(loaded, clip))
        whole_s = time.perf_counter() - begin
    peak = f", GPU {gib(torch.cuda.max_memory_allocated())}" if on_gpu else ""

    begin = time.perf_counter()
    planned = plan_of(loaded, clip)
    chunks = list(decode_frames(planned.info, planned.sampling, chunk_frames=group_frames(loaded, planned)))
    decode_s = time.perf_counter() - begin
    model = to_first_token(replace(uncached, read_frames=lambda *_, **__: (chunk for chunk in chunks)), item)

    begin = time.perf_counter()
    kept = to_first_token(loaded, plan_of(loaded, clip))
    kept_s = time.perf_counter() - begin
    for name, other in (("without decoding", model), ("from the frames kept on disk", kept)):
        if other.token_ids != whole.token_ids:
            raise RuntimeError(
                f"{name} the tokens are {other.token_ids}, and they should be {whole.token_ids}"
            )

    sampling, length = item.sampling, float(item.info.duration_s) / 3600
    frames = f"{sampling.frames} frames of {length:.2g} h"
    before, after, most = (gib(amount) for amount in memory)
    case = f"{sampling.tokens} tokens; host {before} before, {most} at most, {after} after{peak}"
    slower = max(decode_s, model.seconds)
    yield Measurement("opening and decoding alone", frames, decode_s, 0.0)
    yield Measurement("tower and prefill alone", _stages(model), model.seconds, 0.0)
    yield Measurement("first token", case, whole_s, 0.0, baseline="the slower half alone", baseline_s=slower)
    yield Measurement(
        "first token again", _stages(kept), kept_s, 0.0, baseline="the first time", baseline_s=whole_s
    )


def plan_of(loaded: LoadedModel, clip: Path) -> InputPlan:
    """Open the clip and choose its frames as a question would."""
    preprocessor = loaded.preprocessor
    (item,) = plan_inputs([probe(clip)], SamplingSettings(fps=preprocessor.fps, budget=preprocessor.budget))
    return item


def to_first_token(loaded: LoadedModel, item: InputPlan) -> Run:
    """Read, encode and prefill the frames of one input, ask a question, and wait for the first token of its answer."""
    begin = time.perf_counter()
    prefix = SharedPrefix.prefill(
        loaded,
        [item],
        question_room_tokens=question_tokens(loaded, [item], [QUESTION]),
        answer_tokens=1,
        think=False,
    )
    answer = prefix.answer(QUESTION, GenerationSettings(max_tokens=1))
    return Run(time.perf_counter() - begin, answer.token_ids, dict(prefix.timings.seconds))


def noise(info: Any, plan: SamplingPlan, *, chunk_frames: int = 16, **_: Any) -> Iterator[FrameChunk]:
    """In the place of `decode_frames`: the planned times with random pictures, which cost next to nothing."""
    frames = np.random.default_rng(0).integers(
        0, 256, (chunk_frames, plan.height, plan.width, 3), dtype=np.uint8
    )
    for begin in range(0, plan.frames, chunk_frames):
        times_s = plan.times_s[begin : begin + chunk_frames]
        yield FrameChunk(times_s, frames[: len(times_s)])


def write_clip(
    path: Path, seconds: float, *, size: tuple[int, int] | None = None, part_s: int = PART_S
) -> Path:
    """H.264 of `part_s` seconds of moving pictures, repeated packet by packet at later times until it is so long."""
    import av

    part = video.write_clip(path.with_name("part.mp4"), "h264", frames=part_s * video.RATE, size=size)
    with av.open(str(part)) as source, av.open(str(path), "w") as container:
        track = source.streams.video[0]
        stream = container.add_stream_from_template(track)
        time_base = track.time_base or Fraction(1, video.RATE)
        packets = [packet for packet in source.demux(track) if packet.size]
        places = [(packet.pts or 0, packet.dts or 0) for packet in packets]
        for number in range(max(1, round(seconds / part_s))):
            shift = round(number * part_s / time_base)
            for packet, (pts, dts) in zip(packets, places, strict=True):
                packet.stream, packet.time_base = stream, time_base
                packet.pts, packet.dts = pts + shift, dts + shift
                container.mux(packet)
    part.unlink()
    return path


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Bytes of this process's memory before the block, after it, and at most inside it; there when it has ended."""
    found = [_resident_bytes()]
    seen, stop = list(found), threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_S):
            seen.append(_resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()
        found += [_resident_bytes(), max(seen)]


def _resident_bytes() -> int:
    """0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def _stages(run: Run) -> str:
    return ", ".join(f"{name.removesuffix('_s')} {seconds:.2f} s" for name, seconds in run.stages.items())
