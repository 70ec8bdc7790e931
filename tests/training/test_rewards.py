"""Rewards as they are named, weighed together, and given by users' functions and by a judge."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from keyecli.errors import ExitCode, KeyeError, UsageError
from keyecli.training import judge as judging
from keyecli.training.attempts import Attempt, Reward
from keyecli.training.reward_rules import BUILTIN
from keyecli.training.rewards import Composite, Part, Scores, Spec, compose, parse_spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("iou", Spec("iou", "iou")),
        ("iou:mode=hungarian,most=4", Spec("", "iou", {"mode": "hungarian", "most": "4"})),
        ("format:weight=0.1", Spec("", "format", weight=0.1)),
        ("format:gate", Spec("", "format", gate=True)),
        ("text:exact,weight=2", Spec("", "text", {"exact": "true"}, 2.0)),
        ("context:outcome=iou:mode=single", Spec("", "context", {"outcome": "iou:mode=single"})),
        ("my_module:fn", Spec("", "my_module:fn")),
        ("a.b.c:fn,weight=0.5", Spec("", "a.b.c:fn", weight=0.5)),
        ("my_module:fn:weight=0.5", Spec("", "my_module:fn", weight=0.5)),
        ("my_module:fn:gate", Spec("", "my_module:fn", gate=True)),
    ],
)
def test_specs(text: str, spec: Spec) -> None:
    assert parse_spec(text) == Spec(text, spec.name, spec.options, spec.weight, spec.gate)


KNOWN = (
    "known are iou, format, exact, choice, count, timestamp, order, cooccurrence, text, summary, auto, caption, context, "
    "and module:function for your own"
)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "there is nothing to learn from: give a --reward"),
        ([""], "--reward  must be written as NAME or NAME:option=value,option=value"),
        (["iou:"], "--reward iou: must be written as NAME or NAME:option=value,option=value"),
        (["iou:most=3,"], "--reward iou:most=3, must be written as NAME or NAME:option=value,option=value"),
        (["iuo"], f"there is no reward iuo; {KNOWN}"),
        (["iuo:mode=single"], f"there is no reward iuo; {KNOWN}"),
        (["iuo:gate"], f"there is no reward iuo; {KNOWN}"),
        (
            ["no_such_module:fn"],
            f"there is neither a reward no_such_module nor a module no_such_module; {KNOWN}",
        ),
        (["iou:mod=single"], "--reward iou has no option mod; known are mode, most, column, weight, gate"),
        (["format:column=a"], "--reward format has no option column; known are weight, gate"),
        (["json:dumps,indent=2"], "--reward json:dumps has no option indent; known are weight, gate"),
        (["iou:mode=best"], "--reward iou: mode must be union, single or hungarian, not best"),
        (["iou:mode"], "--reward iou: mode must be union, single or hungarian, not true"),
        (["iou:most=0"], "--reward iou: most must be a whole number above 0, not 0"),
        (["iou:most=2.5"], "--reward iou: most must be a whole number above 0, not 2.5"),
        (["timestamp:tau=nan"], "--reward timestamp: tau must be a number above 0, not nan"),
        (["timestamp:tau="], "--reward timestamp: tau must be a number above 0, not nothing"),
        (["text:exact=maybe"], "--reward text: exact must be true or false, not maybe"),
        (["iou:column="], "--reward iou: column must be a text, not nothing"),
        (["iou:weight=-1"], "--reward iou: weight must be a number from 0 on, not -1"),
        (["iou:weight=inf"], "--reward iou: weight must be a number from 0 on, not inf"),
        (["iou:gate=2"], "--reward iou: gate must be true or false, not 2"),
        (["iou:gate,weight=2"], "--reward iou:gate,weight=2 has a weight, and a gate has none"),
        (["iou:most=2,most=3"], "--reward iou:most=2,most=3 says most twice"),
        (["iou", "iou"], "--reward iou is given twice"),
        (
            ["format:gate"],
            "--reward format:gate only lets others through: give one that tells good answers from bad",
        ),
        (["iou:weight=0", "format:weight=0"], "every --reward has weight=0: give one a weight above 0"),
        (["caption"], "--reward caption needs --judge URL"),
        (["context:outcome=iou"], "--reward context needs --judge URL"),
    ],
)
def test_what_is_wrong_with_rewards_is_said_in_a_sentence(specs: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        compose(specs)
    assert str(error.value) == message


def test_options_reach_the_rule() -> None:
    score = compose(["iou:mode=hungarian,most=2,column=mine"])
    attempts = [
        Attempt(answer, {"mine": [[0, 1]]})
        for answer in ("[[0, 1]]", "[[0, 1], [2, 3]]", "[[0, 1], [2, 3], [4, 5]]")
    ]
    assert [scores.total for scores in score(attempts)] == [1.0, 0.5, 0.0]
    assert score([]) == []


def test_scores_are_weighed_and_gates_let_through() -> None:
    row = {"solution": [[0.0, 2.0]]}
    attempts = [
        Attempt(text, row) for text in ("<answer>[[0, 1]]</answer>", "[[0, 2]]", "<answer>B</answer>")
    ]
    (good, bare, wrong) = compose(["iou:weight=3", "format:weight=1"])(attempts)
    assert good == Scores(pytest.approx((3 * 0.5 + 1) / 4), {"iou": 0.5, "format": 1.0})
    assert bare == Scores(pytest.approx(3 / 4), {"iou": 1.0, "format": 0.0})
    assert wrong == Scores(pytest.approx(1 / 4), {"iou": 0.0, "format": 1.0})
    gated = compose(["format:gate", "iou"])(attempts)
    assert [scores.total for scores in gated] == [0.5, 0.0, 0.0]
    assert gated[1].parts == {"format": 0.0, "iou": 1.0}
    # Half of the score opens a gate; a weight of 0 is only looked at.
    assert compose(["iou:gate", "iou:mode=single,weight=0", "format"])(attempts)[0] == Scores(
        1.0, {"iou:gate": 0.5, "iou:mode=single,weight=0": 0.5, "format": 1.0}
    )


def test_no_score_of_a_part_is_no_score_at_all() -> None:
    one = Part("one", lambda attempts: [1.0 for _ in attempts])
    some = Part("some", lambda attempts: [None, 0.5])
    assert Composite((one, some))([Attempt("a"), Attempt("b")]) == [
        Scores(None, {"one": 1.0, "some": None}),
        Scores(0.75, {"one": 1.0, "some": 0.5}),
    ]
    closed = Part("closed", lambda attempts: [0.0 for _ in attempts], gate=True)
    assert Composite((closed, some, one))([Attempt("a"), Attempt("b")])[0].total is None


# Functions of users, and the judge's rewards.


OWN = """
import our_helper

