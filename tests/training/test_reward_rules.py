"""Rules on answers that are right, drawn at random, always the same, or meant to be taken for right."""

from __future__ import annotations

import doctest
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyecli.forge import Draws, questions, sample_scene
from keyecli.forge.write import training_row
from keyecli.tasks.spans import Pair, temporal_iou
from keyecli.training import reward_rules
from keyecli.training.attempts import Attempt
from keyecli.training.reward_reading import number_in, spans_in, time_in
from keyecli.training.reward_rules import BUILTIN
from keyecli.training.rows import RowError

DURATION_S = 60.0


def spans_within(tenths: int) -> st.SearchStrategy[list[Pair]]:
    span = st.tuples(st.integers(0, tenths), st.integers(1, 50))
    return st.lists(span.map(lambda pair: (pair[0] / 10, sum(pair) / 10)), min_size=1, max_size=5)


SPANS = spans_within(550)
CROWDED = spans_within(40)  # most overlap, so that a pairing one after another is seldom the best
# Of each rule, a row with its right answer; and two that are wrong but of the same form.
RIGHT: Mapping[str, tuple[dict[str, Any], str, tuple[str, str]]] = {
    "iou": ({"solution": [[3.0, 7.5]]}, "[[3.0, 7.5]]", ("[[0.0, 60.0]]", "[[8.0, 9.0]]")),
    "exact": ({"answer": "it moves left"}, "It moves left.", ("it moves right", "")),
    "choice": ({"solution": "<answer>B</answer>"}, "B", ("A", "C")),
    "count": ({"answer": "3"}, "three", ("2", "none")),
    "timestamp": ({"answer": "7.5"}, "0:07.5", ("0.0", "60.0")),
    "order": ({"answer": "the red circle"}, "red circle", ("the blue square", "the")),
    "cooccurrence": ({"answer": "yes"}, "Yes", ("no", "maybe")),
    "text": ({"answer": "GATE"}, "gate", ("lamp", "a gate is to be read")),
    "summary": (
        {"answer": "0.0 - 2.0: star spins\n1.0 - 3.0: word GATE"},
        "1.0 - 3.0: word GATE\n0.0 - 2.0: star spins",
        ("0.0 - 60.0: star spins\n0.0 - 60.0: word GATE", "A star spins."),
    ),
    "auto": ({"task": "read_word", "answer": "GATE"}, "GATE", ("gate", "LAMP")),
}


def scored(name: str, answer: str, row: Mapping[str, Any], **options: Any) -> float:
    return BUILTIN[name](Attempt(answer, row, duration_s=DURATION_S), **options)


def written(spans: Sequence[Pair]) -> str:
    return json.dumps(spans)


def by_spans(answer: Sequence[Pair], truth: Sequence[Pair], **options: Any) -> float:
    return scored("iou", written(answer), {"solution": [list(span) for span in truth]}, **options)


def forged_rows(scenes: int = 40) -> Iterator[dict[str, Any]]:
    for seed in range(scenes):
        scene = sample_scene(seed)
        for number, question in enumerate(questions(scene, Draws((seed, 1)))):
            yield training_row(scene, question, f"{seed}-{number}", "a.mp4")


FORGED = list(forged_rows())


def test_the_examples_of_the_rules_hold() -> None:
    results = doctest.testmod(reward_rules)
    assert results.attempted >= len(BUILTIN)
    assert not results.failed


# What every rule does.


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_earns_all_and_a_wrong_one_less(name: str) -> None:
    row, answer, wrong = RIGHT[name]
    assert scored(name, answer, row) == 1.0
    assert scored(name, f"<think>\nI see.\n</think>\n\n<answer>{answer}</answer>", row) == 1.0
    assert all(scored(name, other, row) < 0.3 for other in wrong)


