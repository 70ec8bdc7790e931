"""Measures video decoding against a plain PyAV loop, and swscale's filters against the exact way of resizing.

    python benchmarks/video_decode.py [--file CLIP] [--repeat 3] [--json OUT.json]
    python benchmarks/video_decode.py --compare-resize CLIP [CLIP ...]

The plain loop decodes with PyAV's defaults, converts every frame to RGB at full size and resizes the frames it wants with
PyTorch's antialiased bilinear filter; a second one does the same with frame threads. Results are compared before they are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter

import keyecli
from keyecli.video.decode import decode_frames
from keyecli.video.sampling import FrameBudget, SamplingPlan, SamplingSettings, plan_video
from keyecli.video.scale import FrameScaler
from keyecli.video.source import VideoInfo, probe

# swscale's quick conversion, which the plain loop uses, is itself up to 2 levels of 255 darker than an accurate one.
LARGEST_MEAN_DIFFERENCE = 3.0

FILTERS = ("FAST_BILINEAR", "BILINEAR", "AREA", "BICUBIC", "GAUSS", "LANCZOS")


def write_1080p(path: Path, frames: int) -> None:
    """H.264, 25 frames a second: a soft texture that drifts, a moving edge and film grain."""
    rng = np.random.default_rng(0)
    rows, columns = np.fft.fftfreq(1280)[:, None], np.fft.rfftfreq(2560)[None]
    falloff = 1 / np.maximum(np.hypot(rows, columns), 1 / 2560) ** 1.4
    planes = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(1280, 2560))) * falloff) for _ in range(3)]
    texture = np.stack([128 + 40 * planes[0] / planes[0].std() + 12 * p / p.std() for p in planes], axis=-1)
    grain = [rng.normal(scale=3, size=(1080, 1920, 1)) for _ in range(4)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        for number in range(frames):
            x, y = number * 2 % 600, number % 190
            picture = texture[y : y + 1080, x : x + 1920] + grain[number % 4]
            picture[300:700, 5 * number % 1500 :][:, :300] = (200, 60, 40)
            frame = av.VideoFrame.from_ndarray(np.clip(picture, 0, 255).astype(np.uint8))
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())


def plain_loop(path: Path, plan: SamplingPlan, threads: str) -> list[np.ndarray]:
    """Every frame to full-size RGB; the planned ones resized."""
    wanted = set(plan.times_s)
    pictures = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = threads
        start = None
        for frame in container.decode(stream):
            start = frame.pts if start is None else start
            rgb = frame.to_ndarray(format="rgb24")
            if (frame.pts - start) * stream.time_base in wanted:
                planes = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
                resized = torch.nn.functional.interpolate(
                    planes, (plan.height, plan.width), mode="bilinear", antialias=True
                )
                pictures.append(resized[0].round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())
    return pictures


def ours(info: VideoInfo, plan: SamplingPlan, exact: bool) -> list[np.ndarray]:
    return [frame for chunk in decode_frames(info, plan, exact_resize=exact) for frame in chunk.frames]


def mean_difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    return float(np.mean([np.abs(x.astype(np.int16) - y).mean() for x, y in zip(a, b, strict=True)]))


def side_by_side(ways: dict[str, Callable[[], object]], repeat: int) -> dict[str, list[float]]:
    """Seconds of each way, taken in turns, so that other load on the machine falls on all of them."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeat):
        for way, run in ways.items():
            begin = time.perf_counter()
            run()
            taken[way].append(time.perf_counter() - begin)
    return taken


