"""Teachers of a student: adapters over its own base, swapped in for a moment, or models of their own; and which row has which.

S learnt tokens of a pack, D width of a network's states.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keyecli.engine.loaded import LoadedModel, ModelFiles, load_weights, open_model
from keyecli.errors import ModelError, UsageError
from keyecli.model.adapter import EXPERT_PARAMETERS, Adapter, fit_adapter, load_adapter
from keyecli.model.checkpoint import plan_load
from keyecli.model.lora import LoraExperts, LoraLinear
from keyecli.model.prompt import Prompt
from keyecli.model.quantize import quantization_in
from keyecli.training.distill_loss import Side
from keyecli.training.examples import lay_out_prompt
from keyecli.training.network import Network, Sight, Trained
from keyecli.training.packing import Pack
from keyecli.training.rollouts import PlannedPrompt
from keyecli.training.sight import Seen, see

_KEYS = {"adapter", "model", "tasks", "modalities"}
MODALITIES = ("video", "image", "text")


@dataclass(frozen=True)
class Route:
    """Which rows go to a teacher: those of its tasks (patterns as of file names) and of its modalities; () is any.

    One of `adapter`, a folder that training wrote, and `model`, a folder or a hub name, is given.
    """

    adapter: Path | None
    model: str | None
    tasks: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.adapter or self.model)

    def takes(self, prompt: PlannedPrompt) -> bool:
        tasks = not self.tasks or any(fnmatchcase(prompt.family, pattern) for pattern in self.tasks)
        return tasks and (not self.modalities or modality_of(prompt) in self.modalities)


def modality_of(prompt: PlannedPrompt) -> str:
    """What a prompt shows: video where there is one, else image, else text."""
    kinds = {plan.sampling.kind for plan in prompt.plans}
    return next((kind for kind in MODALITIES if kind in kinds), "text")


def read_routes(path: Path) -> list[Route]:
    """The routes of a TOML file, tables named teacher; paths in it count from its folder.

    UsageError for a file that is none, for a key that is not known, and for a table that names no teacher or two.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--teachers {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--teachers {path} is not TOML: {error}") from error
    tables = given.get("teacher")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"--teachers {path} must hold tables [[teacher]], each with an adapter or a model")
    return [_route(table, number, path) for number, table in enumerate(tables, start=1)]


def _route(table: Mapping[str, Any], number: int, path: Path) -> Route:
    where = f"--teachers {path}: teacher {number}"
    if unknown := sorted(set(table) - _KEYS):
        raise UsageError(f"{where} has {unknown[0]}, which is not known; use {', '.join(sorted(_KEYS))}")
    adapter, model = table.get("adapter"), table.get("model")
    if (adapter is None) == (model is None) or not isinstance(adapter or model, str):
        raise UsageError(f"{where} must name one adapter, or one model")
    modalities = _texts(table, "modalities", where)
    if wrong := [name for name in modalities if name not in MODALITIES]:
        raise UsageError(f"{where}: there is no modality {wrong[0]}; use {', '.join(MODALITIES)}")
    folder = path.parent
    if isinstance(model, str) and (folder / model).is_dir():
        model = str(folder / model)
    return Route(
        None if adapter is None else folder / adapter, model, _texts(table, "tasks", where), modalities
    )


