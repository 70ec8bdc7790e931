"""Learning rates over the course of a run: linear warm-up, then a cosine down to nothing, or no change."""

from __future__ import annotations

import math
from dataclasses import dataclass

from keyecli.training.network import Main

# Published or common values where there are any: 1e-3 for a dense warm-up, as DeepSeek-V3.2 has; the rest is our choice.
LEARNING_RATES: dict[Main, float] = {
    "lora": 1e-4,
    "full": 1e-5,
    "projector": 1e-4,
    "indexer": 1e-3,
    "sparse": 1e-5,
}
# Of policies that learn from their own answers; 1e-6 for all weights is common, an adapter takes steps as much larger as it
# takes them in fine-tuning.
POLICY_RATES: dict[Main, float] = {"lora": 1e-5, "full": 1e-6}
WARM_UP = 0.03


@dataclass(frozen=True)
class Schedule:
    """warm_up: the share of the run in which the rate rises to `lr`; decays: whether it falls afterwards."""

    lr: float
    warm_up: float = WARM_UP
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    decays: bool = True

    def learning_rate(self, share: float) -> float:
        """At a share of the run, from 0 to 1."""
        if share < self.warm_up:
            return self.lr * (share + 1e-3) / (self.warm_up + 1e-3)
        if not self.decays:
            return self.lr
        late = (share - self.warm_up) / max(1e-9, 1 - self.warm_up)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, late)))