def measure(path: Path, repeat: int) -> dict[str, object]:
    begin = time.perf_counter()
    info = probe(path)
    probe_s = time.perf_counter() - begin
    at_2_fps = plan_video(info, SamplingSettings(budget=FrameBudget(total_tokens=10**7)))
    plans = {"2 fps": at_2_fps, "all frames": replace(at_2_fps, times_s=tuple(info.frame_times))}
    rows = []
    for name, plan in plans.items():
        ways = {
            "plain PyAV loop": lambda plan=plan: plain_loop(path, plan, "SLICE"),
            "plain PyAV loop, frame threads": lambda plan=plan: plain_loop(path, plan, "AUTO"),
            "keyecli": lambda plan=plan: ours(info, plan, False),
            "keyecli, exact resize": lambda plan=plan: ours(info, plan, True),
        }
        reference = ways["plain PyAV loop"]()
        differences = {way: mean_difference(run(), reference) for way, run in ways.items()}
        for way, difference in differences.items():
            if difference > LARGEST_MEAN_DIFFERENCE:
                raise SystemExit(f"{way} differs from the plain loop by {difference:.2f} levels: not timed")
        taken = side_by_side(ways, repeat)
        for way in ways:
            ratios = [mine / plain for mine, plain in zip(taken[way], taken["plain PyAV loop"], strict=True)]
            rows.append(
                {
                    "sampling": name,
                    "way": way,
                    "frames": plan.frames,
                    "seconds_median": round(statistics.median(taken[way]), 3),
                    "seconds_spread": round(max(taken[way]) - min(taken[way]), 3),
                    "file_frames_per_s": round(len(info.frame_times) / statistics.median(taken[way]), 1),
                    "ratio_median": round(statistics.median(ratios), 3),
                    "mean_difference": round(differences[way], 2),
                }
            )
    return {
        "benchmark": "video_decode",
        "clip": {"size": f"{info.width}x{info.height}", "frames": len(info.frame_times), "codec": info.codec},
        "target": f"{at_2_fps.width}x{at_2_fps.height}",
        "probe_s": round(probe_s, 3),
        "rows": rows,
        "versions": versions(),
    }


def versions() -> dict[str, object]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "keyecli": keyecli.__version__,
        "python": platform.python_version(),
        "av": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
    }


def compare_resize(path: Path) -> None:
    """Mean |difference| in levels of 255 from the exact way, by filter, with and without swscale's accuracy flags."""
    info = probe(path)
    accurate = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    with av.open(str(path)) as container:
        frames = [frame for number, frame in enumerate(container.decode(video=0)) if number % 12 == 0]
    sizes = [plan_video(info, SamplingSettings(budget=FrameBudget(1, most))) for most in (256, 128, 64, 16)]
    exact = [[FrameScaler(p.height, p.width, exact=True)(frame) for frame in frames] for p in sizes]
    print(f"\n{path.name} {info.coded_width}x{info.coded_height}, {len(frames)} frames")
    print(f"{'filter':<15}" + "".join(f"{f'{p.width}x{p.height}':>16}" for p in sizes))
    for name in FILTERS:
        row = f"{name:<15}"
        for plan, expected in zip(sizes, exact, strict=True):
            cell = []
            for flags in (Interpolation[name], Interpolation[name] | accurate):
                scaler = VideoReformatter()
                scaled = [
                    scaler.reformat(f, plan.width, plan.height, "rgb24", interpolation=flags, threads=1)
                    for f in frames
                ]
                cell.append(f"{mean_difference([f.to_ndarray() for f in scaled], expected):.2f}")
            row += f"{' / '.join(cell):>16}"
        print(row)
    print("(plain / with ACCURATE_RND | FULL_CHR_H_INT; keyecli uses BILINEAR with them)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--file", type=Path, help="measure this clip instead of a generated 1080p one")
    parser.add_argument("--frames", type=int, default=100, help="length of the generated clip")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--compare-resize", type=Path, nargs="+", metavar="CLIP")
    options = parser.parse_args()
    if options.compare_resize:
        for path in options.compare_resize:
            compare_resize(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = options.file
        if path is None:
            path = Path(folder) / "1080p.mp4"
            write_1080p(path, options.frames)
        result = measure(path, options.repeat)
    print(f"{result['clip']} to {result['target']}, probe {result['probe_s']} s")
    print(
        f"{'sampling':<12}{'way':<33}{'median s':>10}{'spread':>8}{'file frames/s':>15}{'ratio':>8}{'mean diff':>11}"
    )
    rows = result["rows"]
    assert isinstance(rows, list)
    for row in rows:
        print(
            f"{row['sampling']:<12}{row['way']:<33}{row['seconds_median']:>10.3f}{row['seconds_spread']:>8.3f}"
            f"{row['file_frames_per_s']:>15.1f}{row['ratio_median']:>8.3f}{row['mean_difference']:>11.2f}"
        )
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
