"""Timing on a CUDA device, and the row of figures that every benchmark yields."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# Measured on one NVIDIA H200: copies counting bytes read and written, and a bf16 matrix product of 8192³.
H200_BYTES_PER_S = 4.2e12
H200_BF16_FLOP_PER_S = 7.5e14


@dataclass(frozen=True)
class Measurement:
    """One operation at one size.

    seconds: median; spread_s: difference of the quartiles. flops and bytes: the least that the operation must do, from
    its definition. baseline, baseline_s: what it is compared with in the same run, "" and None if nothing.
    """

    operation: str
    case: str
    seconds: float
    spread_s: float
    flops: float = 0.0
    bytes: float = 0.0
    baseline: str = ""
    baseline_s: float | None = None

    @property
    def floor_s(self) -> float:
        """The larger of arithmetic and traffic at the rates of one H200."""
        return max(self.flops / H200_BF16_FLOP_PER_S, self.bytes / H200_BYTES_PER_S)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data, schema keye.bench/1."""
        return {"schema": "keye.bench/1", **asdict(self), "floor_s": self.floor_s, "ratio": self.ratio}

    def line(self) -> str:
        """One row for a reader: operation, case, time and spread, rates, share of the floor, ratio to the baseline."""
        text = f"{self.operation:<28} {self.case:<34} {_time(self.seconds)} ±{_time(self.spread_s)}"
        if self.flops:
            text += f"  {self.flops / self.seconds / 1e12:6.1f} TFLOP/s"
        if self.bytes:
            text += f"  {self.bytes / self.seconds / 1e12:5.2f} TB/s"
        if self.floor_s:
            text += f"  {self.floor_s / self.seconds:4.0%} of the floor"
        if self.baseline_s is not None:
            text += f"  {self.ratio:5.2f} × {self.baseline} ({_time(self.baseline_s)})"
        return text

    @property
    def ratio(self) -> float | None:
        """This over the baseline: below one is faster."""
        return None if self.baseline_s is None else self.seconds / self.baseline_s


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:9.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:9.1f} µs"


def time_device(run: Callable[[], object], budget_s: float = 0.3) -> tuple[float, float]:
    """Median and quartile difference, in seconds, of `run` on the current CUDA device, between events.

    Warms up first (compilation stays out), then repeats for about `budget_s`, at least 5 and at most 100 times, with the
    second-level cache overwritten before each run.
    """
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once() -> float:
        flush.zero_()
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    run()
    estimate = min(once(), once())
    repeats = max(5, min(100, int(budget_s / max(estimate, 1e-6))))
    times = [once() for _ in range(repeats)]
    quartiles = statistics.quantiles(times, n=4)
    return statistics.median(times), quartiles[2] - quartiles[0]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; NaN when anything is NaN."""
    a, e = actual.double(), expected.double()
    return float((a - e).norm() / e.norm())


def require_equal(actual: Tensor, expected: Tensor, what: str, limit: float = 1e-2) -> None:
    """RuntimeError unless a result is its definition's to `limit`; NaN never is. Its time would mean nothing otherwise."""
    error = relative_error(actual, expected)
    if not error <= limit:
        raise RuntimeError(f"{what}: relative error {error:.2e} against the definition, allowed {limit}")


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """A function as a CUDA graph, after a run that compiles what it needs: launches from Python would cost more than what
    they launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