KNOWN = 3

def shortness(response, row):
    return row["most"] - our_helper.length(response)

def nothing(response, row):
    return None

def no_number(response, row):
    return float("nan")

def broken(response, row):
    return row["missing"]

def spoils(response, row):
    row.clear()
    return True
"""


@pytest.fixture
def own_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module below the current folder, which needs another one in it."""
    (tmp_path / "our_rewards").mkdir()
    (tmp_path / "our_rewards" / "speech.py").write_text(OWN)
    (tmp_path / "our_helper.py").write_text("length = len\n")
    (tmp_path / "our_broken.py").write_text("raise ValueError('no luck today.')\n")
    (tmp_path / "our_wish.py").write_text("import what_is_not_installed\n")
    (tmp_path / "iou.py").write_text("raise AssertionError\n")
    monkeypatch.chdir(tmp_path)
    for name in ("our_rewards", "our_rewards.speech", "our_helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "our_rewards.speech"


def test_a_users_function_is_a_reward_of_any_size(own_rewards: str) -> None:
    path = list(sys.path)
    score = compose([f"{own_rewards}:shortness,weight=3", f"{own_rewards}:spoils", "iou:weight=0"])
    assert sys.path == path
    attempt = Attempt("[[1, 2]]", {"most": 4, "solution": [[1, 2]]})
    assert score([attempt]) == [
        Scores(
            pytest.approx((-4 * 3 + 1) / 4),
            {f"{own_rewards}:shortness": -4.0, f"{own_rewards}:spoils": 1.0, "iou": 1.0},
        )
    ]
    assert attempt.row == {"most": 4, "solution": [[1, 2]]}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "gives None for row 7: it must return a number"),
        ("no_number", "gives nan for row 7: it must return a number"),
        ("broken", "fails for row 7: KeyError: 'missing'"),
    ],
)
def test_a_users_function_that_fails_is_named_with_the_row(
    own_rewards: str, function: str, message: str
) -> None:
    score = compose([f"{own_rewards}:{function}"])
    with pytest.raises(KeyeError) as error:
        score([Attempt("a", {"id": 7})])
    assert str(error.value) == f"--reward {own_rewards}:{function} {message}"
    assert error.value.exit_code == ExitCode.FAILURE


