"""The pull of a teacher against divergences differentiated by autograd and expectations taken token by token; what tokens weigh;
repetition against its definition; the same tokens on both sides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from keyecli.model.companions import NANO_FOLDER, load_tokenizer
from keyecli.training.distill_loss import (
    MODES,
    Aligned,
    Estimator,
    Mode,
    Sampled,
    Side,
    check_same,
    distill_losses,
    log_probs,
    overlap_losses,
    repetition_penalty,
    token_weights,
)
from tests.compare import assert_close, assert_same

VOCABULARY = 12
UNLIMITED = Estimator(log_prob_floor=-math.inf, advantage_limit=math.inf)


def logits_of(positions: int, seed: int, vocabulary: int = VOCABULARY, spread: float = 1.5) -> Tensor:
    return torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def plain(ids: Tensor) -> Sampled:
    return Sampled(ids, torch.ones(len(ids)), torch.zeros(len(ids)))


def first_tokens(positions: int) -> Sampled:
    return plain(torch.zeros(positions, dtype=torch.long))


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(logits), logits)[0]


def gradient_of_losses(student: Tensor, teacher: Tensor, sampled: Sampled, how: Estimator) -> Tensor:
    return gradient(lambda logits: overlap_losses(logits, teacher, sampled, how)[0].sum(), student)


def reverse_kl(student: Tensor, teacher: Tensor, candidates: Tensor | None = None) -> Tensor:
    """KL(π_θ ‖ π_T) summed over positions, both renormalised on bool [S, V] candidates."""
    if candidates is not None:
        student, teacher = (each.masked_fill(~candidates, -1e9) for each in (student, teacher))
    ours, theirs = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    return (ours.exp() * (ours - theirs)).sum()


def candidates_of(student: Tensor, teacher: Tensor, mode: Mode, k: int) -> Tensor:
    """Ω, bool [S, V], by sets."""
    mask = torch.zeros(student.shape, dtype=torch.bool)
    for row, (ours, theirs) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        best, also = (set(sorted(range(len(each)), key=each.__getitem__)[-k:]) for each in (ours, theirs))
        for token in best & also if mode == "overlap" else best:
            mask[row, token] = True
    return mask


def expected_gradient(student: Tensor, teacher: Tensor, how: Estimator) -> Tensor:
    """The mean gradient over every token that could be sampled at one position, for logits [V]."""

    def mean_loss(logits: Tensor) -> Tensor:
        everything = plain(torch.arange(len(logits)))
        rows = (len(logits), len(logits))
        losses, _ = overlap_losses(logits.expand(rows), teacher.expand(rows), everything, how)
        return (student.softmax(-1) * losses).sum()

    return gradient(mean_loss, student)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("literal", [False, True])
def test_a_teacher_like_the_student_teaches_exactly_nothing(mode: Mode, literal: bool) -> None:
    logits = logits_of(9, seed=1, spread=6.0)
    how = Estimator(mode=mode, literal=literal, k=4)
    sampled = plain(torch.arange(9))
    losses, metrics = overlap_losses(logits, logits.clone(), sampled, how)
    assert not losses.any()
    assert not metrics.advantage.any()
    assert not metrics.divergence.any()
    assert (metrics.overlap == 1).all()
    assert not gradient_of_losses(logits, logits.clone(), sampled, how).any()


def test_without_a_common_candidate_nothing_is_learnt() -> None:
    student = logits_of(3, seed=2)
    teacher = -student
    losses, metrics = overlap_losses(student, teacher, first_tokens(3), Estimator(k=5))
    for values in (losses, metrics.advantage, metrics.support, metrics.overlap, metrics.divergence):
        assert not values.any()
    assert not gradient_of_losses(student, teacher, first_tokens(3), Estimator(k=5)).any()
    literal = Estimator(k=5, literal=True)
    assert not gradient_of_losses(student, teacher, first_tokens(3), literal).any()


def test_one_row_without_candidates_leaves_the_others_alone() -> None:
    student, teacher = logits_of(4, seed=3), logits_of(4, seed=4)
    teacher[2] = -student[2]
    others = torch.tensor([0, 1, 3])
    both = gradient_of_losses(student, teacher, first_tokens(4), Estimator(k=5))
    assert not both[2].any()
    assert_same(
        both[others],
        gradient_of_losses(student[others], teacher[others], first_tokens(3), Estimator(k=5)),
    )


@pytest.mark.parametrize("mode", ["overlap", "student"])
@pytest.mark.parametrize("k", [VOCABULARY, 64])
def test_all_of_the_vocabulary_gives_the_full_reverse_divergence(mode: Mode, k: int) -> None:
    student, teacher = logits_of(8, seed=5), logits_of(8, seed=6)
    how = replace(UNLIMITED, mode=mode, k=k)
    assert_close(
        gradient_of_losses(student, teacher, first_tokens(8), how),
        gradient(lambda logits: reverse_kl(logits, teacher), student),
        absolute=1e-6,
    )
    metrics = overlap_losses(student, teacher, first_tokens(8), how)[1]
    assert_close(metrics.divergence.sum(), reverse_kl(student, teacher).float())
    assert_close(metrics.advantage, -metrics.divergence)


@pytest.mark.parametrize("mode", ["overlap", "student"])
@pytest.mark.parametrize("k", [2, 4, 7])
def test_the_gradient_is_that_of_the_divergence_on_the_candidates(mode: Mode, k: int) -> None:
    student, teacher = logits_of(16, seed=7), logits_of(16, seed=8)
    candidates = candidates_of(student, teacher, mode, k)
    how = replace(UNLIMITED, mode=mode, k=k)
    found = gradient_of_losses(student, teacher, first_tokens(16), how)
    assert_close(
        found, gradient(lambda logits: reverse_kl(logits, teacher, candidates), student), absolute=1e-6
    )
    assert found[~candidates].abs().max() < 1e-6  # probability only moves inside Ω
    metrics = overlap_losses(student, teacher, first_tokens(16), how)[1]
    assert metrics.support.tolist() == candidates.sum(-1).tolist()
    shared = candidates_of(student, teacher, "overlap", k)
    assert_close(metrics.overlap, shared.sum(-1) / k)
    chances = student.softmax(-1) * candidates
    chances /= chances.sum(-1, keepdim=True).clamp(min=1e-9)
    assert_close(metrics.advantage, (chances * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1))
    empty = ~candidates.any(-1)
    assert_close(metrics.divergence[~empty].sum(), reverse_kl(student, teacher, candidates).float())


@pytest.mark.parametrize("mode", ["overlap", "student"])
def test_the_published_form_teaches_nothing_in_the_mean_and_ours_does(mode: Mode) -> None:
    student, teacher = logits_of(1, seed=9)[0], logits_of(1, seed=10)[0]
    how = replace(UNLIMITED, mode=mode, k=8)
    ours = expected_gradient(student, teacher, how)
    published = expected_gradient(student, teacher, replace(how, literal=True))
    assert published.abs().max() < 1e-6
    assert ours.abs().max() > 1e-2
    # It is not that its loss is nothing: one sampled token has a gradient.
    one = gradient_of_losses(
        student[None], teacher[None], plain(torch.tensor([0])), replace(how, literal=True)
    )
    assert one.abs().max() > 1e-2


def test_the_published_form_is_the_advantage_times_the_surprise() -> None:
    student, teacher, ids = logits_of(6, seed=11), logits_of(6, seed=12), torch.arange(6)
    losses, metrics = overlap_losses(student, teacher, plain(ids), Estimator(k=6, literal=True))
    ours = overlap_losses(student, teacher, plain(ids), Estimator(k=6))[1]
    assert_same(metrics.advantage, ours.advantage)
    assert_close(losses, -metrics.advantage * student.log_softmax(-1)[ids, ids])


def test_the_teacher_on_sampled_tokens_is_the_full_reverse_divergence_in_the_mean() -> None:
    student, teacher = logits_of(1, seed=13)[0], logits_of(1, seed=14)[0]
    how = replace(UNLIMITED, mode="teacher-on-student", k=2)
    assert_close(
        expected_gradient(student, teacher, how),
        gradient(lambda logits: reverse_kl(logits, teacher), student),
        absolute=1e-6,
    )


def test_the_teacher_on_sampled_tokens_says_what_it_makes_of_the_best_candidates() -> None:
    student, teacher, ids = logits_of(6, seed=15), logits_of(6, seed=16), torch.arange(6)
    of_tokens = overlap_losses(student, teacher, plain(ids), Estimator(mode="teacher-on-student", k=3))[1]
    of_candidates = overlap_losses(student, teacher, plain(ids), Estimator(mode="student", k=3))[1]
    assert_close(of_tokens.advantage, teacher.log_softmax(-1)[ids, ids] - student.log_softmax(-1)[ids, ids])
    for name in ("support", "overlap", "divergence"):
        assert_same(getattr(of_tokens, name), getattr(of_candidates, name))


def test_log_probabilities_are_no_lower_than_their_floor() -> None:
    chances = torch.tensor([[0.9, 0.1 - 1e-7, 1e-7], [0.5, 0.5 - 1e-7, 1e-7]])
    student, teacher = chances.log(), chances.flip(-1).log()
    how = Estimator(mode="teacher-on-student", advantage_limit=math.inf)
    for token, expected in ((0, -10 - math.log(0.9)), (2, math.log(0.9) + 10)):
        advantage = overlap_losses(student[:1], teacher[:1], plain(torch.tensor([token])), how)[1].advantage
        assert float(advantage) == pytest.approx(expected, abs=1e-4)
    # Both below the floor: nothing tells them apart.
    unlikely = torch.tensor([[0.0, -20.0]]), torch.tensor([[0.0, -12.0]])
    assert not overlap_losses(*unlikely, plain(torch.tensor([1])), how)[1].advantage.any()


@pytest.mark.parametrize(("sign", "mode"), [(1, "student"), (-1, "student"), (1, "teacher-on-student")])
def test_an_advantage_is_no_larger_than_its_limit(sign: int, mode: Mode) -> None:
    student = torch.tensor([[0.0, 0.0, 9.0 * -sign, 9.0 * -sign]])
    teacher = torch.tensor([[0.0, 1.0, 9.0 * sign, 8.0 * sign]])
    k = 2
    ids = student.topk(k).indices
    advantages = [
        float(overlap_losses(student, teacher, plain(ids[0, :1]), how)[1].advantage)
        for how in (Estimator(mode=mode, k=k), Estimator(mode=mode, k=k, advantage_limit=math.inf))
    ]
    assert abs(advantages[1]) > 5
    assert advantages[0] == math.copysign(5, advantages[1])


def test_what_a_limit_holds_back_moves_all_candidates_to_the_teachers_mass() -> None:
    # The student's two best hold nearly all of its mass and hardly any of the teacher's.
    student, teacher = torch.tensor([[9.0, 8.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 9.0, 8.0]])
    candidates = torch.tensor([[True, True, False, False]])
    how = replace(UNLIMITED, mode="student", k=2)
    free = float(overlap_losses(student, teacher, first_tokens(1), how)[1].advantage)
    held_back = free + 5
    assert held_back < 0

    def expected(logits: Tensor) -> Tensor:
        mass = logits.log_softmax(-1).masked_fill(~candidates, -1e9).logsumexp(-1)
        return reverse_kl(logits, teacher, candidates) - held_back * mass.sum()

    limited = gradient_of_losses(student, teacher, first_tokens(1), replace(how, advantage_limit=5.0))
    assert_close(limited, gradient(expected, student), absolute=1e-6)
    # Down goes the mass of the candidates, as in the full divergence.
    full = gradient(lambda logits: reverse_kl(logits, teacher), student)
    assert limited[candidates].sum() > 0
    assert full[candidates].sum() > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("literal", [False, True])
def test_weights_multiply_and_a_penalty_speaks_against_the_sampled_token(mode: Mode, literal: bool) -> None:
    student, teacher, ids = logits_of(5, seed=17), logits_of(5, seed=18), torch.arange(5)
    how = Estimator(mode=mode, literal=literal, k=6)
    bare, bare_metrics = overlap_losses(student, teacher, plain(ids), how)
    weights, penalties = torch.tensor([0.3, 1.3, 1.0, 0.3, 2.0]), torch.tensor([0.0, -0.5, 0.0, -0.5, 0.0])
    losses, metrics = overlap_losses(student, teacher, Sampled(ids, weights, penalties), how)
    assert_close(losses, weights * bare - penalties * student.log_softmax(-1)[ids, ids])
    for name, values in vars(metrics).items():
        assert_same(values, getattr(bare_metrics, name))
    pushed = gradient_of_losses(student, student.clone(), Sampled(ids, weights, penalties), how)
    assert (pushed[ids, ids][[1, 3]] > 0.1).all()  # descending, they become less likely
    assert not pushed[[0, 2, 4]].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 100])
def test_chunks_give_what_the_whole_gives(mode: Mode, chunk_tokens: int) -> None:
    torch.manual_seed(19)
    positions, how = 11, Estimator(mode=mode, k=6)
    ours, theirs = nn.Linear(8, VOCABULARY), nn.Linear(6, VOCABULARY)
    student, teacher = torch.randn(positions, 8), torch.randn(positions, 6, requires_grad=True)
    penalties = torch.where(torch.rand(positions) > 0.5, -0.5, 0.0)
    sampled = Sampled(torch.randint(VOCABULARY, (positions,)), torch.rand(positions), penalties)
    sizes: list[int] = []

    def logits(states: Tensor) -> Tensor:
        sizes.append(len(states))
        return ours(states)

    whole, chunked = (student.clone().requires_grad_() for _ in range(2))
    expected, expected_metrics = overlap_losses(ours(whole), theirs(teacher), sampled, how)
    expected.sum().backward()
    head = ours.weight.grad
    ours.weight.grad = None
    losses, metrics = distill_losses(
        Side(chunked, logits), Side(teacher, theirs), sampled, how, chunk_tokens=chunk_tokens
    )
    losses.sum().backward()
    assert_close(losses, expected)
    for name, values in vars(metrics).items():
        assert_close(values, getattr(expected_metrics, name), what=name)
    for actual, wanted in ((chunked.grad, whole.grad), (ours.weight.grad, head)):
        assert actual is not None
        assert wanted is not None
        assert_close(actual, wanted)
    assert max(sizes) <= chunk_tokens
    assert teacher.grad is None
    assert theirs.weight.grad is None


def test_nothing_sampled_is_nothing_lost() -> None:
    states = torch.zeros(0, 8, requires_grad=True)
    head = nn.Linear(8, VOCABULARY)
    losses, metrics = distill_losses(Side(states, head), Side(states, head), first_tokens(0), Estimator())
    assert [len(values) for values in (losses, *vars(metrics).values())] == [0] * 5
    losses.sum().backward()


def test_networks_that_do_not_fit_together_are_refused() -> None:
    head, other = nn.Linear(8, VOCABULARY), nn.Linear(8, VOCABULARY + 1)
    states = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"logits \[3, 12\] and \[3, 13\]"):
        distill_losses(Side(states, head), Side(states, other), first_tokens(3), Estimator())
    with pytest.raises(ValueError, match="3 states of the student and 2 of the teacher for 3 tokens"):
        distill_losses(Side(states, head), Side(states[:2], head), first_tokens(3), Estimator())


def test_logits_of_half_precision_are_compared_in_full() -> None:
    logits, ids = logits_of(4, seed=20), torch.arange(8).reshape(4, 2)
    coarse = logits.bfloat16()
    assert_close(log_probs(coarse, ids), coarse.float().log_softmax(-1).gather(-1, ids), relative=1e-6)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(NANO_FOLDER)


F, O, N = 0.3, 1.0, 1.3  # noqa: E741 format, other, number or reasoning


@pytest.mark.parametrize(
    ("parts", "opened"),
    [
        pytest.param([("blue", O), ("<|im_end|>", F)], False, id="answer"),
        pytest.param([("A circle at ", O), ("12.5", N), (" s", O), ("<|im_end|>", F)], False, id="decimal"),
        pytest.param([("from ", O), ("01:02:03.5", N), (" to ", O), ("-7", N)], False, id="times"),
        pytest.param([("so red, [1]", N), ("\n</think>\n\n", F), ("blue", O)], True, id="open-reasoning"),
        pytest.param(
            [("<think>\n", F), ("one <answer> here", N), ("\n</think>\n\n", F), ("blue", O)],
            False,
            id="tags-in-reasoning",
        ),
        pytest.param([("never ends, 3", N), ("<|im_end|>", F)], True, id="unclosed-reasoning"),
        pytest.param([("<answer>", F), ("red", O), ("</answer>", F), ("<|im_end|>", F)], False, id="tags"),
        pytest.param(
            [("[[", F), ("1.5", N), (", ", F), ("3.0", N), ("], [", F), ("12", N), (", ", F), ("14", N), ("]]", F)],
            False,
            id="spans",
        ),
        pytest.param(
            [('```json\n{ "start 1" : ', F), ("2", N), (', "label": "', F), ("a, dog ", O), ("3", N), ('"}\n```', F)],
            False,
            id="object",
        ),
        pytest.param([("red, blue: ", O), ("3", N), (' "it, is"', O)], False, id="prose"),
        pytest.param([("[", F), ("3", N), ("]", F), (", ", O), ("3", N), ("-", O), ("5", N)], False, id="behind"),
        pytest.param([('{"seen": ', F), ("true", O), (', "s": ', F), ("2", N), ("}", F)], False, id="constants"),
        pytest.param([("see", O), (" [", F), ("the man, who", O), ("]", F), (", ran", O)], False, id="brackets"),
    ],
)  # fmt: skip
def test_tokens_weigh_by_what_they_say(tokenizer: Any, parts: list[tuple[str, float]], opened: bool) -> None:
    ids: list[int] = []
    wanted: list[float] = []
    for text, weight in parts:
        pieces = tokenizer.encode(text, add_special_tokens=False)
        ids += pieces
        wanted += [weight] * len(pieces)
    expected = torch.tensor(wanted)
    assert_close(token_weights(tokenizer, ids, opened), expected / expected.mean(), relative=1e-6)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_tokens_have_weights_with_mean_one(tokenizer: Any, data: st.DataObject) -> None:
    # Bytes of half characters and tokens that no encoder would write are sampled too.
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=60))
    weights = token_weights(tokenizer, ids, data.draw(st.booleans()))
    assert weights.shape == (len(ids),)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    assert 0.3 / 1.3 - 1e-5 <= float(weights.min()) <= float(weights.max()) <= 1.3 / 0.3 + 1e-5


def test_an_endless_answer_is_weighed_too(tokenizer: Any) -> None:
    for text in ("\n", "[", '"', "[1, ", "<|", "<think>"):
        ids = tokenizer.encode(text, add_special_tokens=False) * 20_000
        assert token_weights(tokenizer, ids).shape == (len(ids),)
    assert token_weights(tokenizer, []).shape == (0,)


def repeated_from_definition(ids: list[int]) -> list[bool]:
    marked = [False] * len(ids)
    for period in range(1, 65):
        for begin in range(len(ids) - 4 * period + 1):
            first = ids[begin : begin + period]
            if ids[begin : begin + 4 * period] == first * 4:
                end = begin + 4 * period
                while end < len(ids) and ids[end] == ids[end - period]:
                    end += 1
                marked[begin + period : end] = [True] * (end - begin - period)
    return marked


@pytest.mark.parametrize("period", [1, 3, 64])
@pytest.mark.parametrize("copies", [3, 4, 6])
def test_the_second_of_four_copies_is_where_a_penalty_begins(period: int, copies: int) -> None:
    before, behind = [900, 901], [902, 903, 904]
    ids = before + list(range(period)) * copies + behind
    expected = torch.zeros(len(ids))
    if copies >= 4:
        expected[len(before) + period : -len(behind)] = -0.5
    assert_same(repetition_penalty(torch.tensor(ids)), expected)


def test_a_longer_period_is_no_repetition() -> None:
    assert not repetition_penalty(torch.tensor(list(range(65)) * 6)).any()


def test_an_unfinished_copy_counts_as_far_as_it_goes() -> None:
    ids = [1, 2, 3] * 4 + [1, 2, 9]
    assert repetition_penalty(torch.tensor(ids)).tolist() == [0.0] * 3 + [-0.5] * 11 + [0.0]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(1, 6)), max_size=5
    ).map(lambda blocks: [token for block, copies in blocks for token in block * copies])
)
@example([])
@example([7, 7, 7])
@example([7, 7, 7, 7])
def test_repetition_is_its_definition(ids: list[int]) -> None:
    penalty = repetition_penalty(torch.tensor(ids, dtype=torch.long))
    assert (penalty != 0).tolist() == repeated_from_definition(ids)


SEEN = Aligned(
    response_ids=(5, 6, 7), visual_tokens=(64, 16), frame_times_s=(0.0, 0.5), response_positions=(90, 91, 92)
)


def test_the_same_input_passes() -> None:
    check_same(SEEN, Aligned(list(SEEN.response_ids), list(SEEN.visual_tokens), [0.0, 0.5], range(90, 93)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"response_ids": (5, 8, 7)}, "response token 1 is 6 and 8"),
        ({"response_ids": (5, 6)}, "3 and 2 response tokens"),
        ({"visual_tokens": (64, 12)}, "visual token count 1 is 16 and 12"),
        ({"visual_tokens": (64,)}, "2 and 1 visual token counts"),
        ({"frame_times_s": (0.0, 0.6)}, "frame time 1 is 0.5 and 0.6"),
        ({"frame_times_s": (0.0, 0.5, 1.0)}, "2 and 3 frame times"),
        ({"response_positions": (91, 92, 93)}, "response position 0 is 90 and 91"),
    ],
)
def test_what_differs_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^student and teacher differ: {message}$"):
        check_same(SEEN, replace(SEEN, **changed))


def written(prompt: list[int], everything: list[int]) -> Aligned:
    """A teacher's input: whatever stands behind as many tokens as the prompt has."""
    response = everything[len(prompt) :]
    return Aligned(response, (), (), range(len(prompt), len(prompt) + len(response)))


