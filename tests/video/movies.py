"""Clips with sound and subtitles: every frame says its number, the sound is noise that fits in one place only."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.video.conftest import numbered_picture

RATE = 25
_BLOCK = 1024
Cue = tuple[float, float, str]  # begin and end in seconds, text


def noise(samples: int) -> np.ndarray:
    """float32 [samples], always the same, band-limited so that lossy codecs keep its shape."""
    window = np.hanning(24)
    white = np.random.default_rng(0).standard_normal(samples)
    return (2 * np.convolve(white, window / window.sum(), "same")).clip(-0.9, 0.9).astype(np.float32)


def write_movie(
    path: Path,
    frames: int = 100,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    sound: str | None = "aac",
    sound_rate: int = 48_000,
    layout: str = "stereo",
    silent: tuple[float, float] | None = None,
    cues: Sequence[Cue] = (),
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
) -> np.ndarray:
    """Write a clip at 25 frames a second with keyframes every 20 frames and B-frames; returns its sound, one channel.

    No sound packets are written for the times in `silent`.
    """
    samples = noise(frames * sound_rate // RATE)
    packets: list[Any] = []
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream(
            codec, rate=RATE, options=options or {"g": "20", "bf": "2", "sc_threshold": "0"}
        )
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        if pixel_aspect:
            video.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation:
            video.set_display_rotation(-rotation)
        audio: Any = None
        if sound:
            audio = container.add_stream(sound, rate=sound_rate, layout=layout)
            audio.metadata["language"] = "deu"
            if not sound.startswith("pcm"):
                audio.bit_rate = 96_000 * audio.channels
        text: Any = None
        if cues:
            text = container.add_mux_stream("subrip" if path.suffix == ".mkv" else "mov_text")
            text.time_base, text.metadata["language"] = Fraction(1, 1000), "fra"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered_picture(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            packets += video.encode(frame.reformat(format="yuv420p"))
        packets += video.encode()
        if audio is not None:
            packets += _sound_packets(audio, samples, sound_rate, layout, silent)
        packets += [_cue_packet(cue, text, path.suffix) for cue in cues]
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            container.mux(packet)
    return samples


def _sound_packets(
    audio: Any, samples: np.ndarray, rate: int, layout: str, silent: tuple[float, float] | None
) -> list[Any]:
    packets = []
    for begin in range(0, len(samples), _BLOCK):
        block = np.stack([samples[begin : begin + _BLOCK]] * audio.channels)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
        packets += audio.encode(frame)
    packets += audio.encode(None)
    if silent is None:
        return packets
    return [p for p in packets if not silent[0] <= p.pts * p.time_base < silent[1]]


def _cue_packet(cue: Cue, stream: Any, suffix: str) -> Any:
    begin_s, end_s, words = cue
    data = words.encode()
    packet: Any = av.Packet(data if suffix == ".mkv" else len(data).to_bytes(2, "big") + data)
    packet.time_base, packet.is_keyframe, packet.stream = Fraction(1, 1000), True, stream
    packet.pts = packet.dts = round(begin_s * 1000)
    packet.duration = round((end_s - begin_s) * 1000)
    return packet


def read_sound(path: Path) -> tuple[float, np.ndarray]:
    """When the sound begins, in seconds after the first frame, and its first channel, float [samples]."""
    parts, begin_s = [], 0.0
    with av.open(str(path)) as container:
        audio = container.streams.audio[0]
        for frame in container.decode(audio):
            assert frame.pts is not None
            assert frame.time_base is not None
            if not parts:
                begin_s = float(frame.pts * frame.time_base)
            block = frame.to_ndarray()
            if not frame.format.is_planar:
                block = block.reshape(-1, len(frame.layout.channels)).T
            parts.append(block[0] / 32768 if block.dtype == np.int16 else block[0])
    with av.open(str(path)) as container:
        first = next(container.decode(container.streams.video[0]))
        assert first.pts is not None
        assert first.time_base is not None
        begin_s -= float(first.pts * first.time_base)
    return begin_s, np.concatenate(parts)


def read_cues(path: Path) -> list[Cue]:
    """The subtitles of a file that show something."""
    with av.open(str(path)) as container:
        cues = []
        for packet in container.demux(container.streams.subtitles[0]):
            data = bytes(packet)
            words = data[2:] if path.suffix == ".mp4" else data
            if words:
                assert packet.pts is not None
                begin_s = float(packet.pts * packet.time_base)
                end_s = begin_s + float((packet.duration or 0) * packet.time_base)
                cues.append((round(begin_s, 3), round(end_s, 3), words.decode()))
        return cues


def lag(sound: np.ndarray, reference: np.ndarray) -> int:
    """By how many samples `sound` is later than `reference`, where the two fit best."""
    length = min(len(sound), len(reference))
    size = 1 << (2 * length).bit_length()
    spectrum = np.fft.rfft(sound[:length], size) * np.conj(np.fft.rfft(reference[:length], size))
    place = int(np.argmax(np.fft.irfft(spectrum, size)))
    return place - size if place > size // 2 else place
