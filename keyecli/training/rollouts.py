"""Answers that a model tries while it learns: drawn by the engine from the weights as they are, scored, and given back to it.

A group is the tries of one prompt. T prompt tokens, V visual tokens, D width, N tries, S tokens of all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from keyecli.engine.generate import (
    GenerationSettings,
    StopReason,
    TextStream,
    hidden_token_ids,
    stop_token_ids,
)
from keyecli.engine.loaded import LoadedModel, new_cache
from keyecli.engine.plan import InputPlan, prefill_chunk_tokens
from keyecli.engine.samples import branch_room, draw_samples
from keyecli.engine.stream import PromptFeeder, Timings, visual_of
from keyecli.errors import InputError
from keyecli.kernels.dispatch import DECODE_TOKENS
from keyecli.kernels.reference import SHARED_SEGMENT
from keyecli.model.keye import IGNORED_LABEL
from keyecli.model.prompt import Prompt
from keyecli.training.attempts import Attempt
from keyecli.training.distributed import Processes
from keyecli.training.examples import asked, lay_out_prompt, plan_row
from keyecli.training.feed import Rows, order_of
from keyecli.training.packing import Pack
from keyecli.training.rows import RowError, TrainingRow
from keyecli.training.sight import Seen
from keyecli.video.sampling import SamplingSettings


@dataclass
class Rollout:
    """One try. token_ids: what was written so far, the stop token included; log_probs: of each, under the weights that drew it;
    versions: (version of the weights, tokens) in order; ended: why, None while it goes on."""

    seed: int
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    ended: StopReason | None = None

    def add(self, token_ids: Sequence[int], log_probs: Sequence[float], version: int) -> None:
        """Tokens that weights of this version drew."""
        self.token_ids += token_ids
        self.log_probs += log_probs
        if token_ids:
            self.versions.append((version, len(token_ids)))


@dataclass(frozen=True)
class PlannedPrompt:
    """A row to be answered: its number in the file, its inputs, the columns that rewards see, and the tokens of its prompt if all
    frames come."""

    index: int
    row: TrainingRow
    plans: tuple[InputPlan, ...]
    columns: Mapping[str, Any]
    tokens: int

    @property
    def family(self) -> str:
        """What kind of row this is: its `task`, "" where it says nothing."""
        return str(self.columns.get("task", ""))

    @property
    def question(self) -> str:
        return next(message.text for message in reversed(self.row.messages) if message.role == "user")


@dataclass
class Group:
    """The tries of one prompt, which stands at `place` of the order of prompts."""

    place: int
    prompt: PlannedPrompt
    rollouts: list[Rollout]

    @property
    def done(self) -> bool:
        """Whether every try has ended."""
        return all(rollout.ended for rollout in self.rollouts)

    def state(self) -> dict[str, Any]:
        """Plain data, from which `of` makes the group again."""
        return {
            "place": self.place,
            "index": self.prompt.index,
            "rollouts": [asdict(rollout) for rollout in self.rollouts],
        }

    @staticmethod
    def of(state: Mapping[str, Any], prompt: PlannedPrompt) -> Group:
        rollouts = [
            Rollout(**{**rollout, "versions": [tuple(pair) for pair in rollout["versions"]]})
            for rollout in state["rollouts"]
        ]
        return Group(state["place"], prompt, rollouts)


@dataclass(frozen=True)
class PromptPlanner:
    """Rows → prompts. think: whether answers begin inside `<think>`; answer_tokens: the longest answer, max_length: of prompt and
    answer together."""

    rows: Rows
    tokenizer: Any
    config: Any
    sampling: SamplingSettings
    think: bool
    answer_tokens: int
    max_length: int

    def plan(self, index: int) -> PlannedPrompt:
        """RowError, InputError for a row that cannot be answered."""
        row, answer = asked(self.rows.row(index), self.think)
        plans = plan_row(row, self.sampling)
        prompt = lay_out_prompt(self.tokenizer, self.config, row, [visual_of(plan) for plan in plans])
        tokens = len(prompt.input_ids)
        if tokens + self.answer_tokens > self.max_length:
            raise RowError(
                f"{row.source}: the prompt takes {tokens:,} tokens and an answer {self.answer_tokens:,}, and --max-length is "
                f"{self.max_length:,}: raise it, sample less with --fps or --max-tokens-video, or lower --max-tokens"
            )
        columns = {**({} if answer is None else {"answer": answer}), **row.extra}
        return PlannedPrompt(index, row, plans, columns, tokens)


class Policy:
    """A model that answers with the weights as they are now, whoever changes them meanwhile.

    Several tries of a prompt are decoded side by side behind one prefill. answer_tokens: the longest answer; draws are at
    temperature 1 from the whole distribution, since that is what learns.
    """

    def __init__(self, loaded: LoadedModel, answer_tokens: int) -> None:
        self.loaded = loaded
        self.answer_tokens = answer_tokens
        self._stop_ids = stop_token_ids(loaded.config, loaded.tokenizer, loaded.generation_config)
        self._hidden_ids = hidden_token_ids(loaded.tokenizer)

    def lay_out(self, prompt: PlannedPrompt, seen: Seen) -> Prompt:
        """The prompt with the frames that came."""
        return lay_out_prompt(self.loaded.tokenizer, self.loaded.config, prompt.row, seen.visuals)

    @torch.inference_mode()
    def roll_out(
        self,
        prompt: PlannedPrompt,
        seen: Seen,
        rollouts: Sequence[Rollout],
        version: int,
        *,
        temperature: float = 1.0,
        most_tokens: int | None = None,
    ) -> int:
        """Go on with every try that has not ended; returns how many tokens were drawn.

        version: of the weights. most_tokens: of each try, this time; those that are still not at their end wait for the next.
        """
        open_ones = [rollout for rollout in rollouts if rollout.ended is None]
        if not open_ones:
            return 0
        left = [self.answer_tokens - len(rollout.token_ids) for rollout in open_ones]
        settings = [
            GenerationSettings(
                max_tokens=min(room, most_tokens or room), temperature=temperature, seed=one.seed
            )
            for one, room in zip(open_ones, left, strict=True)
        ]
        loaded, laid_out = self.loaded, self.lay_out(prompt, seen)
        together = min(len(open_ones), DECODE_TOKENS)
        # Branches have rows of their own behind the prompt.
        room = branch_room([one.token_ids for one in open_ones], settings)
        cache = new_cache(loaded, len(laid_out.input_ids) + together * room)
        chunk = prefill_chunk_tokens(loaded.device, loaded.offload)
        feeder = PromptFeeder(
            loaded.model, cache, laid_out, chunk, lambda _: laid_out, Timings(device=loaded.device)
        )
        if seen.sight.embeds is not None and len(seen.sight.embeds):
            feeder.add(seen.sight.embeds)
        generations = draw_samples(
            loaded,
            cache,
            feeder.finish(),
            laid_out.next_position,
            settings,
            stop_ids=self._stop_ids,
            prompt_ids=laid_out.input_ids,
            together=together,
            begun=[rollout.token_ids for rollout in open_ones],
            copies=True,
        )
        for rollout, generation in zip(open_ones, generations, strict=True):
            ids, log_probs = list(generation.token_ids), list(generation.log_probabilities)
            if generation.stop_token is not None:
                ids.append(generation.stop_token[0])
                log_probs.append(generation.stop_token[1])
            rollout.add(ids, log_probs, version)
            if generation.stop_reason == "stop":
                rollout.ended = "stop"
            elif len(rollout.token_ids) >= self.answer_tokens:
                rollout.ended = "length"
        return sum(len(generation.token_ids) for generation in generations)

    def text(self, rollout: Rollout) -> str:
        """What a try wrote, without the end of its turn."""
        stream = TextStream(self.loaded.tokenizer, self._hidden_ids)
        return "".join(map(stream.add, rollout.token_ids)) + stream.finish()

    def attempt(self, prompt: PlannedPrompt, rollout: Rollout, think: bool) -> Attempt:
        """The try as rewards see it."""
        video = next((plan for plan in prompt.plans if plan.sampling.kind == "video"), None)
        times = [] if video is None else [float(time_s) for time_s in video.sampling.times_s]
        return Attempt(
            response=self.text(rollout),
            row=prompt.columns,
            question=prompt.question,
            opened=think,
            duration_s=None if video is None else float(video.info.duration_s),
            frame_interval_s=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
        )


def group_pack(prompt: Prompt, source: str, rollouts: Sequence[Rollout]) -> Pack:
    """The tries of a prompt as one sequence: the prompt, which all see, then each by itself behind the prompt's last token.

    So the prompt is computed once for all of them. Every token of a try is learnt; `rows` says whose it is, −1 for the prompt's.
    """
    ids, positions = prompt.input_ids, prompt.position_ids
    head = len(ids) - 1
    parts_ids, parts_positions = [ids[:head]], [positions[:, :head]]
    targets = [torch.full((head,), IGNORED_LABEL)]
    segments, rows = [torch.full((head,), SHARED_SEGMENT)], [torch.full((head,), -1)]
    for number, rollout in enumerate(rollouts):
        own = torch.tensor(rollout.token_ids)
        # The last one is never read.
        parts_ids.append(torch.cat([ids[head:], own[:-1]]))
        following = prompt.next_position + torch.arange(len(own) - 1)
        parts_positions.append(torch.cat([positions[:, head:], following.expand(3, -1)], dim=1))
        targets.append(own)
        segments.append(torch.full((len(own),), number + 1))
        rows.append(torch.full((len(own),), number))
    return Pack(
        tuple(f"{source} try {number + 1}" for number in range(len(rollouts))),
        torch.cat(parts_ids)[None],
        torch.cat(parts_positions, dim=1)[:, None],
        torch.cat(targets)[None],
        torch.cat(rows)[None],
        torch.cat(segments)[None],
    )


def passes(prompt_tokens: int, lengths: Sequence[int], max_length: int) -> Iterator[list[int]]:
    """Which tries go through the network together, so that no pass is longer than `max_length`: in their order."""
    chosen: list[int] = []
    tokens = prompt_tokens
    for place, length in enumerate(lengths):
        if chosen and tokens + length > max_length:
            yield chosen
            chosen, tokens = [], prompt_tokens
        chosen.append(place)
        tokens += length
    if chosen:
        yield chosen


class PromptOrder:
    """Prompts in an order that a seed decides, epoch after epoch, of which every process takes its own.

    `taken` counts the places of the order that were used, the whole state. chosen: numbers of the rows that are used. on_bad is
    told of rows that cannot be answered, which are passed over.
    """

    def __init__(
        self,
        planner: PromptPlanner,
        chosen: Sequence[int],
        seed: int,
        processes: Processes,
        on_bad: Callable[[int, InputError], None],
    ) -> None:
        self.planner, self.chosen, self._seed = planner, chosen, seed
        self._processes, self._on_bad = processes, on_bad
        self.taken = 0

    def take(self, count: int) -> list[tuple[int, PlannedPrompt]]:
        """The next `count` prompts, each with its place in the order. InputError when a whole epoch has none to be answered."""
        found: list[tuple[int, PlannedPrompt]] = []
        bad = 0
        while len(found) < count:
            place = self.taken * self._processes.count + self._processes.rank
            self.taken += 1
            index = self._row(place)
            try:
                found.append((place, self.planner.plan(index)))
                bad = 0
            except InputError as error:
                self._on_bad(index, error)
                bad += 1
                if bad > len(self.chosen):
                    raise InputError(
                        "no row of the data can be answered: `keye data check` says what is wrong with each"
                    ) from error
        return found

    def _row(self, place: int) -> int:
        epoch, number = divmod(place, len(self.chosen))
        return self.chosen[int(order_of(len(self.chosen), self._seed, epoch)[number])]


def seed_of(seed: int, place: int, number: int) -> int:
    """Of try `number` of the prompt at a place of the order: the same in every run with this seed."""
    digest = hashlib.sha256(f"{seed} {place} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
