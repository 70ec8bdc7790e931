"""What `keye bench finetune` reports: a check, steps of one length, and a comparison."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from keyecli.engine.plan import gib

# In bf16 some tokens choose another expert or key of nearly the same score; a wrong gradient would be off by its whole length.
LOSS_LIMIT, GRADIENT_LIMIT = 1e-2, 0.15


@dataclass(frozen=True)
class FinetuneMeasurement:
    """Steps of one sequence of `tokens` tokens through `network`, its base held as `how` says.

    seconds, spread_s: median and range of `steps` timed ones; peak_bytes: the most memory of them; loss: of the last one, a
    learnt token; planned_bytes: what is estimated before a run, None for others than ours; shares: of the last step's time.
    """

    network: str
    how: str
    tokens: int
    learnt_tokens: int
    seconds: float
    spread_s: float
    steps: int
    peak_bytes: int
    loss: float
    planned_bytes: int | None = None
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def error(self) -> float | None:
        """How far the estimate is above the peak, as a share of the peak."""
        return None if self.planned_bytes is None else self.planned_bytes / self.peak_bytes - 1

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data, schema keye.bench.finetune/1."""
        return {
            "schema": "keye.bench.finetune/1",
            **asdict(self),
            "tokens_per_s": self.tokens_per_s,
            "error": self.error,
        }

    def line(self) -> str:
        """One row for a reader."""
        text = (
            f"fine-tuning, {self.network}, {self.how}: {self.tokens} tokens in {self.seconds:.2f} s "
            f"±{self.spread_s:.2f} s, {self.tokens_per_s:.0f} tokens/s, peak {gib(self.peak_bytes)}"
        )
        if self.planned_bytes is not None:
            text += f", estimated {gib(self.planned_bytes)} ({self.error:+.1%})"
        if self.shares:
            text += "; " + ", ".join(f"{part} {share:.0%}" for part, share in self.shares.items())
        return text


@dataclass(frozen=True)
class FinetuneComparison:
    """Ours beside `baseline` at `tokens`, the longest sequence that it holds; longest_tokens: the longest that ours was given."""

    baseline: str
    tokens: int
    tokens_per_s: float
    baseline_tokens_per_s: float
    longest_tokens: int

    @property
    def speedup(self) -> float:
        return self.tokens_per_s / self.baseline_tokens_per_s

    @property
    def length_ratio(self) -> float:
        return self.longest_tokens / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data, schema keye.bench.finetune.comparison/1."""
        return {
            "schema": "keye.bench.finetune.comparison/1",
            **asdict(self),
            "speedup": self.speedup,
            "length_ratio": self.length_ratio,
        }

    def line(self) -> str:
        """One row for a reader."""
        return (
            f"fine-tuning, {self.speedup:.2f} × the tokens/s of {self.baseline} at {self.tokens} tokens, the longest that it "
            f"holds ({self.tokens_per_s:.0f} and {self.baseline_tokens_per_s:.0f}); {self.longest_tokens} tokens are "
            f"{self.length_ratio:.1f} × as long"
        )


@dataclass(frozen=True)
class FinetuneCheck:
    """How far the kernels' loss and gradients are from the definitions', as shares of those; gradients by adapter, the worst of
    all layers. training: the kind whose loss it is."""

    tokens: int
    layers: int
    loss: float
    loss_error: float
    gradient_errors: dict[str, float]
    training: str = "fine-tuning"

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data, schema keye.bench.finetune.check/1."""
        return {"schema": "keye.bench.finetune.check/1", **asdict(self)}

    def line(self) -> str:
        """One row for a reader."""
        worst = max(self.gradient_errors, key=lambda name: self.gradient_errors[name])
        return (
            f"{self.training}, {self.layers} layers and {self.tokens} tokens against the definitions: loss {self.loss:.4f} off "
            f"by {self.loss_error:.1e}, gradients by {self.gradient_errors[worst]:.1e} at most ({worst})"
        )

    def require(self) -> None:
        """RuntimeError where the kernels are not the definitions: their time would mean nothing."""
        right = all(error <= GRADIENT_LIMIT for error in self.gradient_errors.values())
        if not (right and self.loss_error <= LOSS_LIMIT):
            raise RuntimeError(f"a step is not what the definitions give: {self.line()}")
