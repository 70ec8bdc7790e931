"""A step of reinforcement learning in the released shape with random weights: answers drawn, scored, and learnt from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from keyecli.bench.finetune import (
    CHECK_LAYERS,
    CHECK_TOKENS,
    RANK,
    RandomRows,
    adapted_network,
    gradient_check,
    no_sight,
    random_loaded,
)
from keyecli.bench.finetune_figures import FinetuneCheck
from keyecli.bench.network import DECODE_STEPS, official_config, timed_branches
from keyecli.engine.loaded import LoadedModel, free_memory_bytes
from keyecli.engine.plan import gib
from keyecli.model.config import KeyeVL2Config
from keyecli.model.prompt import Prompt
from keyecli.training.distributed import Processes
from keyecli.training.estimate import estimate_training
from keyecli.training.network import Network, moved
from keyecli.training.policy_loss import advantages, objective
from keyecli.training.policy_trainer import PolicyTrainer, ScoredGroup
from keyecli.training.rewards import compose
from keyecli.training.rollouts import Group, PlannedPrompt, Policy, Rollout, group_pack, seed_of
from keyecli.training.rows import Message, TrainingRow
from keyecli.training.schedule import Schedule
from keyecli.training.sight import Seen

PROMPTS, ROLLOUTS, ANSWER_TOKENS, MINIBATCHES = 8, 8, 512, 4
LR = 1e-5
REWARDS = ("iou", "format:weight=0.1")
QUESTION = (Message("user", ("When does it happen?",)),)
TRUTH = {"task": "ground", "answer": "[[3.0, 9.5]]"}
CHECK_ANSWER = 64
# Through 48 layers of random weights bf16 turns choices between experts and keys that are nearly equal; logits that have nothing
# to do with each other would be off by more than 1.
MISMATCH_LIMIT = 0.5


@dataclass(frozen=True)
class RLMeasurement:
    """A step of `prompts` groups of `rollouts` answers of `answer_tokens` tokens, each group behind `prompt_tokens`.

    generate_s, reward_s, train_s: parts of `seconds`; old_s: of train_s, the probabilities before the first update.
    engine_tokens_per_s: of decoding alone, as many answers side by side behind as many tokens, without an adapter; None where it
    was not measured. mismatch: mean |Δ log p| between engine and trainer.
    """

    how: str
    prompts: int
    rollouts: int
    prompt_tokens: int
    answer_tokens: int
    seconds: float
    generate_s: float
    reward_s: float
    train_s: float
    old_s: float
    peak_bytes: int
    planned_bytes: int
    mismatch: float
    engine_tokens_per_s: float | None = None

    @property
    def rollouts_per_s(self) -> float:
        return self.prompts * self.rollouts / self.generate_s

    @property
    def drawn_tokens_per_s(self) -> float:
        return self.rollouts_per_s * self.answer_tokens

    @property
    def share(self) -> float | None:
        """Of the engine's rate, what is left with prompts to be prefilled and an adapter in place."""
        return (
            None if self.engine_tokens_per_s is None else self.drawn_tokens_per_s / self.engine_tokens_per_s
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data, schema keye.bench.rl/1."""
        return {
            "schema": "keye.bench.rl/1",
            **asdict(self),
            "rollouts_per_s": self.rollouts_per_s,
            "drawn_tokens_per_s": self.drawn_tokens_per_s,
            "share": self.share,
        }

    def line(self) -> str:
        """One row for a reader."""
        parts = ", ".join(
            f"{name} {part / self.seconds:.0%}"
            for name, part in (
                ("generate", self.generate_s),
                ("reward", self.reward_s),
                ("train", self.train_s),
            )
        )
        text = (
            f"reinforcement learning, {self.how}: {self.prompts} × {self.rollouts} answers of {self.answer_tokens} tokens behind "
            f"{self.prompt_tokens} in {self.seconds:.1f} s ({parts}), {self.rollouts_per_s:.2f} rollouts/s, "
            f"{self.drawn_tokens_per_s:.0f} tokens/s"
        )
        if self.share is not None:
            text += f", {self.share:.0%} of decoding alone ({self.engine_tokens_per_s:.0f})"
        return (
            f"{text}; peak {gib(self.peak_bytes)}, estimated {gib(self.planned_bytes)}; engine and trainer differ by "
            f"{self.mismatch:.1e} in a token's log p"
        )


class RandomPrompts(Policy):
    """A policy that is asked about text of random tokens in the place of a video, and answers until there is no room."""

    def __init__(self, loaded: LoadedModel, prompt_tokens: int, count: int, answer_tokens: int) -> None:
        super().__init__(loaded, answer_tokens)
        self._rows = RandomRows(loaded.config, [prompt_tokens] * count)
        self.seen = Seen((), no_sight(loaded))

    def groups(self, rollouts: int) -> list[Group]:
        """Answers to be made to each prompt."""
        return [
            Group(place, prompt, [Rollout(seed_of(0, place, number)) for number in range(rollouts)])
            for place, prompt in enumerate(
                PlannedPrompt(int(one.source), TrainingRow(one.source, QUESTION), (), TRUTH, one.tokens)
                for one in self._rows.examples
            )
        ]

    def lay_out(self, prompt: PlannedPrompt, seen: Seen) -> Prompt:
        example = self._rows.examples[prompt.index]
        ids, positions = (
            torch.from_numpy(np.array(part)) for part in (example.input_ids, example.position_ids)
        )
        return Prompt(ids, positions, len(ids), 0, True)


def measure(lengths: Sequence[int], quant: str | None = None) -> Iterator[FinetuneCheck | RLMeasurement]:
    """A check in small, and a step with prompts of each length; RuntimeError when the check fails, or when engine and trainer
    compute something else."""
    config = official_config(quant)
    config.num_hidden_layers = CHECK_LAYERS
    check = check_policy(speaking(config, "cuda"), CHECK_TOKENS, ROLLOUTS, CHECK_ANSWER)
    yield check
    check.require()
    loaded = speaking(official_config(quant), "cuda")
    rates = []
    with torch.no_grad():
        for tokens in lengths:
            seconds, _ = timed_branches(loaded.model, tokens, ROLLOUTS, None)
            rates.append(ROLLOUTS * DECODE_STEPS / seconds)
    network = adapted_network(loaded, RANK)
    for tokens, rate in zip(lengths, rates, strict=True):
        found = measure_step(network, loaded, tokens, engine_tokens_per_s=rate)
        yield found
        if not found.mismatch <= MISMATCH_LIMIT:
            raise RuntimeError(f"engine and trainer do not compute the same: {found.line()}")


def speaking(config: KeyeVL2Config, device: str) -> LoadedModel:
    """Random weights with a word for every token, of which none ends an answer."""
    config.eos_token_id = None
    loaded = random_loaded(config, device)
    words = Tokenizer(
        WordLevel({f"w{number}": number for number in range(config.vocab_size)}, unk_token="w0")
    )
    return replace(loaded, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))


def measure_step(
    network: Network,
    loaded: LoadedModel,
    prompt_tokens: int,
    *,
    prompts: int = PROMPTS,
    rollouts: int = ROLLOUTS,
    answer_tokens: int = ANSWER_TOKENS,
    minibatches: int = MINIBATCHES,
    engine_tokens_per_s: float | None = None,
) -> RLMeasurement:
    """One step, after a group of its own that compiles what is needed. What random weights write earns nothing, so what is learnt
    from are random advantages, after the rewards were asked."""
    whole = prompt_tokens + rollouts * answer_tokens
    planned = estimate_training(
        loaded.config, train=("lora",), dtype=loaded.dtype, lora_rank=RANK, pack_tokens=whole, device=loaded.device,
        patches_per_row=0, accumulates=True,
    )  # fmt: skip
    room_bytes = planned.room_bytes(free_memory_bytes(loaded.device))
    network.keeper.room_bytes = room_bytes
    trainer = PolicyTrainer(
        loaded, network, Schedule(LR), Processes(),
        algorithm="gspo", clipping=None, max_length=whole, minibatches=minibatches,
    )  # fmt: skip
    policy = RandomPrompts(loaded, prompt_tokens, prompts + 1, answer_tokens)
    score = compose(REWARDS)

    def step(groups: Sequence[Group]) -> float:
        """The mismatch of one step."""
        scored = []
        loaded.model.eval()
        for group in groups:
            with trainer.timed("generate_s"):
                policy.roll_out(group.prompt, policy.seen, group.rollouts, 0)
            with trainer.timed("reward_s"):
                score([policy.attempt(group.prompt, rollout, True) for rollout in group.rollouts])
            laid_out = policy.lay_out(group.prompt, policy.seen)
            scored.append(ScoredGroup(group, laid_out, policy.seen, advantages(random_rewards(group))))
        with trainer.timed("learn_s"):
            figures = trainer.step(scored, 0.0)
        assert figures.mismatch is not None
        return figures.mismatch

    groups = policy.groups(rollouts)
    step(groups[:1])
    trainer.parts_s.clear()
    if loaded.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    mismatch = step(groups[1:])
    took = trainer.parts_s
    generate_s, reward_s, train_s = (took[name] for name in ("generate_s", "reward_s", "learn_s"))
    return RLMeasurement(
        loaded.quant or loaded.dtype, prompts, rollouts, prompt_tokens, answer_tokens, generate_s + reward_s + train_s,
        generate_s, reward_s, train_s, took["old_s"], trainer.peak_bytes(), planned.total_bytes + room_bytes, mismatch,
        engine_tokens_per_s,
    )  # fmt: skip


def random_rewards(group: Group) -> list[float]:
    """As many as the group has answers, the same in every run."""
    return np.random.Generator(np.random.PCG64(group.place)).random(len(group.rollouts)).tolist()


def check_policy(
    loaded: LoadedModel, prompt_tokens: int, rollouts: int, answer_tokens: int, *, rank: int = RANK
) -> FinetuneCheck:
    """Objective and gradients of a group that the engine has drawn, by the device's kernels, beside those of the definitions."""
    network = adapted_network(loaded, rank, moved_factors=True)
    policy = RandomPrompts(loaded, prompt_tokens, 1, answer_tokens)
    (group,) = policy.groups(rollouts)
    loaded.model.eval()
    policy.roll_out(group.prompt, policy.seen, group.rollouts, 0)
    pack = moved(
        group_pack(policy.lay_out(group.prompt, policy.seen), "check", group.rollouts), loaded.device
    )
    drawn = [value for rollout in group.rollouts for value in rollout.log_probs]
    engine = torch.tensor(drawn, device=loaded.device)
    # All positive: a sum of advantages would be a small difference of large numbers.
    gains = torch.tensor(random_rewards(group), device=loaded.device)
    rows = torch.arange(rollouts, device=loaded.device).repeat_interleave(answer_tokens)

    def loss() -> Tensor:
        """From answers as they were drawn, so that the ratio says how far off the engine's probabilities are."""
        log_probs = -network(pack, policy.seen.sight).entropies
        return -objective("grpo", log_probs, engine, engine, rows, gains, (1.0, 1.0)).total / len(engine)

    return gradient_check(
        loaded, network, loss, prompt_tokens + rollouts * answer_tokens, "reinforcement learning"
    )
