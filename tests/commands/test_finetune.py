"""`keye finetune` as a user runs it: what it makes, what it refuses, and that nothing is lost when it stops."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from keyecli.model.checkpoint import read_entries
from tests.commands.conftest import Keye, run_keye
from tests.training.rows import CLIP, write_data

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

SMALL = ("--batch-tokens", "400", "--max-length", "1200", "--fps", "0.5", "--no-cache", "-q")


@pytest.fixture
def data(folder: Path) -> Path:
    return write_data(folder / "rows.jsonl")


def arguments(data: Path, model: Path, out: str, *more: str) -> list[str]:
    return ["finetune", "--data", str(data), "-m", str(model), "-o", out, *SMALL, *more]


def metrics(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_an_adapter_with_its_card(data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path) -> None:
    held_out = ("--eval-data", str(data), "--eval-steps", "1")
    more = ("--epochs", "2", "--lr", "1e-2", "--rank", "8", *held_out, "--json")
    code, out, err = keye(*arguments(data, tiny_checkpoint, "run", *more))
    assert (code, err) == (0, "")
    made = json.loads(out)
    steps = metrics(folder / "run", "step")
    assert made["schema"] == "keye.finetune/1"
    assert made["steps"] == len(steps) == steps[-1]["step"]
    assert [row["step"] for row in metrics(folder / "run", "eval")] == list(range(len(steps) + 1))
    assert made["rows"] == 24
    assert made["left_out"] == 0
    assert made["tokens"] == sum(step["tokens"] for step in steps)
    assert made["after"]["loss"] < made["before"]["loss"]
    assert steps[-1]["lr"] < 1e-2
    card = (folder / "run" / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(data.read_bytes()).hexdigest()[:12] in card
    assert (folder / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "run" / "adapter_config.json").read_text())["r"] == 8
    question = (
        "ask",
        str(CLIP),
        "Say one.",
        "-m",
        str(tiny_checkpoint),
        "--max-tokens",
        "8",
        "--no-think",
        "--json",
        "-q",
    )
    answers = []
    for adapter in (("--adapter", "run"), ()):
        code, out, _ = keye(*question, *adapter)
        assert code == 0
        answers.append(json.loads(out)["text"])
    assert answers[0] != answers[1]


@pytest.mark.parametrize("what", ["full", "projector", "sparse", "lora,projector"])
def test_what_is_trained_changes_and_nothing_else(
    what: str, data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path
) -> None:
    code, _, err = keye(
        *arguments(data, tiny_checkpoint, "run", "--train", what, "--steps", "2", "--lr", "1e-2")
    )
    assert (code, err) == (0, "")
    before = load_file(tiny_checkpoint / "model.safetensors")
    if "lora" in what:
        after = load_file(folder / "run" / "adapter_model.safetensors")
        changed = [name for name, tensor in after.items() if "mlp_AR" in name]
        assert changed
        assert all(name.rpartition("mlp_AR")[2] for name in changed)
        return
    after = load_file(folder / "run" / "model.safetensors")
    assert set(after) == set(read_entries(tiny_checkpoint))
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    expected = {"full": ("q_proj", "experts"), "projector": ("mlp_AR",), "sparse": ("sa_indexer", "experts")}[
        what
    ]
    frozen = {
        "full": ("sa_indexer", "visual", "mlp.gate"),
        "projector": ("model.layers", "visual"),
        "sparse": ("visual", "mlp.gate"),
    }[what]
    for part in expected:
        assert any(part in name for name in changed), part
    for part in frozen:
        assert not any(part in name for name in changed), part
    assert keye("ask", str(CLIP), "Say one.", "-m", "run", "--max-tokens", "4", "-q")[0] == 0


def test_the_indexer_learns_what_attention_looks_at(
    data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path
) -> None:
    more = ("--train", "indexer", "--epochs", "4", "--lr", "1e-2", "--eval-data", str(data))
    code, _, err = keye(*arguments(data, tiny_checkpoint, "run", *more))
    assert (code, err) == (0, "")
    first, last = (metrics(folder / "run", "eval")[place] for place in (0, -1))
    recalls = zip(first["indexer_recall"], last["indexer_recall"], last["best_recall"], strict=True)
    assert all(before < after <= best <= 1 for before, after, best in recalls)
    assert all(0 < share <= 1 for share in last["answer_recall"])
    steps = metrics(folder / "run", "step")
    assert steps[-1]["divergence"] < steps[0]["divergence"]


def test_a_killed_run_goes_on_to_the_same_bits(
    data: Path, tiny_checkpoint: Path, keye: Keye, isolated: dict[str, str], folder: Path
) -> None:
    more = ("--epochs", "3", "--save-steps", "1", "--lr", "1e-2", "--dropout", "0.1")
    code, _, err = keye(*arguments(data, tiny_checkpoint, "whole", *more))
    assert (code, err) == (0, "")
    draws = random.Random(3)
    wanted = len(metrics(folder / "whole", "step"))
    kills = 0
    for after in sorted(draws.sample(range(1, wanted - 1), 2)):
        resume = ("--resume",) if kills else ()
        command = [
            sys.executable,
            "-m",
            "keyecli",
            *arguments(data, tiny_checkpoint, "killed", *more, *resume),
        ]
        with subprocess.Popen(
            command, env=isolated, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ) as process:
            checkpoint = folder / "killed" / "checkpoints" / f"step-{after:08d}" / "state.json"
            while not checkpoint.exists() and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
    assert kills == 2
    code, _, err = keye(*arguments(data, tiny_checkpoint, "killed", *more, "--resume"))
    assert (code, err) == (0, "")
    assert load_bytes(folder / "killed") == load_bytes(folder / "whole")
    figures = [
        [(row["step"], row["loss"], row["norm"], row["tokens"]) for row in metrics(folder / name, "step")]
        for name in ("whole", "killed")
    ]
    assert figures[0] == figures[1]


def load_bytes(run: Path) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()


def test_ctrl_c_saves_and_leaves(
    data: Path, tiny_checkpoint: Path, isolated: dict[str, str], folder: Path
) -> None:
    command = [sys.executable, "-m", "keyecli", *arguments(data, tiny_checkpoint, "run", "--steps", "100000")]
    with subprocess.Popen(command, env=isolated, stderr=subprocess.PIPE, text=True) as process:
        lines = folder / "run" / "metrics.jsonl"
        while not (lines.exists() and lines.read_bytes().count(b"\n")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
    assert (process.returncode, said) == (130, "keye: interrupted\n")
    done = metrics(folder / "run", "step")[-1]["step"]
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == [f"step-{done:08d}"]


def test_a_loss_that_is_no_number_names_its_rows(
    data: Path, make_checkpoint: Any, tiny_tokenizer: Any, keye: Keye, folder: Path
) -> None:
    from tests.tiny import random_tensors, tiny_config

    config = tiny_config()
    tensors = random_tensors(config)
    # "Z" stands in one row alone.
    tensors["model.embed_tokens.weight"][tiny_tokenizer.encode("Z")] = float("nan")
    lines = data.read_text(encoding="utf-8").splitlines()
    lines[4] = lines[4].replace("number 4", "number Z")
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    checkpoint = make_checkpoint(config=config, tensors=tensors)
    code, _, err = keye(*arguments(data, checkpoint, "run", "--save-steps", "1", "--batch-tokens", "1"))
    assert code == 1
    assert f"the loss is not a number in {data}:5: nothing was updated" in err
    assert not (folder / "run" / "adapter_model.safetensors").exists()


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keyecli.training import checkpoints

    real, asked = shutil.disk_usage, []

    def full(path: Path) -> Any:
        asked.append(path)
        usage = real(path)
        return usage if len(asked) == 1 else usage._replace(free=0)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.shutil, "disk_usage", full)
        code, _, err = keye(*arguments(data, tiny_checkpoint, "run", "--save-steps", "1"))
    assert code == 5
    assert (
        "no space is left on the disk of run for a checkpoint; run/checkpoints/step-00000001 is whole" in err
    )
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    assert keye(*arguments(data, tiny_checkpoint, "run", "--save-steps", "1", "--resume"))[0] == 0


def test_a_bad_row_is_named_and_left_out(data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path) -> None:
    with data.open("a", encoding="utf-8") as file:
        file.write(
            '{"messages": [{"role": "user", "content": "<video>Who?"}, {"role": "assistant", "content": "me"}]'
        )
        file.write(', "videos": ["missing.mp4"]}\n{broken\n')
    loud = [part for part in arguments(data, tiny_checkpoint, "run", "--json") if part != "-q"]
    code, out, err = keye(*loud)
    assert code == 0
    assert json.loads(out)["left_out"] == 2
    assert "rows.jsonl:13" in err
    assert "rows.jsonl:14" in err
    assert "missing.mp4" in err
    code, _, err = keye(*arguments(data, tiny_checkpoint, "strict", "--strict"))
    assert code == 3
    assert "rows.jsonl:1" in err


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--data", "absent.jsonl"], 3, "absent.jsonl does not exist"),
        (["--train", "everything"], 2, "--train everything is not known"),
        (["--lr", "0"], 2, "--lr must be above 0"),
        (["--rank", "0"], 2, "the rank of an adapter must be at least 1"),
        (["--optimizer", "adamw8bit"], 2, "--optimizer adamw8bit needs an NVIDIA GPU"),
        (["--max-length", "8"], 3, "can be trained on"),
        (["--resume"], 2, "has no checkpoint to resume from"),
        (["--shard"], 2, "start several with torchrun"),
        (["--config", "missing.yaml"], 2, "missing.yaml does not exist"),
        (["-m", "nowhere"], 4, "nowhere"),
        (["--train", "full", "--quant", "int8"], 4, "changes weights that are quantised"),
    ],
)
def test_wrong_use(
    more: list[str], code: int, said: str, data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path
) -> None:
    found, _, err = keye(*arguments(data, tiny_checkpoint, "run", *more))
    assert (found, said in err) == (code, True), err
    assert err.count("\n") == 1


def test_a_folder_in_use_is_left_alone(data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "mine.txt").write_text("mine")
    code, _, err = keye(*arguments(data, tiny_checkpoint, "run"))
    assert (code, "run is not empty" in err) == (2, True)
    assert [path.name for path in (folder / "run").iterdir()] == ["mine.txt"]


def test_only_the_same_run_is_resumed(data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path) -> None:
    assert keye(*arguments(data, tiny_checkpoint, "run", "--steps", "2"))[0] == 0
    code, _, err = keye(*arguments(data, tiny_checkpoint, "run", "--steps", "2", "--resume", "--seed", "5"))
    assert (code, "has seed 0 and this one 5" in err) == (2, True)
    data.write_text(data.read_text() + "\n", encoding="utf-8")
    code, _, err = keye(*arguments(data, tiny_checkpoint, "run", "--steps", "2", "--resume"))
    assert (code, "is not the data that the run in run began with" in err) == (2, True)


def test_sums_in_a_fixed_order(
    data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU adds up in one order anyway: the same bits with and without, and torch was asked for it as long as the run took."""
    from keyecli.training.trainer import Trainer

    asked: list[bool] = []
    step = Trainer.step

    def watched(*positional: Any, **named: Any) -> Any:
        asked.append(torch.are_deterministic_algorithms_enabled())
        return step(*positional, **named)

    monkeypatch.setattr(Trainer, "step", watched)
    weights = []
    for out, more in (("plain", ()), ("ordered", ("--deterministic",))):
        code, _, err = keye(*arguments(data, tiny_checkpoint, out, "--steps", "1", *more))
        assert (code, err) == (0, "")
        weights.append(load_file(folder / out / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert asked == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_processes_of_accelerate(
    data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path, isolated: dict[str, str]
) -> None:
    (folder / "two.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\nnum_processes: 2\n"
        "machine_rank: 0\nmain_training_function: main\nmixed_precision: 'no'\nuse_cpu: true\n"
    )
    more = ("--steps", "2", "--lr", "1e-2")
    code, _, err = keye(*arguments(data, tiny_checkpoint, "one", *more))
    assert (code, err) == (0, "")
    command = arguments(data, tiny_checkpoint, "two", *more, "--config", "two.yaml", "--device", "cpu")
    made = run_keye(*command, env=isolated)
    assert made.returncode == 0, made.stderr
    # The first process alone speaks.
    assert made.stdout.count("lora, 2 steps") == 1
    one, two = (load_file(folder / out / "adapter_model.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    told = metrics(folder / "two", "step")
    assert [row["tokens"] for row in told] == [row["tokens"] for row in metrics(folder / "one", "step")]


def test_no_configuration_of_accelerate(data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path) -> None:
    code, out, err = keye(*arguments(data, tiny_checkpoint, "run", "--config", "none.yaml"))
    assert (code, out) == (2, "")
    assert "none.yaml does not exist" in err
