"""Which rows make up which step, in an order that a seed decides and a position resumes.

A step takes rows of the epoch's order until they come to `batch_tokens`; a row that cannot be used is named and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from keyecli.engine.loaded import ModelFiles
from keyecli.engine.plan import InputPlan
from keyecli.engine.stream import visual_of
from keyecli.errors import InputError
from keyecli.training.examples import Example, lay_out_row, plan_row
from keyecli.training.rows import RowError, TrainingRow
from keyecli.video.sampling import SamplingSettings


class Rows(Protocol):
    """Training rows by number, as `keyecli.training.data.open_data` gives them."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> TrainingRow: ...


@dataclass(frozen=True)
class Position:
    """How far the data has been used: `row` places of the order of `epoch`, the first being 0."""

    epoch: int = 0
    row: int = 0


@dataclass(frozen=True)
class PlannedRow:
    """A row that can be trained on: its number in the file, its inputs, and the example they make if all frames come."""

    index: int
    row: TrainingRow
    plans: tuple[InputPlan, ...]
    example: Example


@dataclass(frozen=True)
class Step:
    """The rows of one step, and the position behind them."""

    rows: tuple[PlannedRow, ...]
    after: Position


class Planner:
    """Row → planned row, as answering would sample and lay it out. on_bad: told of each row that is left out."""

    def __init__(
        self,
        rows: Rows,
        files: ModelFiles,
        tokenizer: Any,
        sampling: SamplingSettings,
        max_length: int,
        on_bad: Callable[[int, InputError], None],
    ) -> None:
        self.rows, self.files, self.tokenizer = rows, files, tokenizer
        self.sampling, self.max_length, self.on_bad = sampling, max_length, on_bad

    def plan(self, index: int) -> PlannedRow | None:
        """Row `index` of the file; None for one that cannot be used."""
        try:
            row = self.rows.row(index)
            plans = plan_row(row, self.sampling)
            example = self.lay_out(row, [visual_of(plan) for plan in plans])
        except InputError as error:
            self.on_bad(index, error)
            return None
        return PlannedRow(index, row, plans, example)

    def lay_out(self, row: TrainingRow, visuals: Sequence[Any]) -> Example:
        """RowError for a row that is longer than a pack: nothing is ever cut."""
        example = lay_out_row(self.tokenizer, self.files.config, row, visuals)
        if example.tokens > self.max_length:
            raise RowError(
                f"{row.source}: the row takes {example.tokens:,} tokens and --max-length is {self.max_length:,}: "
                "raise it, or sample less with --fps or --max-tokens-video"
            )
        return example


def order_of(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch goes through the rows, int64 [rows]."""
    return np.random.Generator(np.random.PCG64((seed, epoch))).permutation(rows)


def steps(
    planner: Planner, seed: int, batch_tokens: int, epochs: int | None, start: Position | None = None
) -> Iterator[Step]:
    """The steps from `start` on, of `epochs` epochs (None: without end). A step never reaches over the end of an epoch.

    InputError when an epoch has no row that can be used.
    """
    position = start or Position()
    total = len(planner.rows)
    while epochs is None or position.epoch < epochs:
        order = order_of(total, seed, position.epoch)
        chosen: list[PlannedRow] = []
        found = position.row > 0
        for used in range(position.row, total):
            planned = planner.plan(int(order[used]))
            if planned is None:
                continue
            found = True
            chosen.append(planned)
            if sum(row.example.tokens for row in chosen) >= batch_tokens:
                yield Step(tuple(chosen), replace(position, row=used + 1))
                chosen = []
        if chosen:
            yield Step(tuple(chosen), replace(position, row=total))
        if not found:
            raise InputError(
                "no row of the data can be trained on: `keye data check` says what is wrong with each"
            )
        position = Position(position.epoch + 1)