def _texts(table: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = table.get(key, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(item, str) for item in texts):
        raise UsageError(f"{where}: {key} must be a list of texts")
    return tuple(texts)


def route_of(routes: Sequence[Route], prompt: PlannedPrompt) -> int:
    """The first route that takes a prompt. UsageError where none does: a row without a teacher is a mistake in the routes."""
    for number, route in enumerate(routes):
        if route.takes(prompt):
            return number
    raise UsageError(
        f"{prompt.row.source}: no teacher takes the task {prompt.family or '(none)'} with {modality_of(prompt)}: "
        "add a [[teacher]] for it, or one without tasks"
    )


class Teacher:
    """A network that says how likely it would have found what the student wrote; nothing of it learns.

    swap: what makes the student's network be this teacher for a moment; None for a network of its own, which has a template and
    a vision tower of its own too.
    """

    def __init__(
        self, name: str, loaded: LoadedModel, network: Network, swap: AdapterSwap | None = None
    ) -> None:
        self.name, self.loaded, self._network, self._swap = name, loaded, network, swap

    @property
    def shares_base(self) -> bool:
        return self._swap is not None

    def view(self, prompt: PlannedPrompt, laid_out: Prompt, seen: Seen) -> tuple[Prompt, Seen]:
        """A prompt as this teacher is given it, where the student was given `laid_out` and `seen`."""
        if self.shares_base:
            return laid_out, seen
        loaded = self.loaded
        own = see(loaded, prompt.plans, learning=False)
        return lay_out_prompt(loaded.tokenizer, loaded.config, prompt.row, own.visuals), own

    @torch.no_grad()
    def side(self, batch: Pack, sight: Sight) -> Side:
        """Its states before the learnt tokens of a pack on its device, and its head."""
        model = self._network.model
        with self._active(model):
            states = self._network.states(batch, sight)

        def logits(part: Tensor) -> Tensor:
            with self._active(model.lm_head):
                return model.logits(part)

        return Side(states, logits)

    def _active(self, part: nn.Module) -> AbstractContextManager[None]:
        return nullcontext() if self._swap is None else self._swap.active(part)


class AdapterSwap:
    """An adapter of another training over the base that a student's own adapter stands beside: its factors take the place of
    the student's while it is active, so that there is one copy of the base.

    ModelError for an adapter that changes what the student's does not.
    """

    def __init__(self, folder: Path, adapter: Adapter, model: nn.Module) -> None:
        self._linears: list[tuple[LoraLinear, Tensor | None, Tensor | None]] = []
        self._experts: list[tuple[LoraExperts, dict[str, Tensor]]] = []
        self._whole: list[tuple[nn.Module, str, Tensor]] = []
        left = dict(adapter.added)
        for name, module in model.named_modules():
            if isinstance(module, LoraLinear):
                pair = left.pop(f"{name}.weight", None)
                like = module.lora_A
                first, second = (
                    (None, None)
                    if pair is None
                    else (factor.t().contiguous().to(like.device, like.dtype) for factor in pair)
                )
                self._linears.append((module, first, second))
            elif isinstance(module, LoraExperts):
                found: dict[str, Tensor] = {}
                for parameter, matrix in zip(EXPERT_PARAMETERS, ("gate_up", "down"), strict=True):
                    own = getattr(module, f"{matrix}_A")
                    pair = None if own is None else left.pop(f"{name}.{parameter}", None)
                    if pair is not None:
                        found |= {
                            f"{matrix}_{letter}": factor.contiguous().to(own.device, own.dtype)
                            for letter, factor in zip("AB", pair, strict=True)
                        }
                self._experts.append((module, found))
        if left:
            raise ModelError(
                f"the teacher {folder} adapts {next(iter(left))}, which the student's adapter does not: name it in --targets"
            )
        known = {
            f"{name}.{leaf}".replace(".base_layer.", "."): (module, leaf, parameter)
            for name, module in model.named_modules()
            for leaf, parameter in module.named_parameters(recurse=False)
        }
        for name, tensor in adapter.replaced.items():
            module, leaf, like = known[name]
            self._whole.append((module, leaf, tensor.to(like.device, like.dtype)))

    @contextmanager
    def active(self, part: nn.Module) -> Iterator[None]:
        """Have the model, or a part of it, be the teacher's; without gradients, never while the student computes, and with the
        part whole in this process."""
        inside = set(part.modules())
        linears = [one for one in self._linears if one[0] in inside]
        adapted = [one for one in self._experts if one[0] in inside]
        kept: list[tuple[nn.Parameter, Tensor]] = []
        modules = [*(one[0] for one in linears), *(one[0] for one in adapted)]
        scales = [module.scale for module in modules]

        def put(parameter: nn.Parameter, data: Tensor) -> None:
            kept.append((parameter, parameter.data))
            parameter.data = data

        try:
            for linear, first, second in linears:
                linear.scale = 0.0 if first is None else 1.0
                if first is not None and second is not None:
                    put(linear.lora_A, first)
                    put(linear.lora_B, second)
            for experts, factors in adapted:
                experts.scale = 1.0
                for name in ("gate_up_A", "gate_up_B", "down_A", "down_B"):
                    own = getattr(experts, name)
                    if own is not None:
                        put(own, factors[name] if name in factors else torch.zeros_like(own))
            for module, leaf, tensor in self._whole:
                if module in inside:
                    put(getattr(module, leaf), tensor)
            yield
        finally:
            for parameter, data in reversed(kept):
                parameter.data = data
            for module, scale in zip(modules, scales, strict=True):
                module.scale = scale


def load_teachers(
    routes: Sequence[Route], files: ModelFiles, student: LoadedModel, network: Network
) -> list[Teacher]:
    """The teacher of each route, each loaded once. Adapters share the student's base; a model is loaded beside it.

    ModelError for a teacher that does not fit: another vocabulary, or an adapter where the student changes its whole base.
    """
    made: dict[str, Teacher] = {}
    for route in routes:
        if route.name not in made:
            made[route.name] = (
                _model_teacher(route.name, files)
                if route.adapter is None
                else _adapter_teacher(route.adapter, files, student, network)
            )
    return [made[route.name] for route in routes]


def _adapter_teacher(folder: Path, files: ModelFiles, student: LoadedModel, network: Network) -> Teacher:
    if not any(isinstance(module, (LoraLinear, LoraExperts)) for module in student.model.modules()):
        raise ModelError(
            f"the teacher {folder} is an adapter, and with --train full its base would change under it: merge it with "
            "`keye merge` and name the model"
        )
    shapes = plan_load(files.folder, quantization_in(files.config, files.folder)).shapes
    swap = AdapterSwap(folder, fit_adapter(load_adapter(folder), shapes), student.model)
    return Teacher(str(folder), student, network, swap)


def _model_teacher(name: str, files: ModelFiles) -> Teacher:
    opened = open_model(name, device=files.device, dtype=files.dtype, kernels=files.kernels)
    if opened.config.vocab_size != files.config.vocab_size:
        raise ModelError(
            f"the teacher {name} has {opened.config.vocab_size:,} tokens and the student {files.config.vocab_size:,}: "
            "their answers cannot be compared token by token"
        )
    loaded = load_weights(opened)
    loaded.model.requires_grad_(False)
    return Teacher(name, loaded, Network(loaded.model, Trained("lora")).eval())
