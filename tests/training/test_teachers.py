"""Which row has which teacher, and adapters that take the student's place for a moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keyecli.engine.loaded import LoadedModel, ModelFiles, load_weights, open_model
from keyecli.errors import ModelError, UsageError
from keyecli.model.adapter import save_adapter
from keyecli.model.lora import LoraSettings, add_lora, lora_parameters
from keyecli.training.distill import DistillSettings, DistillTrainer, TaughtGroup
from keyecli.training.distill_loss import Estimator
from keyecli.training.distributed import Processes
from keyecli.training.network import Network, freeze, trained
from keyecli.training.rollouts import Group, PlannedPrompt, Policy, PromptPlanner, Rollout, group_pack
from keyecli.training.sight import Seen, see
from keyecli.training.teachers import Route, load_teachers, read_routes, route_of
from keyecli.video.sampling import SamplingSettings
from tests.training.rows import Listed, text_row, video_row

TOKENS = 8


def student_of(files: ModelFiles, settings: LoraSettings, seed: int | None = None) -> LoadedModel:
    """The toy model with an adapter; with a seed, one that changes something."""
    loaded = load_weights(files)
    freeze(loaded.model, trained("lora"))
    add_lora(loaded.model, settings)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in lora_parameters(loaded.model).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return loaded


@pytest.fixture
def files(tiny_checkpoint: Path) -> ModelFiles:
    return open_model(tiny_checkpoint, device="cpu")


def adapter_in(folder: Path, files: ModelFiles, seed: int, **changes: Any) -> Path:
    settings = LoraSettings(**{"rank": 3, "alpha": 5, **changes})
    loaded = student_of(files, settings, seed)
    save_adapter(loaded.model, folder, settings=settings, base=files.name, revision=loaded.revision)
    return folder


def planned(loaded: LoadedModel, video: bool, number: int = 1) -> PlannedPrompt:
    row = video_row(number) if video else text_row(number)
    row = replace(row, extra={"task": "ground" if video else "count_objects"})
    planner = PromptPlanner(
        Listed([row]), loaded.tokenizer, loaded.config, SamplingSettings(), True, TOKENS, 2000
    )
    return planner.plan(0)


def answered(
    loaded: LoadedModel, video: bool = False, number: int = 1
) -> tuple[PlannedPrompt, Seen, list[Rollout]]:
    prompt = planned(loaded, video, number)
    seen = see(loaded, prompt.plans, learning=False)
    rollouts = [Rollout(seed) for seed in range(2)]
    loaded.model.eval()
    Policy(loaded, TOKENS).roll_out(prompt, seen, rollouts, 0)
    return prompt, seen, rollouts


@pytest.mark.parametrize("video", [False, True])
def test_an_adapter_in_the_students_place_is_the_model_that_it_was_trained_into(
    files: ModelFiles, tmp_path: Path, video: bool
) -> None:
    """Of another rank, and on fewer matrices than the student's."""
    folder = adapter_in(tmp_path / "teacher", files, 1, targets=("attention",))
    student = student_of(files, LoraSettings(rank=2), seed=2)
    network = Network(student.model, trained("lora"))
    (teacher,) = load_teachers([Route(folder, None)], files, student, network)
    prompt, seen, rollouts = answered(student, video)
    laid_out = Policy(student, TOKENS).lay_out(prompt, seen)
    pack = group_pack(laid_out, "", rollouts)
    before = network.states(pack, seen.sight).detach()
    side = teacher.side(pack, teacher.view(prompt, laid_out, seen)[1].sight)
    merged = load_weights(replace(files, adapter=folder))
    expected = Network(merged.model, trained("lora")).states(pack, seen.sight).detach()
    torch.testing.assert_close(side.states, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(side.logits(side.states), merged.model.logits(expected), rtol=1e-4, atol=1e-4)
    # And afterwards it is the student again, to the last bit.
    assert torch.equal(network.states(pack, seen.sight).detach(), before)
    assert not torch.equal(before, side.states)


def test_an_adapter_of_what_the_student_does_not_adapt_is_refused(files: ModelFiles, tmp_path: Path) -> None:
    folder = adapter_in(tmp_path / "teacher", files, 1)
    student = student_of(files, LoraSettings(rank=2, targets=("attention",)))
    network = Network(student.model, trained("lora"))
    with pytest.raises(ModelError, match="which the student's adapter does not: name it in --targets"):
        load_teachers([Route(folder, None)], files, student, network)
    whole = load_weights(files)
    with pytest.raises(ModelError, match="with --train full its base would change"):
        load_teachers([Route(folder, None)], files, whole, Network(whole.model, trained("full")))


def test_a_model_of_its_own_is_a_teacher(files: ModelFiles, tiny_checkpoint: Path) -> None:
    student = student_of(files, LoraSettings(rank=2), seed=2)
    network = Network(student.model, trained("lora"))
    routes = [Route(None, str(tiny_checkpoint)), Route(None, str(tiny_checkpoint), ("ground",))]
    first, second = load_teachers(routes, files, student, network)
    assert first is second
    prompt, seen, rollouts = answered(student, video=True)
    laid_out, own = first.view(prompt, Policy(student, TOKENS).lay_out(prompt, seen), seen)
    pack = group_pack(laid_out, "", rollouts)
    base = load_weights(files)
    expected = Network(base.model, trained("lora")).states(pack, own.sight).detach()
    torch.testing.assert_close(first.side(pack, own.sight).states, expected)


def taught(
    files: ModelFiles, student: LoadedModel, network: Network, folder: Path, number: int = 1
) -> TaughtGroup:
    (teacher,) = load_teachers([Route(folder, None)], files, student, network)
    prompt, seen, rollouts = answered(student, number=number)
    laid_out = Policy(student, TOKENS).lay_out(prompt, seen)
    return TaughtGroup(Group(0, prompt, rollouts), laid_out, seen, teacher)


@pytest.mark.parametrize("mode", ["overlap", "student", "teacher-on-student"])
def test_an_identical_teacher_changes_nothing(files: ModelFiles, tmp_path: Path, mode: Any) -> None:
    folder = adapter_in(tmp_path / "teacher", files, 2, rank=2, alpha=4)
    student = student_of(files, LoraSettings(rank=2, alpha=4), seed=2)
    network = Network(student.model, trained("lora"))
    settings = DistillSettings(estimator=Estimator(mode=mode), max_length=2000)
    trainer = DistillTrainer(student, network, Processes(), settings)
    group = taught(files, student, network, folder)
    gradients: list[torch.Tensor] = []
    trainer.update = lambda lr: (
        gradients.extend(p.grad for p in trainer.parameters if p.grad is not None) or 0.0
    )  # type: ignore[method-assign, func-returns-value]
    figures = trainer.step([group], 0.5)
    assert figures.divergence == pytest.approx(0, abs=1e-5)
    assert gradients
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-4


def test_two_teachers_that_contradict_each_other_are_both_recovered(
    files: ModelFiles, tmp_path: Path
) -> None:
    """Each on what the student writes about its own task."""
    student = student_of(files, LoraSettings(rank=4))
    network = Network(student.model, trained("lora"))
    settings = DistillSettings(lr=3e-2, max_length=2000, estimator=Estimator(k=1000), weighs=False)
    trainer = DistillTrainer(student, network, Processes(), settings)
    groups = [
        taught(files, student, network, adapter_in(tmp_path / str(number), files, number), number)
        for number in range(2)
    ]
    figures = [trainer.step(groups, 0.2) for _ in range(14)]
    for name in figures[0].teachers:
        assert figures[-1].teachers[name] < 0.75 * figures[0].teachers[name]
    assert len(figures[0].teachers) == 2


ROUTES = """
[[teacher]]
adapter = "grounding"
tasks = ["ground*"]
modalities = ["video"]

[[teacher]]
model = "other"
"""


def test_routes(tmp_path: Path, files: ModelFiles) -> None:
    path = tmp_path / "routes.toml"
    path.write_text(ROUTES, encoding="utf-8")
    (tmp_path / "other").mkdir()
    routes = read_routes(path)
    assert routes == [
        Route(tmp_path / "grounding", None, ("ground*",), ("video",)),
        Route(None, str(tmp_path / "other")),
    ]
    loaded = load_weights(files)
    video, text = planned(loaded, video=True), planned(loaded, video=False)
    assert (route_of(routes, video), route_of(routes, text)) == (0, 1)
    with pytest.raises(UsageError, match="rows:1: no teacher takes the task count_objects with text"):
        route_of(routes[:1], text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("teacher = 3", "must hold tables"),
        ("[[teacher", "is not TOML"),
        ('[[teacher]]\ntasks = ["a"]', "teacher 1 must name one adapter, or one model"),
        ('[[teacher]]\nadapter = "a"\nmodel = "b"', "teacher 1 must name one adapter, or one model"),
        ('[[teacher]]\nadapter = "a"\ntask = "b"', "teacher 1 has task, which is not known; use adapter"),
        ('[[teacher]]\nadapter = "a"\ntasks = 3', "tasks must be a list of texts"),
        ('[[teacher]]\nadapter = "a"\nmodalities = ["sound"]', "there is no modality sound; use video"),
    ],
)  # fmt: skip
def test_routes_that_cannot_be_read(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "routes.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        read_routes(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_routes(tmp_path / "absent.toml")
