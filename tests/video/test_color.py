"""Colours and sizes: ranges, matrices, HDR, transparency, and the two ways of resizing."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter

from keyecli.video.color import tone_map
from keyecli.video.decode import decode_frames
from keyecli.video.sampling import SamplingSettings, plan_video
from keyecli.video.scale import FrameScaler
from keyecli.video.source import probe

Clip = Callable[..., Path]
COLORS = [(200, 60, 30), (20, 160, 90), (40, 50, 210), (255, 255, 255), (0, 0, 0), (128, 128, 128)]


def yuv_frame(rgb: tuple[int, int, int], matrix: int, full_range: bool) -> av.VideoFrame:
    """A flat yuv420p frame of the colour, computed here from the definitions of BT.601, BT.709 and BT.2020."""
    kr, kb = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}[matrix]
    r, g, b = (value / 255 for value in rgb)
    y = kr * r + (1 - kr - kb) * g + kb * b
    u, v = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    luma, chroma = (255, 255) if full_range else (219, 224)
    levels = [luma * y + (0 if full_range else 16), chroma * u + 128, chroma * v + 128]
    frame = av.VideoFrame(64, 48, "yuv420p")
    for plane, level in zip(frame.planes, levels, strict=True):
        plane.update(bytes([round(level)]) * plane.buffer_size)
    frame.colorspace, frame.color_range = matrix, 2 if full_range else 1
    return frame


@pytest.mark.parametrize("matrix", [1, 2, 6, 9])  # BT.709, not said (taken as 601), BT.601, BT.2020
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_matrix_and_range_are_respected(matrix: int, full_range: bool, exact: bool) -> None:
    scaler = FrameScaler(28, 56, exact=exact)
    for rgb in COLORS:
        picture = scaler(yuv_frame(rgb, matrix, full_range))
        assert picture.shape == (28, 56, 3)
        assert np.abs(picture.astype(int) - rgb).max() <= 3


def test_matrices_swscale_lacks_do_not_stop_it() -> None:
    for matrix in (3, 8, 10, 11, 14):
        frame = yuv_frame((128, 128, 128), 6, False)
        frame.colorspace = matrix
        assert np.abs(FrameScaler(28, 28)(frame).astype(int) - 128).max() <= 2


def test_size_changes_in_the_stream_are_followed() -> None:
    scaler = FrameScaler(28, 28)
    for width, height in ((64, 48), (320, 240), (64, 48)):
        frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 77, np.uint8)).reformat(
            format="yuv420p"
        )
        assert np.abs(scaler(frame).astype(int) - 77).max() <= 2


def natural_frames() -> list[av.VideoFrame]:
    """Moving smooth noise with edges: power falls with frequency as in footage."""
    rng = np.random.default_rng(0)
    rows, columns = np.fft.fftfreq(272)[:, None], np.fft.rfftfreq(640)[None]
    falloff = 1 / np.maximum(np.hypot(rows, columns), 1 / 640) ** 1.3
    frames = []
    for _ in range(3):
        planes = [
            np.fft.irfft2(np.fft.rfft2(rng.normal(size=(272, 640))) * falloff, (272, 640)) for _ in range(3)
        ]
        luma = planes[0] / planes[0].std()
        rgb = np.stack([128 + 45 * luma + 12 * plane / plane.std() for plane in planes], axis=-1)
        rgb[100:180, 200:330] = 255 - rgb[100:180, 200:330]
        frames.append(
            av.VideoFrame.from_ndarray(np.clip(rgb, 0, 255).astype(np.uint8)).reformat(format="yuv420p")
        )
    return frames


@pytest.mark.parametrize("size", [(280, 644), (196, 476), (140, 336), (84, 196)])
def test_scaling_while_decoding_is_near_the_exact_way(size: tuple[int, int]) -> None:
    fast, exact = FrameScaler(*size), FrameScaler(*size, exact=True)
    difference = np.mean([np.abs(fast(f).astype(float) - exact(f)).mean() for f in natural_frames()])
    bias = np.mean([fast(f).astype(float) - exact(f) for f in natural_frames()])
    assert difference <= 1.0
    assert abs(bias) < 0.05


def test_the_exact_way_is_pytorchs_antialiased_bilinear() -> None:
    frame = natural_frames()[0]
    full = VideoReformatter().reformat(
        frame, format="rgb24", interpolation=0x2 | 0x40000 | 0x2000, dst_color_range=2
    )
    planes = torch.from_numpy(full.to_ndarray()).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(planes, (140, 336), mode="bilinear", antialias=True).round()
    exact = torch.from_numpy(FrameScaler(140, 336, exact=True)(frame)).permute(2, 0, 1)[None]
    assert (expected - exact).abs().max() <= 1
    assert (expected != exact).double().mean() < 1e-3


def pq_code(nits: float) -> float:
    power = (nits / 10_000) ** 0.1593017578125
    return float(((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375)


def grey(code: float) -> np.ndarray:
    return np.full((2, 2, 3), round(code * 65535), np.uint16)


def test_pq_greys_stay_grey_and_ordered() -> None:
    nits = [0, 1, 10, 50, 95, 203, 500, 1000, 4000, 10_000]
    levels = []
    for value in nits:
        picture = tone_map(grey(pq_code(value)), "pq").astype(int)
        assert np.ptp(picture[0, 0]) <= 1
        levels.append(picture[0, 0, 1])
    assert levels == sorted(levels)
    assert levels[0] == 0
    assert levels[-3:] == [255, 255, 255]
    assert levels[5] < 245  # reference white leaves room for highlights
    # Below the knee nothing changes: 50 nits of 203 on a display of gamma 2.4.
    assert abs(levels[3] - round(255 * (50 / 203) ** (1 / 2.4))) <= 1


def test_hlg_greys() -> None:
    levels = [int(tone_map(grey(code), "hlg")[0, 0, 1]) for code in (0, 0.25, 0.5, 0.75, 1)]
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (0, 255)
    assert 190 < levels[3] < 245  # 75 % is reference white


def test_hdr_colours_are_brought_to_bt709() -> None:
    """Red of BT.709 at 100 nits, written in BT.2020 primaries, comes back as red."""
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    light = to_2020 @ np.array([60.0, 0.0, 0.0])
    code = np.array([[[pq_code(v) * 65535 for v in light]]]).round().astype(np.uint16)
    red, green, blue = tone_map(code, "pq")[0, 0].astype(int)
    assert abs(red - 255 * (60 / 203) ** (1 / 2.4)) <= 2
    assert max(green, blue) <= 20


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_files(clip: Clip, transfer: int) -> None:
    """A grey ramp in a 10-bit BT.2020 file comes out as ordered, neutral 8-bit greys."""

    def prepare(stream: Any) -> None:
        stream.codec_context.color_trc, stream.codec_context.colorspace = transfer, 9
        stream.codec_context.color_primaries = 9

    def ramp(_: int) -> np.ndarray:
        return np.repeat(np.repeat(np.linspace(0, 255, 160).astype(np.uint8)[None, :, None], 96, 0), 3, 2)

    path = clip("hdr.mp4", 3, codec="libx265", pixel_format="yuv420p10le", picture=ramp, prepare=prepare)
    info = probe(path)
    for exact in (False, True):
        row = next(decode_frames(info, plan_video(info, SamplingSettings()), exact_resize=exact)).frames[0][
            50
        ]
        levels = row.astype(int)
        assert np.ptp(levels, axis=1).max() <= 8
        assert (np.diff(levels[::14, 1]) >= 0).all()
        assert levels[2, 1] < 12
        assert levels[-3, 1] == 255


def test_transparency_is_over_white() -> None:
    frame = av.VideoFrame.from_ndarray(np.full((48, 64, 4), (255, 0, 0, 0), np.uint8), format="rgba")
    assert (FrameScaler(28, 28)(frame) == 255).all()
    frame = av.VideoFrame.from_ndarray(np.full((48, 64, 4), (255, 0, 0, 128), np.uint8), format="rgba")
    assert np.abs(FrameScaler(28, 28)(frame).astype(int) - (255, 127, 127)).max() <= 1


def test_pixel_aspect_of_one_third_is_kept_in_the_plan(clip: Clip) -> None:
    def prepare(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(1, 2)

    info = probe(clip("tall.mp4", 2, prepare=prepare))
    assert (info.width, info.height) == (80, 96)
