"""Compares swscale's filters with the exact way of resizing, on the frames of real clips.

    python benchmarks/video_scaling.py [CLIP ...]      (default: the clip of the examples)

What `FrameScaler` says about its filter comes from here. `keye bench video` measures reading frames.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from keyecli.video.sampling import FrameBudget, SamplingSettings, plan_video
from keyecli.video.scale import FrameScaler
from keyecli.video.source import probe

DEMO_CLIP = Path(__file__).parents[1] / "examples" / "clips" / "red-circle.mp4"
FILTERS = ("FAST_BILINEAR", "BILINEAR", "AREA", "BICUBIC", "GAUSS", "LANCZOS")


def mean_difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    return float(np.mean([np.abs(x.astype(np.int16) - y).mean() for x, y in zip(a, b, strict=True)]))


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
    parser.add_argument("clips", type=Path, nargs="*", metavar="CLIP", default=[DEMO_CLIP])
    for path in parser.parse_args().clips:
        compare_resize(path)


if __name__ == "__main__":
    main()