@pytest.mark.parametrize("name", RIGHT)
def test_only_what_is_inside_of_one_answer_counts(name: str) -> None:
    row, answer, (wrong, _) = RIGHT[name]
    block = f"<answer>{answer}</answer>"
    for hidden in (
        f"<think>\n{answer}",
        f"<think>\n{block}",
        f"<think>\n{answer}\n</think>\n\n",
        f"<think>\n{block}</think>",
        f"Let me see. <think>\n{answer}\n</think>",
        f"{block}{block}",
        f"{block}<answer>{wrong}</answer>",
        f"<answer>{block}",
        f"<answer>{answer}",
        f"{answer}<answer></answer>",
    ):
        assert scored(name, hidden, row) == 0.0, hidden
    assert scored(name, f"<think>{answer}</think><answer>{wrong}</answer>", row) < 0.3
    assert BUILTIN[name](Attempt(answer, row, opened=True)) == 0.0


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("junk", ["", "[", "[[1,", "1", "0:", " ", "A ", "one ", "\n- ", "[]", "\0", "the"])
def test_junk_of_any_length_earns_nothing(name: str, junk: str) -> None:
    row, *_ = RIGHT[name]
    assert scored(name, junk * 5000, row) == 0.0


@pytest.mark.parametrize("name", RIGHT)
@given(answer=st.text(max_size=40))
def test_scores_lie_between_0_and_1(name: str, answer: str) -> None:
    row, *_ = RIGHT[name]
    assert 0.0 <= scored(name, answer, row) <= 1.0
    assert scored("format", answer, row) == 0.0


@pytest.mark.parametrize("name", sorted({*RIGHT} - {"auto"}))
def test_a_row_without_a_truth_is_an_error_whatever_the_answer(name: str) -> None:
    with pytest.raises(RowError, match=r"^row 7 holds no .* to compare answers with: tried "):
        scored(name, "<think>", {"id": 7, "solution": None, "answer": None})
    with pytest.raises(RowError, match=r"tried mine$"):
        scored(name, "", {**RIGHT[name][0], "mine": ""}, column="mine")


def test_errors_name_the_row_and_the_columns_that_were_tried() -> None:
    attempt = Attempt(
        "[]", {"answer": "[[7.5, 3.0]]", "solution": "B"}, question="When is\nthe red circle visible?"
    )
    with pytest.raises(RowError) as error:
        BUILTIN["iou"](attempt)
    assert str(error.value) == (
        'the row "When is the red circle visible?" holds no spans to compare answers with: '
        "tried solution, spans, ground_truth, answer, span"
    )
    with pytest.raises(RowError, match=r"^a row has no column task, by which auto chooses a reward$"):
        BUILTIN["auto"](Attempt("[]", {"answer": "B"}))


# Rows of `keye forge`.


def test_auto_gives_every_forged_answer_all() -> None:
    assert {row["task"] for row in FORGED} >= {
        "ground",
        "order",
        "cooccurrence",
        "summary",
        "motion",
        "appear",
    }
    for row in FORGED:
        reply = row["messages"][1]["content"]
        assert BUILTIN["auto"](Attempt(reply, row, duration_s=row["duration_s"])) == pytest.approx(1.0), row


def test_answers_to_other_questions_and_constant_ones_earn_less() -> None:
    generator = random.Random(0)
    for task in sorted({row["task"] for row in FORGED}):
        rows = [row for row in FORGED if row["task"] == task]
        answers = [row["answer"] for row in rows]
        drawn = [auto_of(row, generator.choice(answers)) for row in rows]
        assert sum(drawn) / len(rows) < 0.65, task
        for constant in {*answers[:5], "[]", "1", "yes"}:
            assert sum(auto_of(row, constant) for row in rows) / len(rows) < 0.8, (task, constant)


def test_the_whole_clip_is_a_poor_answer() -> None:
    rows = [row for row in FORGED if row["task"] in ("ground", "ground_motion")]
    whole = [auto_of(row, written([(0.0, row["duration_s"])])) for row in rows]
    assert sum(whole) / len(rows) < 0.6
    assert all(score < 1.0 for score, row in zip(whole, rows, strict=True) if row["solution"] == [])


def auto_of(row: Mapping[str, Any], answer: str) -> float:
    return BUILTIN["auto"](Attempt(answer, row, duration_s=row["duration_s"]))