@settings(deadline=None, max_examples=200)
@given(
    prompt=st.text(alphabet="abt e[],.\n0é日<|", min_size=1, max_size=12),
    response=st.text(alphabet="abt e[],.\n0é日>|", min_size=1, max_size=12),
)
@example(prompt="[", response="[1.5, 3.0]]")
@example(prompt="at ", response="the end")
@example(prompt="<thi", response="nk>")
def test_sampled_tokens_stay_what_they_are_behind_any_prompt(
    tokenizer: Any, prompt: str, response: str
) -> None:
    before, ids = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, response))
    student = Aligned(ids, (), (), range(len(before), len(before) + len(ids)))
    appended = before + ids
    check_same(student, written(before, appended))
    assert tokenizer.decode(appended) == prompt + response
    assert_same(token_weights(tokenizer, ids), token_weights(tokenizer, appended[len(before) :]))
    encoded_anew = tokenizer.encode(prompt + response, add_special_tokens=False)
    if encoded_anew != appended:
        with pytest.raises(ValueError, match="differ"):
            check_same(student, written(before, encoded_anew))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_tokens_that_no_encoder_writes_stay_what_they_are(tokenizer: Any, data: st.DataObject) -> None:
    tokens = st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=12)
    before, ids = data.draw(tokens), data.draw(tokens)
    student = Aligned(ids, (), (), range(len(before), len(before) + len(ids)))
    check_same(student, written(before, before + ids))


@pytest.mark.parametrize(("prompt", "response"), [("[", "[1.5, 3.0]]"), ("<thi", "nk>"), ("th", "e end")])
def test_a_text_encoded_anew_is_caught_where_tokens_merge(tokenizer: Any, prompt: str, response: str) -> None:
    before, ids = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, response))
    encoded_anew = tokenizer.encode(prompt + response, add_special_tokens=False)
    assert encoded_anew != before + ids
    with pytest.raises(ValueError, match="differ"):
        check_same(
            Aligned(ids, (), (), range(len(before), len(before) + len(ids))), written(before, encoded_anew)
        )
