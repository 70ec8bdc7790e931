"""Tries of a prompt: drawn as the engine draws, kept and resumed, and given back to the network as one sequence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keyecli.engine.loaded import LoadedModel, load_weights, open_model
from keyecli.errors import InputError
from keyecli.model.lora import LoraSettings, add_lora, lora_parameters
from keyecli.training.agreement import selection_agreement
from keyecli.training.distributed import Processes
from keyecli.training.examples import asked
from keyecli.training.network import BALANCE_WEIGHT, Network, freeze, moved, trained
from keyecli.training.policy_trainer import PolicyTrainer, ScoredGroup
from keyecli.training.rollouts import (
    Group,
    PlannedPrompt,
    Policy,
    PromptOrder,
    PromptPlanner,
    Rollout,
    group_pack,
    passes,
    seed_of,
)
from keyecli.training.rows import Message, RowError, TrainingRow
from keyecli.training.schedule import Schedule
from keyecli.training.sight import Seen, see
from keyecli.video.sampling import SamplingSettings
from tests.training.rows import Listed, text_row, video_row

TOKENS = 12


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    """The toy model with adapters that change something."""
    loaded = load_weights(open_model(tiny_checkpoint, device="cpu"))
    freeze(loaded.model, trained("lora"))
    add_lora(loaded.model, LoraSettings(rank=4))
    with torch.no_grad():
        for number, parameter in enumerate(lora_parameters(loaded.model).values()):
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1
            )
    return loaded


def planner_of(loaded: LoadedModel, rows: list[TrainingRow], **changes: Any) -> PromptPlanner:
    arguments: Any = {"think": True, "answer_tokens": TOKENS, "max_length": 2000, **changes}
    return PromptPlanner(Listed(rows), loaded.tokenizer, loaded.config, SamplingSettings(), **arguments)


@pytest.fixture
def prompt(loaded: LoadedModel) -> PlannedPrompt:
    return planner_of(loaded, [text_row(1)]).plan(0)


def seen_by(loaded: LoadedModel, prompt: PlannedPrompt) -> Seen:
    return see(loaded, prompt.plans, learning=False)


def drawn(loaded: LoadedModel, prompt: PlannedPrompt, count: int = 3, **arguments: Any) -> list[Rollout]:
    loaded.model.eval()
    rollouts = [Rollout(seed_of(0, 5, number)) for number in range(count)]
    Policy(loaded, TOKENS).roll_out(prompt, seen_by(loaded, prompt), rollouts, 0, **arguments)
    return rollouts


def test_a_row_ends_where_its_last_question_does() -> None:
    told = Message("assistant", ("<think>\nhm\n</think>\n\nred",))
    row = TrainingRow("rows:1", (Message("user", ("Which?",)), told, Message("user", ("And then?",)), told))
    question, answer = asked(row, think=False)
    assert [message.text for message in question.messages] == ["Which?", told.text, "And then?", ""]
    assert answer == "red"
    assert asked(TrainingRow("rows:2", row.messages[:1]), think=True)[1] is None
    with pytest.raises(RowError, match="rows:3: the row has no question"):
        asked(TrainingRow("rows:3", (told,)), think=True)


def test_a_prompt_is_what_answering_would_see(loaded: LoadedModel) -> None:
    for think in (True, False):
        planned = planner_of(loaded, [text_row(2)], think=think).plan(0)
        laid_out = Policy(loaded, TOKENS).lay_out(planned, seen_by(loaded, planned))
        text = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": "Say three."}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=think,
        )
        assert laid_out.input_ids.tolist() == loaded.tokenizer.encode(text, add_special_tokens=False)
        assert (planned.columns["answer"], planned.tokens) == ("threethreethree", len(laid_out.input_ids))


def test_too_long_a_prompt_is_a_row_error(loaded: LoadedModel) -> None:
    with pytest.raises(
        RowError, match=r"rows:0: the prompt takes \d+ tokens and an answer 12, and --max-length is 20"
    ):
        planner_of(loaded, [text_row(0)], max_length=20).plan(0)


@pytest.mark.parametrize("row", [text_row(1), video_row(1)], ids=["text", "video"])
def test_the_network_finds_what_the_engine_drew(loaded: LoadedModel, row: TrainingRow) -> None:
    """The prompt is computed once for all tries, and each has the probabilities that it was drawn with."""
    prompt = planner_of(loaded, [row]).plan(0)
    rollouts = drawn(loaded, prompt)
    assert len({tuple(one.token_ids) for one in rollouts}) == 3
    seen = seen_by(loaded, prompt)
    laid_out = Policy(loaded, TOKENS).lay_out(prompt, seen)
    network = Network(loaded.model, trained("lora")).eval()
    found = -network(group_pack(laid_out, "", rollouts), seen.sight).entropies
    engine = torch.tensor([value for one in rollouts for value in one.log_probs])
    assert float((found - engine).detach().abs().mean()) < 1e-5
    for rollout in rollouts:
        alone = -network(group_pack(laid_out, "", [rollout]), seen.sight).entropies
        torch.testing.assert_close(alone, torch.tensor(rollout.log_probs), rtol=1e-4, atol=1e-5)


def test_engine_and_trainer_select_the_same_keys(loaded: LoadedModel, prompt: PlannedPrompt) -> None:
    rollout = drawn(loaded, prompt, 1)[0]
    seen = seen_by(loaded, prompt)
    laid_out = Policy(loaded, TOKENS).lay_out(prompt, seen)
    network = Network(loaded.model, trained("lora")).eval()
    assert selection_agreement(loaded, network, laid_out, seen, rollout) == 1.0
    # Other tokens select other keys.
    pack = network.model.model.layers[1].self_attn.sa_indexer
    assert pack is not None
    kept = {name: tensor.clone() for name, tensor in pack.state_dict().items()}
    real, calls = network.forward, []

    def otherwise(*arguments: Any) -> Any:
        calls.append(1)
        with torch.no_grad():
            pack.q_proj.weight.neg_()
        result = real(*arguments)
        pack.load_state_dict(kept)
        return result

    network.forward = otherwise  # type: ignore[method-assign]
    agreement = selection_agreement(loaded, network, laid_out, seen, rollout)
    assert calls
    assert agreement is not None
    assert 0 < agreement < 1


@pytest.mark.parametrize(("temperature", "piece"), [(0.0, 5), (1.0, 5), (1.0, 1)])
def test_tries_that_were_interrupted_go_on_as_they_would_have(
    loaded: LoadedModel, prompt: PlannedPrompt, temperature: float, piece: int
) -> None:
    whole = drawn(loaded, prompt, temperature=temperature)
    loaded.model.eval()
    policy, seen = Policy(loaded, TOKENS), seen_by(loaded, prompt)
    rollouts = [Rollout(one.seed) for one in whole]
    version = 0
    while not all(one.ended for one in rollouts):
        policy.roll_out(prompt, seen, rollouts, version, temperature=temperature, most_tokens=piece)
        state = Group(0, prompt, rollouts).state()
        rollouts = Group.of(state, prompt).rollouts
        version += 1
    assert [(one.token_ids, one.ended) for one in rollouts] == [(one.token_ids, one.ended) for one in whole]
    for one, other in zip(rollouts, whole, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
        counts = [tokens for _, tokens in one.versions]
        assert sum(counts) == len(one.token_ids)
        assert [number for number, _ in one.versions] == list(range(len(counts)))


def test_passes_are_as_long_as_they_may_be() -> None:
    assert list(passes(10, [5, 5, 5, 20, 1], 21)) == [[0, 1], [2], [3], [4]]
    assert list(passes(10, [5, 5, 5], 100)) == [[0, 1, 2]]
    assert list(passes(10, [], 100)) == []


def trainer_of(loaded: LoadedModel, **changes: Any) -> PolicyTrainer:
    arguments: Any = {"algorithm": "gspo", "clipping": None, "max_length": 2000, "minibatches": 1, **changes}
    network = Network(loaded.model, trained("lora"))
    return PolicyTrainer(loaded, network, Schedule(1e-3), Processes(), **arguments)


def scored(loaded: LoadedModel, prompt: PlannedPrompt) -> ScoredGroup:
    seen = seen_by(loaded, prompt)
    group = Group(0, prompt, drawn(loaded, prompt))
    return ScoredGroup(group, Policy(loaded, TOKENS).lay_out(prompt, seen), seen, [1.0, -0.5, -0.5])


def gradients_of(trainer: PolicyTrainer, groups: list[ScoredGroup]) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    trainer.update = lambda lr: (
        kept.extend(p.grad.clone() for p in trainer.parameters if p.grad is not None) or 0.0
    )  # type: ignore[method-assign, func-returns-value]
    trainer.step(groups, 0.5)
    trainer.drop_gradients()
    return kept


def test_gradients_do_not_depend_on_how_tries_share_passes(
    loaded: LoadedModel, prompt: PlannedPrompt
) -> None:
    group = scored(loaded, prompt)
    together = gradients_of(trainer_of(loaded), [group])
    apart = gradients_of(trainer_of(loaded, max_length=1), [group])
    assert together
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_first_gradient_is_that_of_log_probabilities_by_advantage(
    loaded: LoadedModel, prompt: PlannedPrompt
) -> None:
    group = scored(loaded, prompt)
    found = gradients_of(trainer_of(loaded), [group])
    trainer = trainer_of(loaded)
    loss = torch.zeros(())
    for rollout, gain in zip(group.group.rollouts, group.advantages, strict=True):
        pack = group_pack(group.prompt, "", [rollout])
        mean = -trainer.network(moved(pack, "cpu"), group.seen.sight).entropies.mean()
        loss = loss - gain * mean / 3
    loss.backward()
    expected = [p.grad for p in trainer.parameters if p.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    trainer.drop_gradients()


def test_better_tries_become_likelier(tiny_checkpoint: Path) -> None:
    loaded = load_weights(open_model(tiny_checkpoint, device="cpu"))
    freeze(loaded.model, trained("full"))
    prompt = planner_of(loaded, [text_row(1)]).plan(0)
    group = scored(loaded, prompt)
    trainer = PolicyTrainer(
        loaded, Network(loaded.model, trained("full")), Schedule(1e-3, warm_up=0), Processes(), algorithm="gspo",
        clipping=(0.5, 0.5), max_length=2000, minibatches=1,
    )  # fmt: skip
    first = trainer.step([group], 0.5, watch=True)
    assert first.divergence == pytest.approx(0, abs=1e-6)
    assert first.mismatch is not None
    assert first.mismatch < 1e-5
    assert first.answers == 3
    for _ in range(5):
        figures = trainer.step([group], 0.5, watch=True)
    assert figures.divergence is not None
    assert figures.divergence > 1e-4
    one = trainer._passes([group])[0]
    means = [float((trainer._log_probs(one) - one.engine)[one.rows == row].mean()) for row in range(3)]
    assert means[0] > 0
    assert means[0] > max(means[1:])


def test_routers_that_learn_are_kept_in_balance(tiny_checkpoint: Path) -> None:
    """Where no try is better than another, a router gets what the balance of its loads is worth, and nothing else does."""
    loaded = load_weights(open_model(tiny_checkpoint, device="cpu"))
    what = trained("full,router")
    freeze(loaded.model, what)
    prompt = planner_of(loaded, [text_row(1)]).plan(0)
    group = replace(scored(loaded, prompt), advantages=[0.0, 0.0, 0.0])
    trainer = PolicyTrainer(
        loaded, Network(loaded.model, what), Schedule(1e-3), Processes(), algorithm="gspo", clipping=None,
        max_length=2000, minibatches=1,
    )  # fmt: skip
    found = dict(zip(trainer.names, gradients_of(trainer, [group]), strict=True))
    pack = moved(group_pack(group.prompt, "", group.group.rollouts), "cpu")
    balance = trainer.network(pack, group.seen.sight).balance
    (BALANCE_WEIGHT * balance).backward()
    routers = [name for name in found if name.endswith("mlp.gate.weight")]
    assert routers
    for name in routers:
        expected = dict(loaded.model.named_parameters())[name].grad
        assert expected.abs().max() > 0
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-9)
    trainer.drop_gradients()


def test_nothing_to_learn_from_changes_nothing(loaded: LoadedModel) -> None:
    trainer = trainer_of(loaded, minibatches=2)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    figures = trainer.step([], 0.5, watch=True)
    assert (figures.answers, figures.entropy, figures.norm) == (0, None, None)
    assert all(torch.equal(now, then) for now, then in zip(trainer.parameters, before, strict=True))


def test_every_process_has_prompts_of_its_own_and_an_epoch_has_each_once(loaded: LoadedModel) -> None:
    planner = planner_of(loaded, [text_row(number) for number in range(7)])
    bad: list[int] = []

    def order(rank: int, count: int) -> PromptOrder:
        return PromptOrder(planner, range(7), 3, Processes(rank, count), lambda index, _: bad.append(index))

    alone = order(0, 1).take(14)
    assert sorted(prompt.index for _, prompt in alone[:7]) == list(range(7))
    assert sorted(prompt.index for _, prompt in alone[7:]) == list(range(7))
    shared = [order(rank, 2).take(7) for rank in range(2)]
    assert sorted(shared[0] + shared[1], key=lambda one: one[0]) == alone
    assert bad == []


def test_rows_that_cannot_be_answered_are_passed_over(loaded: LoadedModel) -> None:
    rows = [text_row(0), TrainingRow("rows:1", (Message("assistant", ("so",)),)), text_row(2)]
    bad: list[int] = []
    order = PromptOrder(
        planner_of(loaded, rows), range(3), 0, Processes(), lambda index, _: bad.append(index)
    )
    assert sorted(prompt.index for _, prompt in order.take(4)) == [0, 0, 2, 2]
    assert set(bad) == {1}
    order = PromptOrder(planner_of(loaded, rows), [1], 0, Processes(), lambda *_: None)
    with pytest.raises(InputError, match="no row of the data can be answered"):
        order.take(1)