def test_auto_takes_rows_of_timelens_for_spans() -> None:
    assert scored("auto", "[[1, 2]]", {"query": "a dog", "span": [[1.0, 2.0]]}) == 1.0
    assert scored("auto", "[[1, 2]]", {"events": [], "answer": "[[1.0, 2.0], [3.0, 4.0]]"}) == 0.5


# Spans.


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("[[3.0, 7.5]]", [(3.0, 7.5)]),
        ("[3, 7.5]", [(3.0, 7.5)]),
        ("[[12, 14],\n [3, 7.5]]", [(12.0, 14.0), (3.0, 7.5)]),
        ('```json\n{"spans": [[3.0, 7.5]]}\n```', [(3.0, 7.5)]),
        ("The 2 red ones are seen in [[3.0, 7.5]].", [(3.0, 7.5)]),
        ("[[0:03, 0:07.5]]", [(3.0, 7.5)]),
        ('[["0:03", "1:00:07.5"]]', [(3.0, 3607.5)]),
        ("0:03 - 0:07.5", [(3.0, 7.5)]),
        ("From 00:03 to 00:07.5, and 1:02:03 – 1:02:04", [(3.0, 7.5), (3723.0, 3724.0)]),
        ("[]", []),
        ("[[-3, 7]]", [(-3.0, 7.0)]),
        ("[[7.5, 3.0]]", None),
        ("[[3.0, 3.0]]", None),
        ("[[1.0, 2.0], [7.5, 3.0]]", None),
        ("0:07 - 0:03", None),
        ("0:03, 0:07", None),
        ("0:03 - 0:07 and 0:09", None),
        ("[[3.0, 7.5]", None),
        ("[[3.0, 7.5, 9.0]]", None),
        ("[[3.0, 7.5], []]", None),
        ("[[3.0], [7.5]]", None),
        ("[[NaN, 7.5]]", None),
        ('[["3", "7.5"]]', None),
        ("the 3 red and 7 blue", None),
        ("from 3 to 7.5", None),
        ("3.0 - 7.5", None),
        ("", None),
    ],
)
def test_spans_are_read_as_they_are_written_or_not_at_all(text: str, spans: list[Pair] | None) -> None:
    assert spans_in(text) == spans


@pytest.mark.parametrize(
    ("solution", "spans"),
    [
        ([[1.0, 2.0], [3, 4]], [(1.0, 2.0), (3.0, 4.0)]),
        ([1.0, 2.0], [(1.0, 2.0)]),
        ("[[1.0, 2.0]]", [(1.0, 2.0)]),
        ("<think>\nI see.</think>\n<answer>[[1.0, 2.0]]</answer>", [(1.0, 2.0)]),
        ("0:01 - 0:02", [(1.0, 2.0)]),
    ],
)
def test_a_row_may_write_its_spans_in_many_ways(solution: Any, spans: list[Pair]) -> None:
    for column in ("solution", "spans", "ground_truth", "answer", "span"):
        assert scored("iou", written(spans), {"solution": None, column: solution}) == 1.0
    assert scored("iou", written(spans), {"solution": [[8.0, 9.0]], "mine": solution}, column="mine") == 1.0


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("[]", 1.0),
        ("It never appears.", 1.0),
        ("There is no such moment in the video", 1.0),
        ("没有", 1.0),
        ("It never appears. " * 50, 0.0),
        ("[[0.0, 0.1]]", 0.0),
        ("It is not seen before [[3.0, 7.5]]", 0.0),
        ("It never appears, but from 3 to 7 seconds", 0.0),
        ("[[7.5, 3.0]]", 0.0),
        ("The red circle", 0.0),
        ("", 0.0),
    ],
)
def test_where_nothing_happens_only_saying_so_is_right(answer: str, score: float) -> None:
    for mode in ("union", "single", "hungarian"):
        assert scored("iou", answer, {"solution": []}, mode=mode) == score
        assert score == 0.0 or scored("iou", answer, {"solution": [[1.0, 2.0]]}, mode=mode) == 0.0


