"""`keye rl` as a user runs it: what it makes, what it refuses, and that nothing is lost when it stops."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.commands.conftest import Keye
from tests.training.rows import CLIP, write_data

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

# A toy model writes noise: what is rewarded is a property of noise that it can change.
REWARDS = """
def evenness(response, row):
    return sum(ord(letter) % 2 == 0 for letter in response) / max(1, len(response))

def nothing(response, row):
    return 0.5

def broken(response, row):
    raise KeyError("gone")
"""
SMALL = (
    "--prompts", "2", "--rollouts", "3", "--minibatches", "2", "--max-tokens", "6", "--max-length", "1200", "--fps", "0.5",
    "--no-cache", "-q",
)  # fmt: skip


@pytest.fixture
def data(folder: Path) -> Path:
    (folder / "own_rewards.py").write_text(REWARDS, encoding="utf-8")
    return write_data(folder / "rows.jsonl", texts=4, videos=1, task="noise")


def arguments(
    data: Path, model: Path, out: str, *more: str, reward: str = "own_rewards:evenness"
) -> list[str]:
    return ["rl", "--data", str(data), "-m", str(model), "-o", out, *SMALL, "--reward", reward, *more]


def metrics(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def few_rows(folder: Path) -> Path:
    """Rows to be measured, one of each kind."""
    return write_data(folder / "held_out.jsonl", texts=1, videos=1, task="noise")


def weights(run: Path) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()


def test_an_adapter_with_its_card_and_page(
    data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path
) -> None:
    more = (
        "--steps",
        "2",
        "--lr",
        "1e-2",
        "--rank",
        "4",
        "--eval-data",
        str(few_rows(folder)),
        "--watch-steps",
        "1",
        "--json",
    )
    code, out, err = keye(*arguments(data, tiny_checkpoint, "run", *more))
    assert (code, err) == (0, "")
    made = json.loads(out)
    steps = metrics(folder / "run", "step")
    assert (made["schema"], made["steps"], len(steps)) == ("keye.rl/1", 2, 2)
    assert made["tries"] == 3 * (made["groups"] + made["dropped"])
    assert made["before"]["rows"] == made["after"]["rows"] == 2
    assert steps[0]["families"].keys() == {"noise"}
    assert steps[0]["agreement"] == steps[1]["agreement"] == 1.0
    assert steps[0]["divergence"] == pytest.approx(0, abs=1e-6)
    assert steps[1]["divergence"] > 0
    assert all(step["mismatch"] < 1e-4 for step in steps)
    page = (folder / "run" / "rollouts.html").read_text(encoding="utf-8")
    assert "Say " in page
    shown = [json.loads(line) for line in (folder / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {group["step"] for group in shown} == {1, 2}
    for group in shown:
        scores = [one["score"] for one in group["rollouts"]]
        gains = [one["advantage"] for one in group["rollouts"]]
        assert group["mean"] == pytest.approx(sum(scores) / 3)
        assert [one["versions"][0][0] for one in group["rollouts"]] == [group["step"] - 1] * 3
        if group["kept"]:
            assert max(range(3), key=scores.__getitem__) == max(range(3), key=gains.__getitem__)
    assert "held-out reward" in (folder / "run" / "README.md").read_text(encoding="utf-8")
    question = ("ask", str(CLIP), "Say one.", "-m", str(tiny_checkpoint), "--max-tokens", "4", "-q")
    assert keye(*question, "--adapter", "run")[0] == 0


@pytest.mark.parametrize(
    "more",
    [
        ("--algorithm", "grpo", "--train", "full"),
        ("--algorithm", "reinforce", "--minibatches", "1", "--train", "lora,router", "--no-think"),
    ],
)
def test_other_ways_of_learning(
    more: tuple[str, ...], data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path
) -> None:
    code, out, err = keye(*arguments(data, tiny_checkpoint, "run", "--steps", "1", "--lr", "1e-3", *more))
    assert (code, err) == (0, "")
    assert "1 steps" in out
    frozen = ("visual", "mlp_AR", "sa_indexer")
    name = "model.safetensors" if "full" in more else "adapter_model.safetensors"
    after = load_file(folder / "run" / name)
    if "full" in more:
        before = load_file(tiny_checkpoint / name)
        changed = [key for key in after if not after[key].equal(before[key])]
        assert changed
        assert not any(part in key for key in changed for part in (*frozen, "mlp.gate"))
    else:
        assert any("mlp.gate" in key for key in after)
        assert not any(part in key for key in after for part in frozen)


def test_a_killed_run_goes_on_to_the_same_bits(
    data: Path, tiny_checkpoint: Path, keye: Keye, isolated: dict[str, str], folder: Path
) -> None:
    """With tries that take several steps, so that there are always some that have not ended."""
    more = ("--steps", "3", "--save-steps", "1", "--lr", "1e-2", "--partial-tokens", "3", "--bucket-scaling")
    code, _, err = keye(*arguments(data, tiny_checkpoint, "whole", *more))
    assert (code, err) == (0, "")
    told = metrics(folder / "whole", "step")
    assert any(step["waiting"] for step in told)
    shown = [json.loads(line) for line in (folder / "whole" / "rollouts.jsonl").read_text().splitlines()]
    assert any(len(one["versions"]) == 2 for group in shown for one in group["rollouts"])
    command = [sys.executable, "-m", "keyecli", *arguments(data, tiny_checkpoint, "killed", *more)]
    with subprocess.Popen(command, env=isolated, stderr=subprocess.DEVNULL) as process:
        checkpoint = folder / "killed" / "checkpoints" / "step-00000001" / "state.json"
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    code, _, err = keye(*arguments(data, tiny_checkpoint, "killed", *more, "--resume"))
    assert (code, err) == (0, "")
    assert weights(folder / "killed") == weights(folder / "whole")
    figures = [
        [(row["step"], row["reward"], row["norm"]) for row in metrics(folder / name, "step")]
        for name in ("whole", "killed")
    ]
    assert figures[0] == figures[1]
    lines = [(folder / name / "rollouts.jsonl").read_bytes() for name in ("whole", "killed")]
    assert lines[0] == lines[1]


def test_tries_that_are_all_as_good_teach_nothing(
    data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path
) -> None:
    loud = [
        part
        for part in arguments(
            data,
            tiny_checkpoint,
            "run",
            "--steps",
            "1",
            "--refills",
            "2",
            "--json",
            reward="own_rewards:nothing",
        )
        if part != "-q"
    ]
    code, out, err = keye(*loud)
    assert code == 0
    assert "in step 1 all tries of each of 4 prompts were equally good, so nothing was learnt" in err
    made = json.loads(out)
    assert (made["groups"], made["dropped"], made["tries"]) == (0, 4, 12)
    (step,) = metrics(folder / "run", "step")
    assert (step["reward"], step["entropy"], step["norm"]) == (0.5, None, None)


def test_rows_of_the_wanted_difficulty(data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path) -> None:
    code, _, err = keye(
        *arguments(data, tiny_checkpoint, "run", "--steps", "1", "--difficulty", "0:0.99", "--refills", "1")
    )
    assert (code, err) == (0, "")
    known = [json.loads(line) for line in (folder / "run" / "difficulty.jsonl").read_text().splitlines()]
    assert [row["row"] for row in known] == list(range(5))
    assert all(0 <= row["reward"] <= 1 for row in known)
    code, _, err = keye(*arguments(data, tiny_checkpoint, "none", "--difficulty", "2:3"))
    assert (code, "has a mean reward from 2.0 to 3.0: widen --difficulty" in err) == (3, True)


def test_rows_that_cannot_be_scored_are_left_out(
    data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path
) -> None:
    more = ("--steps", "1", "--refills", "1", "--prompts", "5", "--minibatches", "1", "--json")
    loud = [part for part in arguments(data, tiny_checkpoint, "run", *more, reward="iou") if part != "-q"]
    code, out, err = keye(*loud)
    assert code == 0
    assert json.loads(out)["left_out"] == 5
    assert "rows.jsonl:1" in err


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--data", "absent.jsonl"], 3, "absent.jsonl does not exist"),
        (["--reward", "iouu"], 2, "there is no reward iouu; known are iou"),
        (["--reward", "own_rewards:absent"], 2, "there is no function absent"),
        (["--reward", "own_rewards:broken"], 1, "--reward own_rewards:broken fails for"),
        (["--reward", "caption"], 2, "--reward caption needs --judge URL"),
        (["--judge", "http://localhost:1/v1"], 2, "--judge needs --judge-model NAME"),
        (["--algorithm", "ppo"], 2, "--algorithm ppo is not known; use gspo, grpo, reinforce"),
        (["--algorithm", "reinforce"], 2, "use --minibatches 1"),
        (["--train", "sparse"], 2, "--train sparse does not go with keye rl"),
        (["--train", "lora,projector"], 2, "--train lora,projector does not go with keye rl"),
        (["--rollouts", "1"], 2, "--rollouts must be at least 2"),
        (["--prompts", "1"], 2, "--minibatches 2 cannot be made of 1 prompts"),
        (["--clip", "high"], 2, "--clip must be LOW:HIGH, two numbers, not high"),
        (["--difficulty", "0.9:0.1"], 2, "--difficulty 0.9:0.1 must rise"),
        (["--max-length", "8"], 3, "no row of the data can be answered"),
        (["--lr", "0"], 2, "--lr must be above 0"),
        (["--resume"], 2, "has no checkpoint to resume from"),
        (["--config", "missing.yaml"], 2, "missing.yaml does not exist"),
        (["--shard"], 2, "--shard shares the model out among processes, and there is one"),
        (["-m", "nowhere"], 4, "nowhere"),
    ],
)
def test_wrong_use(
    more: list[str], code: int, said: str, data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path
) -> None:
    found, _, err = keye(*arguments(data, tiny_checkpoint, "run", "--steps", "1", *more))
    assert (found, said in err) == (code, True), err
    assert err.count("\n") == 1


def test_what_has_to_be_given(data: Path, keye: Keye) -> None:
    code, _, err = keye("rl", "--data", str(data), "-o", "run")
    assert code == 2
    assert err == (
        "keye: give --data FILE, --reward NAME and -o DIR, as in `keye rl --data rows.jsonl --reward iou -o runs/first`\n"
    )
