"""The Python way in: `load` a model, then `ask`, `chat`, `ground` or `summarize`; `plan` tells the cost without the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, Unpack, overload

from keyecli.engine.encoded import frame_cache
from keyecli.engine.loaded import (
    LoadedModel,
    ModelFiles,
    OnProgress,
    load_weights,
    open_model,
    run_arguments,
)
from keyecli.engine.plan import RunPlan, plan_inputs, plan_run
from keyecli.errors import UsageError
from keyecli.model.checkpoint import Preprocessor
from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.tasks.ask import Answer, AskSettings, Input, Inputs, OnText, ask, open_inputs, prompt_text
from keyecli.tasks.chat import Chat, begin_chat
from keyecli.tasks.ground import Grounding, ground
from keyecli.tasks.options import AskOptions, ask_settings
from keyecli.tasks.search import GroundOptions, GroundSettings, SearchPlan, ground_settings, plan_search
from keyecli.tasks.stretches import PartPlan, plan_parts
from keyecli.tasks.summarize import (
    Summary,
    SummaryOptions,
    SummarySettings,
    summarize,
    summary_question,
    summary_settings,
)
from keyecli.tasks.transcript import read_transcript, resume
from keyecli.video.decode import report_cut_off
from keyecli.video.source import VideoInfo

Settings = TypeVar("Settings", AskSettings, GroundSettings, SummarySettings)


class Keye:
    """A loaded model. Make one with `load`."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    def __repr__(self) -> str:
        return f"<Keye {self.name} on {self.device} in {self.dtype}>"

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def is_nano(self) -> bool:
        """True for the embedded default model, which knows synthetic clips only."""
        return self.loaded.is_nano

    @property
    def revision(self) -> str:
        """A short name of the weights."""
        return self.loaded.revision

    @property
    def device(self) -> str:
        return self.loaded.devices

    @property
    def dtype(self) -> str:
        return self.loaded.dtype

    @property
    def config(self) -> KeyeVL2Config:
        return self.loaded.config

    @property
    def model(self) -> KeyeVL2ForConditionalGeneration:
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def preprocessor(self) -> Preprocessor:
        return self.loaded.preprocessor

    def ask(
        self,
        inputs: Inputs,
        question: str,
        *,
        n: int = 1,
        settings: AskSettings | None = None,
        on_text: OnText | None = None,
        on_reasoning: OnText | None = None,
        on_progress: OnProgress | None = None,
        **options: Unpack[AskOptions],
    ) -> Answer:
        """Answer a question about one or several videos and images, which the model sees in the order given.

        `n` answers are drawn, each with a seed of its own, and stand in `Answer.answers`. `options` are those of
        `AskOptions`; or give `settings` whole. `on_text` and `on_reasoning` get the pieces as they come, `on_progress` a
        description, what is done, and of how much. Errors: see `keyecli.tasks.ask.ask`.
        """
        return ask(
            self.loaded,
            inputs,
            question,
            _one_of(ask_settings, self.preprocessor, settings, options),
            n=n,
            on_text=on_text,
            on_reasoning=on_reasoning,
            on_progress=on_progress,
        )

    def chat(
        self,
        inputs: Inputs = (),
        *,
        saved: str | Path | None = None,
        settings: AskSettings | None = None,
        on_progress: OnProgress | None = None,
        **options: Unpack[AskOptions],
    ) -> Chat:
        """Look at one or several videos and images, in the order given, to talk about them: `chat.ask(question)`.

        `saved`: a file that `chat.save` wrote, to go on from; its inputs are read again from where they were, or from
        `inputs`. `options` are those of `AskOptions`; or give `settings` whole. Errors: see `keyecli.tasks.chat.begin_chat`
        and `keyecli.tasks.transcript.resume`.
        """
        chosen = _one_of(ask_settings, self.preprocessor, settings, options)
        if saved is None:
            return begin_chat(self.loaded, inputs, chosen, on_progress=on_progress)
        transcript = read_transcript(saved)
        given = [inputs] if isinstance(inputs, (str, Path, VideoInfo)) else list(inputs)
        paths = [item.path if isinstance(item, VideoInfo) else item for item in given]
        found, chosen = resume(transcript, paths, chosen, ask_settings(self.preprocessor).sampling)
        return begin_chat(self.loaded, found, chosen, turns=transcript.turns, on_progress=on_progress)

    @overload
    def ground(
        self,
        item: Input,
        query: str,
        *,
        settings: GroundSettings | None = None,
        on_reasoning: OnText | None = None,
        on_progress: OnProgress | None = None,
        **options: Unpack[GroundOptions],
    ) -> Grounding: ...
    @overload
    def ground(
        self,
        item: Input,
        query: list[str] | tuple[str, ...],
        *,
        settings: GroundSettings | None = None,
        on_reasoning: OnText | None = None,
        on_progress: OnProgress | None = None,
        **options: Unpack[GroundOptions],
    ) -> list[Grounding]: ...
    def ground(
        self,
        item: Input,
        query: str | list[str] | tuple[str, ...],
        *,
        settings: GroundSettings | None = None,
        on_reasoning: OnText | None = None,
        on_progress: OnProgress | None = None,
        **options: Unpack[GroundOptions],
    ) -> Grounding | list[Grounding]:
        """When something is on screen in one video, or happens: its spans, in a Grounding, with scores.

        Several queries share one prefill and give a list. `options` are those of `GroundOptions`; or give `settings`
        whole. Errors: see `keyecli.tasks.ground.ground`.
        """
        chosen = _one_of(ground_settings, self.preprocessor, settings, options)
        queries = [query] if isinstance(query, str) else list(query)
        found = ground(self.loaded, item, queries, chosen, on_reasoning=on_reasoning, on_progress=on_progress)
        return found[0] if isinstance(query, str) else found

    def summarize(
        self,
        item: Input,
        *,
        settings: SummarySettings | None = None,
        on_reasoning: OnText | None = None,
        on_progress: OnProgress | None = None,
        **options: Unpack[SummaryOptions],
    ) -> Summary:
        """Summarise one video: prose, timed events, chapters.

        `options` are those of `SummaryOptions`; or give `settings` whole. Errors: see
        `keyecli.tasks.summarize.summarize`.
        """
        chosen = _one_of(summary_settings, self.preprocessor, settings, options)
        return summarize(self.loaded, item, chosen, on_reasoning=on_reasoning, on_progress=on_progress)

    def plan(
        self,
        inputs: Inputs,
        question: str = "",
        *,
        settings: AskSettings | None = None,
        **options: Unpack[AskOptions],
    ) -> RunPlan:
        """What `ask` with the same arguments will take: frames, tokens, memory. Nothing is decoded."""
        chosen = _one_of(ask_settings, self.preprocessor, settings, options)
        return _plan(self.loaded, inputs, question, chosen, weights_loaded=True)