def test_a_single_span_is_one() -> None:
    truth = [(2.0, 4.0)]
    assert by_spans([(2.0, 4.0)], truth, mode="single") == 1.0
    assert by_spans([(3.0, 5.0)], truth, mode="single") == pytest.approx(1 / 3)
    assert by_spans([(2.0, 3.0), (3.0, 4.0)], truth, mode="single") == 0.0
    with pytest.raises(RowError, match=r"^a row has 2 spans, and iou:mode=single compares one$"):
        by_spans([(2.0, 4.0)], [(2.0, 4.0), (5.0, 6.0)], mode="single")


def test_many_spans_are_refused() -> None:
    tiny = [(number / 10, (number + 1) / 10) for number in range(20)]
    truth = [(0.0, 2.0)]
    assert by_spans(tiny[:8], truth) == pytest.approx(0.4)
    assert by_spans(tiny[:9], truth) == by_spans(tiny, truth) == 0.0
    assert by_spans(tiny, truth, most=20) == pytest.approx(1.0)
    assert by_spans(tiny[:3], truth, most=2) == 0.0
    assert by_spans(tiny, tiny[::2]) == pytest.approx(0.5)


def test_repeating_a_span_pays_only_where_it_is_not_counted() -> None:
    truth = [(2.0, 4.0)]
    assert by_spans(truth * 8, truth) == 1.0
    assert by_spans(truth * 8, truth, mode="hungarian") == pytest.approx(1 / 8)
    assert scored("iou", "[[2.0, 4.0]] or [[0.0, 2.0]]", {"solution": [[2.0, 4.0]]}) == 0.5


def test_spans_end_where_the_video_does() -> None:
    assert by_spans([(50.0, 9999.0)], [(50.0, DURATION_S)]) == 1.0
    assert by_spans([(-5.0, 3.0)], [(0.0, 3.0)]) == 1.0
    assert by_spans([(50.0, DURATION_S)], [(50.0, DURATION_S + 0.04), (70.0, 80.0)], mode="hungarian") == 1.0
    # A span outside is still one too many.
    assert by_spans([(1.0, 2.0), (70.0, 80.0)], [(1.0, 2.0)], mode="hungarian") == 0.5
    assert by_spans([(70.0, 80.0)], [(1.0, 2.0)]) == 0.0
    with pytest.raises(RowError, match=r"^a row has no span inside of its video"):
        by_spans([(1.0, 2.0)], [(70.0, 80.0)])


@pytest.mark.parametrize("mode", ["union", "hungarian"])
@given(left=SPANS, right=SPANS)
def test_iou_is_symmetric_and_bounded(mode: str, left: list[Pair], right: list[Pair]) -> None:
    score = by_spans(left, right, mode=mode)
    assert 0.0 <= score <= 1.0
    assert score == pytest.approx(by_spans(right, left, mode=mode))
    assert by_spans(left, left, mode=mode) == pytest.approx(1.0)


@given(SPANS, SPANS, st.floats(0.1, 0.9))
def test_splitting_a_span_changes_nothing(left: list[Pair], right: list[Pair], share: float) -> None:
    start, end = left[0]
    middle = start + share * (end - start)
    assert by_spans([(start, middle), (middle, end), *left[1:]], right) == pytest.approx(
        by_spans(left, right)
    )


@given(SPANS, SPANS, st.integers(1, 600))
def test_what_reaches_over_the_end_is_as_good_as_what_stops_there(
    left: list[Pair], right: list[Pair], tenths: int
) -> None:
    end_s = tenths / 10
    right = [(0.0, end_s), *right]
    cut = [(min(start, end_s), min(end, end_s)) for start, end in left]
    attempt = Attempt(written(left), {"solution": right}, duration_s=end_s)
    assert BUILTIN["iou"](attempt) == pytest.approx(temporal_iou(cut, [(0.0, end_s)]))


@given(CROWDED, CROWDED)
def test_the_best_pairing_is_that_of_trying_all(left: list[Pair], right: list[Pair]) -> None:
    few, many = sorted((left, right), key=len)
    best = max(
        sum(temporal_iou([one], [other]) for one, other in zip(few, order, strict=True))
        for order in permutations(many, len(few))
    )
    assert by_spans(left, right, mode="hungarian") == pytest.approx(best / len(many))


