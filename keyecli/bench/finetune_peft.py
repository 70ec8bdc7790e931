"""Steps of transformers' Qwen3-MoE with PEFT's adapters: what fine-tuning in the same shape is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keyecli.bench.finetune_figures import FinetuneMeasurement
from keyecli.bench.network import transformers_network
from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import IGNORED_LABEL

OWN_LOSS = "transformers + PEFT"
# Not what its Trainer does, but what somebody who is short of memory would.
FEW_LOGITS = "transformers + PEFT with logits of learnt tokens alone"
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
# A longer step ends the search for the longest sequence.
SLOW_STEP_S = 60.0
LONG_STEP_S = 15.0
LR = 1e-4


class Adapted:
    """A model with PEFT's adapters on attention and experts, gradient checkpointing, and AdamW."""

    def __init__(self, model: Any, rank: int, learnt_tokens: int) -> None:
        from peft import LoraConfig, get_peft_model

        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        settings = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )
        self.model: Any = get_peft_model(model, settings).train()
        self.learnt_tokens = learnt_tokens
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        self.vocabulary = model.config.vocab_size
        self.adamw = torch.optim.AdamW(self.parameters, lr=LR, fused=self.device.type == "cuda")

    def step(self, tokens: int, *, own_loss: bool) -> tuple[float, float]:
        """One update from a random sequence; seconds and the loss. own_loss: transformers' own, from the logits of all tokens."""
        ids = torch.randint(self.vocabulary, (1, tokens), device=self.device)
        begin_s = self._now_s()
        loss = self._loss(ids, own_loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return self._now_s() - begin_s, float(loss.detach())

    def measure(self, tokens: int, name: str) -> FinetuneMeasurement | None:
        """Steps of this length; None where memory runs out."""
        own_loss = name == OWN_LOSS
        self._free()
        try:
            first_s, loss = self.step(tokens, own_loss=own_loss)
            times = [first_s]
            if first_s <= SLOW_STEP_S:
                timed = [
                    self.step(tokens, own_loss=own_loss) for _ in range(1 if first_s > LONG_STEP_S else 2)
                ]
                times, loss = [seconds for seconds, _ in timed], timed[-1][1]
        except torch.OutOfMemoryError:
            return None
        peak_bytes = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        learnt = min(self.learnt_tokens, tokens - 1)
        return FinetuneMeasurement(
            name, "bf16", tokens, learnt, statistics.median(times), max(times) - min(times), len(times),
            peak_bytes, loss,
        )  # fmt: skip

    def _loss(self, ids: Tensor, own_loss: bool) -> Tensor:
        learnt = min(self.learnt_tokens, ids.shape[1] - 1)
        if own_loss:
            labels = ids.clone()
            labels[:, : ids.shape[1] - learnt] = IGNORED_LABEL
            return self.model(input_ids=ids, labels=labels, use_cache=False).loss
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=learnt + 1).logits
        return F.cross_entropy(logits[0, :-1].float(), ids[0, -learnt:])

    def _now_s(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _free(self) -> None:
        self.adamw.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def measure(config: KeyeVL2Config, rank: int, learnt_tokens: int) -> Iterator[FinetuneMeasurement]:
    """Longer and longer sequences in this shape with random bf16 weights on the GPU, each loss up to the longest that fits."""
    model = transformers_network(config)
    yield from longer_and_longer(Adapted(model, rank, learnt_tokens), LENGTHS)


def longer_and_longer(adapted: Adapted, lengths: Sequence[int]) -> Iterator[FinetuneMeasurement]:
    """Each length until memory runs out or a step is slow; first with its own loss, then on from there with fewer logits."""
    left = list(lengths)
    for name in (OWN_LOSS, FEW_LOGITS):
        while left:
            figure = adapted.measure(left[0], name)
            if figure is None:
                break
            left.pop(0)
            yield figure
            if figure.seconds > SLOW_STEP_S:
                return
