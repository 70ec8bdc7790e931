"""`keye bench` through the command: what it refuses, and how a row reads."""

from __future__ import annotations

import json

import pytest
import torch

from keyecli.bench.measure import Measurement
from keyecli.commands.bench import line
from tests.commands.conftest import Keye

GPU = torch.cuda.is_available()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "keye: keye bench measures kernels, prefill, decode: name one, as in `keye bench kernels`"),
        (
            ["cats"],
            "keye: keye bench measures kernels, prefill, decode: name one, as in `keye bench kernels`",
        ),
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
            "keye: --only chooses among the kernels: it goes with `keye bench kernels`",
        ),
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
    expected = "experts 4096 tokens 2.000 ms ± 10.0 µs 50% of the floor 0.50 × grouped_mm ( 4.000 ms)"
    assert " ".join(line(row).split()) == expected