# Texts, letters, numbers, times.


@pytest.mark.parametrize(
    ("response", "opened", "score"),
    [
        ("<answer>B</answer>", False, 1.0),
        ("  <think>\nSo.\n</think>\n\n<answer>\nB\n</answer>\n", False, 1.0),
        ("So.\n</think>\n\n<answer>B</answer>", True, 1.0),
        ("I could write <answer>.</think><answer>B</answer>", True, 1.0),
        ("So.\n</think>\n\n<answer>B</answer>", False, 0.0),
        ("<answer>B</answer>", True, 0.0),
        ("<think>So.</think><answer>B</answer>", True, 0.0),
        ("<think>So.<answer>B</answer>", False, 0.0),
        ("So <answer>B</answer>", False, 0.0),
        ("<answer>B</answer>.", False, 0.0),
        ("<answer>B</answer><answer>B</answer>", False, 0.0),
        ("<answer><answer>B</answer></answer>", False, 0.0),
        ("<answer>B</think></answer>", False, 0.0),
        ("<answer> </answer>", False, 0.0),
        ("<answer>", False, 0.0),
        ("B", False, 0.0),
    ],
)
def test_format(response: str, opened: bool, score: float) -> None:
    assert BUILTIN["format"](Attempt(response, opened=opened)) == score


def test_exact_sees_through_case_space_and_form() -> None:
    row = {"answer": "It moves left"}
    for answer in ("it moves left.", "IT  MOVES\nLEFT", "Ｉt moves left。"):
        assert scored("exact", answer, row) == 1.0
    for answer in ("it moves left, right", "moves left", "it moves left?"):
        assert scored("exact", answer, row) == 0.0
    assert scored("exact", "3", {"answer": 3.0}) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        "(B)",
        "B.",
        "**B**",
        "B) red",
        "(b) red",
        "B. A red circle",
        "Option B",
        "The answer is B",
        "The answer is: (B).",
        "Answer: B because I see it",
        "答案是B",
        "B, and B again",
        "B, as on the X axis",
    ],
)
def test_a_letter_is_chosen(answer: str) -> None:
    assert scored("choice", answer, {"answer": "B"}) == 1.0
    assert scored("choice", answer, {"answer": "(B)"}) == 1.0
    assert scored("choice", answer, {"answer": "A"}) == scored("choice", answer, {"answer": "C"}) == 0.0


def test_the_letter_a_is_told_from_the_word() -> None:
    for answer in (
        "a",
        "A",
        "Option A shows it",
        "The answer is A as I see",
        "A is right",
        "A) A red circle",
    ):
        assert scored("choice", answer, {"answer": "A"}) == 1.0
    assert scored("choice", "I see a red circle: B", {"answer": "B"}) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "A or B",
        "A, B",
        "(A) (B) (C)",
        "B) red C) blue",
        "The answer is B, not C",
        "ABC",
        "A red circle",
        "be",
        "Both",
        "?",
    ],
)
def test_no_letter_is_chosen(answer: str) -> None:
    assert [scored("choice", answer, {"answer": letter}) for letter in "ABC"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["choice", "order", "cooccurrence"])
@pytest.mark.parametrize(
    "options", [["after", "before"], ["A. after", "B. before"], {"A": "after", "b": "(B) before"}]
)
def test_options_are_chosen_by_letter_or_words(name: str, options: Any) -> None:
    for truth in ("B", "before"):
        row = {"answer": truth, "options": options}
        for right in ("B", "before", "Before.", "B) before", "The answer is B"):
            assert scored(name, right, row) == 1.0
        for wrong in ("A", "after", "A) after", "before and after", "A or B", "C", ""):
            assert scored(name, wrong, row) == 0.0


def test_options_with_letters_in_their_words() -> None:
    row = {"answer": "B", "options": ["Vitamin A", "Vitamin C", "Vitamin B"]}
    assert scored("choice", "B) Vitamin C", row) == scored("choice", "vitamin c", row) == 1.0
    assert scored("choice", "Vitamin B", row) == 0.0
    with pytest.raises(RowError, match=r"^row 3 has options that are neither a list of texts nor an object"):
        scored("choice", "B", {"id": 3, "answer": "B", "options": "A. red B. blue"})