def test_what_cannot_be_imported_is_said(own_rewards: str, tmp_path: Path) -> None:
    source = tmp_path / "our_rewards" / "speech.py"
    for spec, message in (
        (
            "our_rewards.none:fn",
            f"there is neither a reward our_rewards.none nor a module our_rewards.none; {KNOWN}",
        ),
        ("our_broken:fn", "--reward our_broken:fn cannot be imported: ValueError: no luck today"),
        (
            "our_wish:fn",
            "--reward our_wish:fn cannot be imported: ModuleNotFoundError: No module named 'what_is_not_installed'",
        ),
        (f"{own_rewards}:fn", f"--reward {own_rewards}:fn: there is no function fn in {source}"),
        (f"{own_rewards}:KNOWN", f"--reward {own_rewards}:KNOWN: there is no function KNOWN in {source}"),
        ("our_rewards:fn", "--reward our_rewards:fn: there is no function fn in our_rewards"),
    ):
        with pytest.raises(UsageError) as error:
            compose([spec])
        assert str(error.value) == message


def test_judged_rewards_are_made_by_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def judge_reward(
        name: str, options: Mapping[str, str], judge: Any, outcome: Reward | None, format: Any
    ) -> Reward:
        asked.append((name, options, judge, outcome and list(outcome(ATTEMPTS)), format))
        return lambda attempts: [None if name == "caption" else 0.5 for _ in attempts]

    monkeypatch.setattr(judging, "judge_reward", judge_reward)
    judge = object()
    score = compose(["context:outcome=iou:mode=single,least=0.7,weight=3", "exact"], judge)
    assert [scores.total for scores in score(ATTEMPTS)] == [0.625, 0.375]
    assert compose(["caption", "exact"], judge)(ATTEMPTS)[0] == Scores(None, {"caption": None, "exact": 1.0})
    compose(["context"], judge)
    form = BUILTIN["format"]
    assert asked == [
        ("context", {"least": "0.7"}, judge, [1.0, 0.0], form),
        ("caption", {}, judge, None, form),
        ("context", {}, judge, [1.0, 0.0], form),
    ]


ATTEMPTS = [Attempt(answer, {"task": "ground", "answer": "[[1, 2]]"}) for answer in ("[[1, 2]]", "B")]


@pytest.mark.parametrize("outcome", ["caption", "context", "iou:weight=2", "iou:gate"])
def test_the_outcome_of_context_is_a_rule(outcome: str) -> None:
    with pytest.raises(UsageError) as error:
        compose([f"context:outcome={outcome}"], judge=object())
    assert str(error.value) == (
        f"--reward context: outcome must be a rule such as iou, without weight or gate, not {outcome}"
    )