def load(
    model: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    kernels: str | None = None,
    quant: str | None = None,
    kv: str | None = None,
    offload: str | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    offline: bool = True,
    cache: bool = True,
    cache_size: float | None = None,
    on_progress: OnProgress | None = None,
) -> Keye:
    """Load a model: a folder, a hub name in the local Hugging Face cache, no argument for the embedded nano.

    device: "cpu", "cuda", "cuda:N", or "cuda:0,1" for layers over several GPUs (default: cuda where there is one);
    dtype: "bf16", "fp16" or "fp32" (default: bf16 on cuda, else fp32); kernels: "triton" or "reference", the definitions in
    PyTorch (default: triton on cuda, else reference). ModelError: no such model, or a damaged one; MemoryLimitError: no
    room for the weights. A kernel that does not compile for the card is a KernelError when it is first run.

    quant: "int4", "int8" or "fp8" quantises experts and large linear layers on the way; a folder that `keye quantize` wrote is
    quantised already and needs none.
    kv: "fp8" keeps the cache's keys and values in 8 bits, half the memory of bf16, a little less exact (see
    `keyecli.kernels.reference.stored`; default: of type dtype).
    offload: "experts" keeps the routed experts in this machine's memory, from which the GPU reads them: for one that is too
    small for all weights.
    adapter: a folder with a LoRA adapter in PEFT's format; without `model`, its base is loaded. It goes into the weights as they
    are read, or stands beside them where they are quantised.

    cache: keep encoded frames on disk, in `keyecli.settings.cache_folder()`, so that later questions about a clip need not
    decode it again; cache_size: GiB of them (default: 10), beyond which the least recently used go.
    """
    _require_offline(offline)
    files = open_model(
        model,
        device=device,
        dtype=dtype,
        kernels=kernels,
        quant=quant,
        kv=kv,
        offload=offload,
        adapter=adapter,
        revision=revision,
    )
    loaded = load_weights(files, on_progress=on_progress)
    return Keye(replace(loaded, frame_cache=frame_cache(cache_size) if cache else None))