def test_order_is_one_of_two_names() -> None:
    row = {"answer": "the red circle"}
    for answer in ("the red circle", "The red circle.", "red circle"):
        assert scored("order", answer, row) == 1.0
    for answer in ("the red circle and the blue square", "the blue square", "red", "first"):
        assert scored("order", answer, row) == 0.0
    assert scored("order", "After.", {"solution": "<answer>after</answer>"}) == 1.0
    with pytest.raises(RowError, match="holds no yes or no"):
        scored("cooccurrence", "yes", {"answer": "before"})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3),
        ("Three.", 3),
        ("It appears twenty times", 20),
        ("３", 3),
        ("-3", -3),
        ("Answer-3", 3),
        ("3 3", None),
        ("three, or 3", None),
        ("2-3", None),
        ("3.0", None),
        ("1,000", None),
        ("twenty-one", None),
        ("thirty two", None),
        ("a dozen", None),
        ("none", None),
        ("9" * 5000, None),
    ],
)
def test_numbers(text: str, number: int | None) -> None:
    assert number_in(text) == number


@pytest.mark.parametrize(
    ("text", "time_s"),
    [
        ("7.5", 7.5),
        ("7,5 s.", 7.5),
        ("0:07.5", 7.5),
        ("1:02:03", 3723.0),
        ("1 min 30 s", 90.0),
        ("The red circle appears at 7.5 seconds.", 7.5),
        ("At 0:07 it moves", 7.0),
        ("at 7.5", None),
        ("The 3 red circles appear at 7.5 seconds.", None),
        ("0:07 or 0:08", None),
        ("7.5 8.5", None),
        ("-7.5", None),
        ("[7.5]", None),
    ],
)
def test_times(text: str, time_s: float | None) -> None:
    assert time_in(text) == time_s


def test_a_time_is_as_good_as_it_is_near() -> None:
    row = {"answer": "7.5"}
    assert scored("timestamp", "7.0", row) == pytest.approx(0.5)
    assert scored("timestamp", "8.5", row) == scored("timestamp", "60", row) == 0.0
    assert scored("timestamp", "8.5", row, tau=4.0) == pytest.approx(0.75)
    assert BUILTIN["timestamp"](Attempt("8.5", row, frame_interval_s=2.0)) == pytest.approx(0.75)
    assert BUILTIN["timestamp"](Attempt("8.0", row, frame_interval_s=0.1)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("answer", "score", "exact"),
    [
        ("STOP HERE", 1.0, 1.0),
        ("stop  here", 1.0, 0.0),
        ("STOP HER", 8 / 9, 0.0),
        ("STOP THERE", 8 / 9, 0.0),
        ("SHOP HERE", 8 / 9, 0.0),
        ("STOP HERE!!", 7 / 9, 0.0),
        ("STOP HERE STOP HERE", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("xyz", 0.0, 0.0),
    ],
)
def test_text_counts_its_wrong_characters(answer: str, score: float, exact: float) -> None:
    row = {"answer": "STOP HERE"}
    assert scored("text", answer, row) == pytest.approx(score)
    assert scored("text", answer, row, exact=True) == exact


def test_lines_of_a_summary_count_once() -> None:
    row = {"answer": "0.0 - 2.0: star spins\n1.0 - 3.0: word GATE"}
    assert scored("summary", "0.0 - 1.0: star spins", row) == pytest.approx(0.25)
    assert scored("summary", "A clip.\n- 0:00 - 0:02: Star spins.\n- 0:01 - 0:03: word gate", row) == 1.0
    assert scored("summary", "0.0 - 2.0: star spins\n" * 4, row) == pytest.approx(0.25)
    assert scored("summary", f"{row['answer']}\n" * 5, row) == 0.0
    assert scored("summary", "0.0 - 2.0: word GATE\n3.0 - 1.0: star spins", row) == pytest.approx(1 / 6)
