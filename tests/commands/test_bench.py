"""`keye bench` through the command: what it refuses, and how a row reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from keyecli.bench.measure import Measurement
from tests.commands.conftest import Keye

GPU = torch.cuda.is_available()
UNKNOWN = (
    "keye: keye bench measures kernels, prefill, decode, memory, finetune, rl, load, end-to-end, video: "
    "name one, as in `keye bench kernels`"
)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], UNKNOWN),
        (["cats"], UNKNOWN),
        (
            ["kernels", "--only", "vision,cats"],
            "keye: --only names 'cats', and there is selection, attention, experts, vision",
        ),
        (
            ["kernels", "--lengths", "4k"],
            "keye: --lengths is '4k', but it must be numbers of tokens, as in 4096,32768",
        ),
        (
            ["kernels", "--lengths", "0"],
            "keye: --lengths is '0', but it must be numbers of tokens, as in 4096,32768",
        ),
        (
            ["decode", "--only", "vision"],
            "keye: --only goes with `keye bench kernels`",
        ),
        (
            ["video", "--lengths", "4"],
            "keye: --lengths goes with `keye bench kernels` and `keye bench prefill` and `keye bench decode` "
            "and `keye bench memory` and `keye bench finetune` and `keye bench rl`",
        ),
        (
            ["prefill", "--quant", "int4"],
            "keye: --quant goes with `keye bench decode` and `keye bench memory` and `keye bench finetune` "
            "and `keye bench rl` and `keye bench load`",
        ),
        (["memory", "--hours", "2"], "keye: --hours goes with `keye bench end-to-end`"),
        (["memory", "--gib", "8"], "keye: --gib goes with `keye bench load`"),
        (["video", "--dir", "."], "keye: --dir goes with `keye bench load`"),
        (
            ["load", "--gib", "1"],
            "keye: --gib 1 is too small: the released shape with one layer takes 3.2 GiB",
        ),
        (["decode", "clip.mp4"], "keye: CLIP goes with `keye bench video`"),
    ],
)
def test_wrong_usage(keye: Keye, arguments: list[str], sentence: str) -> None:
    code, out, err = keye("bench", *arguments)
    assert (code, out, err.splitlines()) == (2, "", [sentence])


def test_kernels_are_measured_on_a_gpu_and_nowhere_else(keye: Keye) -> None:
    code, out, err = keye("bench", "kernels", "--only", "experts", "--lengths", "4096", "--json")
    if GPU:
        rows = [json.loads(text) for text in out.splitlines()]
        assert code == 0
        assert rows
        assert all(row["schema"] == "keye.bench/1" and row["seconds"] > 0 for row in rows)
    else:
        assert code == 2
        assert err == (
            "keye: kernels is measured on an NVIDIA GPU, and this machine has none that torch can use\n"
        )


def test_a_row_by_hand() -> None:
    # 4.2 GB at 4.2 TB/s take 1 ms, 7.5e11 operations at 750 TFLOP/s too.
    row = Measurement(
        "experts",
        "4096 tokens",
        2e-3,
        1e-5,
        flops=7.5e11,
        bytes=2.1e9,
        baseline="grouped_mm",
        baseline_s=4e-3,
    )
    assert row.floor_s == pytest.approx(1e-3)
    assert row.ratio == pytest.approx(0.5)
    assert " ".join(row.line().split()) == (
        "experts 4096 tokens 2.000 ms ± 10.0 µs 375.0 TFLOP/s 1.05 TB/s 50% of the floor 0.50 × grouped_mm ( 4.000 ms)"
    )


def test_frames_are_read_on_any_machine(keye: Keye) -> None:
    clip = Path(__file__).parents[2] / "examples" / "clips" / "red-circle.mp4"
    code, out, _ = keye("bench", "video", str(clip), "--json")
    assert code == 0
    (row,) = [json.loads(text) for text in out.splitlines()]
    assert row["schema"] == "keye.bench.video/1"
    assert row["clip"] == "red-circle.mp4"
    assert row["frames"] > 0
    assert row["speedup"] > 0
    code, out, err = keye("bench", "video", "missing.mp4")
    assert (code, out) == (3, "")
    assert "missing.mp4" in err