def plan(
    inputs: Inputs,
    question: str = "",
    *,
    model: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    kernels: str | None = None,
    quant: str | None = None,
    kv: str | None = None,
    offload: str | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    offline: bool = True,
    cache: bool = True,
    cache_size: float | None = None,
    settings: AskSettings | None = None,
    **options: Unpack[AskOptions],
) -> RunPlan:
    """What a run will take, worked out from the model's configuration without loading its weights.

    Takes what `load` takes. `RunPlan.check()` refuses a run that does not fit the context or the device. A KeyeWarning
    says where a cut-off file ends.
    """
    _require_offline(offline)
    files = open_model(
        model,
        device=device,
        dtype=dtype,
        kernels=kernels,
        quant=quant,
        kv=kv,
        offload=offload,
        adapter=adapter,
        revision=revision,
    )
    chosen = _one_of(ask_settings, files.preprocessor, settings, options)
    return _plan(files, inputs, question, chosen, weights_loaded=False)


def plan_ground(
    item: Input,
    queries: Sequence[str],
    *,
    model: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    kernels: str | None = None,
    quant: str | None = None,
    kv: str | None = None,
    offload: str | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    offline: bool = True,
    cache: bool = True,
    cache_size: float | None = None,
    settings: GroundSettings | None = None,
    **options: Unpack[GroundOptions],
) -> SearchPlan:
    """Where one video will be searched and what each look takes; no weights are loaded.

    Takes what `load` takes. `SearchPlan.check()` refuses what does not fit the context or the device. A KeyeWarning says
    where a cut-off file ends.
    """
    _require_offline(offline)
    files = open_model(
        model,
        device=device,
        dtype=dtype,
        kernels=kernels,
        quant=quant,
        kv=kv,
        offload=offload,
        adapter=adapter,
        revision=revision,
    )
    planned = plan_search(
        files, item, queries, _one_of(ground_settings, files.preprocessor, settings, options)
    )
    report_cut_off(planned.info)
    return planned


def plan_summary(
    item: Input,
    *,
    model: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    kernels: str | None = None,
    quant: str | None = None,
    kv: str | None = None,
    offload: str | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    offline: bool = True,
    cache: bool = True,
    cache_size: float | None = None,
    settings: SummarySettings | None = None,
    **options: Unpack[SummaryOptions],
) -> list[PartPlan]:
    """What a summary of one video will take, one plan for each part that it is looked at in; no weights are loaded.

    Takes what `load` takes. A KeyeWarning says where a cut-off file ends, and which options the model's own prompt has no
    place for.
    """
    _require_offline(offline)
    files = open_model(
        model,
        device=device,
        dtype=dtype,
        kernels=kernels,
        quant=quant,
        kv=kv,
        offload=offload,
        adapter=adapter,
        revision=revision,
    )
    chosen = _one_of(summary_settings, files.preprocessor, settings, options)
    parts = plan_parts(files, item, chosen.ask, summary_question(files, chosen))
    report_cut_off(parts[0].input.info)
    return parts


def _plan(
    files: ModelFiles, inputs: Inputs, question: str, settings: AskSettings, *, weights_loaded: bool
) -> RunPlan:
    inputs_planned = plan_inputs(open_inputs(inputs, settings), settings.sampling)
    for item in inputs_planned:
        report_cut_off(item.info)
    return plan_run(
        inputs_planned,
        files.config,
        **run_arguments(files),
        max_tokens=settings.generation.max_tokens,
        text=prompt_text(question, inputs_planned, settings),
        weights_loaded=weights_loaded,
    )


def _one_of(
    make: Callable[..., Settings], preprocessor: Preprocessor, given: Settings | None, options: Any
) -> Settings:
    """A task's settings as they were given, or made of single options; UsageError for both."""
    if given is None:
        return make(preprocessor, **options)
    if options:
        raise UsageError("give either settings or single options, not both")
    return given


def _require_offline(offline: bool) -> None:
    if not offline:
        raise UsageError(
            "models are loaded from local files only: download the model first, then load it by its hub name"
        )
