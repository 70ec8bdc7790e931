"""`keye distill` as a user runs it: a student with the teachers of its rows, refusals, and that nothing is lost when it stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keyecli.engine.loaded import open_model
from tests.commands.conftest import Keye
from tests.commands.test_rl import few_rows, metrics, weights
from tests.training.rows import write_data
from tests.training.test_teachers import adapter_in

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

SMALL = ("--prompts", "3", "--max-tokens", "6", "--max-length", "1200", "--fps", "0.5", "--no-cache", "-q")
ROUTES = """
[[teacher]]
adapter = "first"
modalities = ["video"]

[[teacher]]
adapter = "second"
tasks = "words"
"""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """Two adapters that answer differently."""
    made = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("first", "second")):
        adapter_in(made / name, open_model(tiny_checkpoint, device="cpu"), number)
    return made


@pytest.fixture
def data(folder: Path, adapters: Path) -> Path:
    """Rows, and what teaches them."""
    for name in ("first", "second"):
        (folder / name).symlink_to(adapters / name)
    (folder / "routes.toml").write_text(ROUTES, encoding="utf-8")
    return write_data(folder / "rows.jsonl", texts=4, videos=2, task="words")


def arguments(data: Path, model: Path, out: str, *more: str) -> list[str]:
    return [
        "distill",
        "--data",
        str(data),
        "--teachers",
        "routes.toml",
        "-m",
        str(model),
        "-o",
        out,
        *SMALL,
        *more,
    ]


def test_two_teachers_into_one_adapter(data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path) -> None:
    more = (
        "--steps",
        "2",
        "--lr",
        "1e-2",
        "--reward",
        "exact",
        "--eval-data",
        str(few_rows(folder)),
        "--json",
    )
    code, out, err = keye(*arguments(data, tiny_checkpoint, "run", *more))
    assert (code, err) == (0, "")
    made = json.loads(out)
    steps = metrics(folder / "run", "step")
    assert (made["schema"], made["steps"], made["tries"]) == ("keye.distill/1", 2, 6)
    assert {name for step in steps for name in step["teachers"]} == {"first", "second"}
    assert all(step["divergence"] > 0.1 for step in steps)
    assert made["after"]["rows"] == 2
    assert "on-policy distillation (overlap) from first, second" in (folder / "run" / "README.md").read_text()
    assert (folder / "run" / "rollouts.html").is_file()
    assert weights(folder / "run") != weights(folder / "first")


@pytest.mark.parametrize("more", [("--mode", "student", "--no-weights"), ("--literal",)])
def test_other_estimators(
    more: tuple[str, ...], data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path
) -> None:
    code, _, err = keye(*arguments(data, tiny_checkpoint, "run", "--steps", "1", *more))
    assert (code, err) == (0, "")
    (step,) = metrics(folder / "run", "step")
    assert step["divergence"] > 0
    # Rows need not have anything that answers could be compared with: the default reward knows no task of that name.
    assert step["groups"] == 3


def test_a_run_that_broke_off_goes_on_to_the_same_bits(
    data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keyecli.training.distill import DistillTrainer

    more = ("--steps", "2", "--save-steps", "1", "--lr", "1e-2")
    assert keye(*arguments(data, tiny_checkpoint, "whole", *more))[0] == 0
    learn, steps = DistillTrainer.step, []

    def breaking(*arguments: Any) -> Any:
        steps.append(arguments)
        if len(steps) == 2:
            raise MemoryError("gone")
        return learn(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(DistillTrainer, "step", breaking)
        assert keye(*arguments(data, tiny_checkpoint, "broken", *more))[0] != 0
    assert not (folder / "broken" / "adapter_model.safetensors").exists()
    code, _, err = keye(*arguments(data, tiny_checkpoint, "broken", *more, "--resume"))
    assert (code, err) == (0, "")
    assert weights(folder / "broken") == weights(folder / "whole")


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--teachers", "absent.toml"], 2, "--teachers absent.toml cannot be read"),
        (["--mode", "forward"], 2, "--mode forward is not known; use overlap, student, teacher-on-student"),
        (["--config", "missing.yaml"], 2, "missing.yaml does not exist"),
        (["--shard"], 2, "--shard shares the model out among processes, and there is one"),
        (["--top-k", "0"], 2, "--top-k must be at least 1"),
        (["--train", "projector"], 2, "--train projector does not go with keye distill"),
        (["--train", "full"], 4, "with --train full its base would change under it"),
        (["--targets", "attention"], 4, "which the student's adapter does not: name it in --targets"),
        (["--teachers", "partial.toml"], 2, "no teacher takes the task words with"),
    ],
)
def test_wrong_use(
    more: list[str], code: int, said: str, data: Path, tiny_checkpoint: Path, keye: Keye, folder: Path
) -> None:
    (folder / "partial.toml").write_text(
        '[[teacher]]\nadapter = "first"\ntasks = "ground"\n', encoding="utf-8"
    )
    found, _, err = keye(*arguments(data, tiny_checkpoint, "run", "--steps", "1", *more))
    assert (found, said in err) == (code, True), err
    assert err.count("\n") == 1


def test_what_has_to_be_given(keye: Keye) -> None:
    code, _, err = keye("distill", "--data", "rows.jsonl", "-o", "run")
    assert (code, err.startswith("keye: give --data FILE, --teachers FILE and -o DIR")) == (2, True)
