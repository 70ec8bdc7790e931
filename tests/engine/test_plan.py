"""The plan of a run: worked numbers for the released shape, and refusals that name what would help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from copy import copy
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keyecli.engine.loaded import (
    LoadedModel,
    _control_group_room,
    choose_device,
    choose_dtype,
    choose_kernels,
    free_memory_bytes,
)
from keyecli.engine.plan import (
    MASKED_KEYS_PER_SELECTED,
    DevicePart,
    InputPlan,
    RunPlan,
    cache_bytes_per_token,
    estimate_memory,
    frames_per_group,
    gib,
    layer_expert_bytes,
    parameter_count,
    part_weights_bytes,
    plan_inputs,
    plan_run,
    prefill_workspace_bytes,
)
from keyecli.engine.stream import visual_of
from keyecli.errors import KeyeWarning, MemoryLimitError, UsageError
from keyecli.kernels.reference import GATHER_CROSSOVER
from keyecli.model.cache import KeyeCache
from keyecli.model.config import KeyeVL2Config
from keyecli.model.prompt import build_prompt
from keyecli.video.sampling import FrameBudget, SamplingSettings
from keyecli.video.source import FrameTimes
from tests.engine.scenes import planned

OFFICIAL_PARAMETERS = 31_122_082_160
OFFICIAL_CACHE_BYTES = 48 * (2 * 4 * 128 + 64) * 2
GIB = 2**30


@pytest.fixture(scope="module")
def official() -> KeyeVL2Config:
    return KeyeVL2Config(
        num_experts=128, sa_config={"indexer_head_dim": 64, "indexer_num_heads": 16, "topk": 2048}
    )


def run_plan(config: KeyeVL2Config, inputs: list[InputPlan], **changes: Any) -> RunPlan:
    settings: dict[str, Any] = {"model": "m", "device": "cuda", "dtype": "bf16", "kernels": "reference"}
    settings["max_tokens"] = 2048
    return plan_run(inputs, config, **{**settings, **changes})


def test_parameters_of_the_official_model(official: KeyeVL2Config) -> None:
    assert parameter_count(official) == OFFICIAL_PARAMETERS


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_experts": None}, {"sa_config": None}, {"attention_bias": True}, {"tie_word_embeddings": True}],
)
def test_parameters_equal_those_of_the_built_model(loaded: LoadedModel, changes: dict[str, Any]) -> None:
    from keyecli.model.keye import KeyeVL2ForConditionalGeneration
    from tests.tiny import tiny_config

    config = KeyeVL2Config(**tiny_config(**changes))
    with torch.device("meta"):
        model = KeyeVL2ForConditionalGeneration(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"sa_config": None}], ids=["sparse", "dense"])
def test_cache_bytes_are_what_the_cache_takes(
    official: KeyeVL2Config, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    """A layer of the toy model: k and v (2 · 2 groups · 32) and, when sparse, one indexer key of 16."""
    from tests.tiny import tiny_config

    assert cache_bytes_per_token(official, 2) == OFFICIAL_CACHE_BYTES == 104_448
    config = KeyeVL2Config(**tiny_config(**changes))
    width = 2 * 2 * 32 + (0 if changes else 16)
    assert cache_bytes_per_token(config, dtype.itemsize) == 2 * width * dtype.itemsize
    cache = KeyeCache(config, 10, dtype=dtype)
    held = sum(buffer.nbytes for buffer in (cache.k, cache.v, cache.index_k) if buffer is not None)
    assert held == 10 * cache_bytes_per_token(config, dtype.itemsize)


def test_worked_plan_of_an_hour(official: KeyeVL2Config) -> None:
    # 720 frames of 16 × 16 tokens: exactly the total budget of 184,320.
    item = planned("hour.mp4", 720, 16, 16)
    plan = run_plan(official, [item], text="What happens?")
    digits = sum(len(f"{index / 2:.1f}") for index in range(720))
    assert plan.frames == 720
    assert plan.visual_tokens == 184_320
    assert plan.prompt_tokens == 184_320 + 720 + digits + 2 + 32 + 5
    assert plan.max_tokens == 2048
    assert plan.context_tokens == 262_144
    assert plan.context_share == plan.prompt_tokens / 262_144
    assert plan.memory.weights_bytes == 62_244_164_320
    assert plan.memory.cache_bytes == (plan.prompt_tokens + 2048) * 104_448
    assert gib(plan.memory.cache_bytes) == "18.5 GiB"
    # A fixed workspace: the scores of 512 queries and the experts of 8192 tokens, not of all.
    assert 3 * GIB < plan.memory.workspace_bytes < 5 * GIB
    assert plan.needed_bytes == plan.memory.total_bytes


def test_workspace_grows_with_length_only_through_one_chunk_of_scores(official: KeyeVL2Config) -> None:
    at_128k, at_256k = (
        prefill_workspace_bytes(official, tokens, 2, "cuda", "reference") for tokens in (131_072, 262_144)
    )
    assert at_256k - at_128k == 512 * 131_072 * 26


def test_workspace_follows_the_attention_that_is_computed(official: KeyeVL2Config) -> None:
    assert MASKED_KEYS_PER_SELECTED == GATHER_CROSSOVER
    # For 512 queries, 8,192 keys more: on a GPU three copies of 32 heads' bf16 scores outweigh the selection.
    for device, bytes_per_pair in (("cuda", 32 * 3 * 2 + 1), ("cpu", 26)):
        shorter, longer = (
            prefill_workspace_bytes(official, tokens, 2, device, "reference") for tokens in (8192, 16_384)
        )
        assert longer - shorter == 512 * 8192 * bytes_per_pair


def test_workspace_of_the_kernels_does_not_grow_with_length(official: KeyeVL2Config) -> None:
    sizes = {n: prefill_workspace_bytes(official, n, 2, "cuda", "triton") for n in (16_384, 262_144)}
    assert sizes[16_384] == sizes[262_144] < 2 * GIB


def test_estimate_is_close_to_the_real_prompt(loaded: LoadedModel) -> None:
    inputs = [planned("a.mp4", 40), planned("b.png", 1, kind="image"), planned("c.mp4", 12)]
    question = "What happens at the end, and when does it begin?"
    content = [{"type": item.sampling.kind} for item in inputs] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    prompt = build_prompt(loaded.tokenizer, loaded.config, messages, [visual_of(item) for item in inputs])
    estimate = run_plan(loaded.config, inputs, text=question).prompt_tokens
    assert abs(estimate / len(prompt.input_ids) - 1) < 0.1


def test_groups_hold_at_least_one_frame() -> None:
    assert [frames_per_group(patches) for patches in (256, 1024, 8192, 81_920)] == [32, 8, 1, 1]


def test_several_videos_share_the_budget_and_images_do_not() -> None:
    def info(kind: str) -> Any:
        times = FrameTimes(range(201), Fraction(1, 2))
        return SimpleNamespace(
            kind=kind, width=448, height=448, frame_times=times, duration_s=Fraction(100), path=Path("x")
        )

    settings = SamplingSettings(budget=FrameBudget(min_tokens=4, total_tokens=8000))
    alone = plan_inputs([info("video")], settings)[0].sampling.tokens
    first, image, second = (
        item.sampling for item in plan_inputs([info("video"), info("image"), info("animation")], settings)
    )
    assert 4000 < alone <= 8000
    assert first.tokens == second.tokens <= 4000
    assert (first.kind, image.kind, second.kind) == ("video", "image", "video")
    assert image.tokens == 256


def test_answer_is_cut_to_what_the_context_leaves(loaded: LoadedModel) -> None:
    plan = run_plan(loaded.config, [planned("a.mp4", 2)], prompt_tokens=4000)
    assert (plan.context_tokens, plan.max_tokens, plan.total_tokens) == (4096, 96, 4096)
    plan.check()


def test_too_long_for_the_context_is_a_usage_error(official: KeyeVL2Config) -> None:
    item = planned("day.mp4", 2000, 16, 16)
    with pytest.raises(UsageError) as refusal:
        run_plan(official, [item]).check()
    message = str(refusal.value)
    assert "262,144" in message
    assert all(flag in message for flag in ("--fps", "--max-frames", "--end", "--max-tokens-video"))
    # The number it names does fit, with the tokens around the frames.
    room = int(re.search(r"--max-tokens-video (\d+)", message)[1])  # type: ignore[index]
    fitting = planned("day.mp4", room // 256, 16, 16)
    run_plan(official, [fitting]).check()
    assert room > 200_000


def test_too_many_images_for_the_context(loaded: LoadedModel) -> None:
    with pytest.raises(UsageError, match=r"--max-pixels \d+ or give fewer"):
        run_plan(loaded.config, [planned(f"{i}.png", 1, 20, 20, kind="image") for i in range(12)]).check()


def test_not_enough_memory_for_the_cache(official: KeyeVL2Config) -> None:
    free = 66 * GIB
    plan = run_plan(official, [planned("hour.mp4", 720, 16, 16)], free_bytes=free)
    with pytest.raises(MemoryLimitError) as refusal:
        plan.check()
    message = str(refusal.value)
    assert "weights 58.0 GiB, cache 18.5 GiB" in message
    assert "66.0 GiB are free" in message
    room = int(re.search(r"--max-tokens-video (\d+)", message)[1])  # type: ignore[index]
    run_plan(official, [planned("hour.mp4", room // 256, 16, 16)], free_bytes=free).check()


def test_weights_that_are_loaded_are_not_asked_for_again(official: KeyeVL2Config) -> None:
    run_plan(official, [planned("hour.mp4", 720, 16, 16)], free_bytes=24 * GIB, weights_loaded=True).check()


def test_half_the_dtype_is_named_when_it_helps(official: KeyeVL2Config) -> None:
    with pytest.raises(MemoryLimitError, match="--dtype bf16"):
        run_plan(official, [planned("a.mp4", 20, 16, 16)], dtype="fp32", free_bytes=80 * GIB).check()


def test_no_flag_is_named_when_none_helps(official: KeyeVL2Config) -> None:
    with pytest.raises(MemoryLimitError, match="a larger device") as refusal:
        run_plan(official, [planned("a.mp4", 20, 16, 16)], free_bytes=6 * GIB).check()
    assert "--" not in str(refusal.value)


def test_experts_of_the_official_model_in_the_host(official: KeyeVL2Config) -> None:
    """A layer has 128 · 3 · 2048 · 768 expert weights, 1.125 GiB in bf16; the GPU keeps the rest and two layers' buffers."""
    layer = 128 * 3 * 2048 * 768 * 2
    assert layer_expert_bytes(official, 2) == layer == 1_207_959_552
    item = planned("hour.mp4", 720, 16, 16)
    plain, plan = run_plan(official, [item]), run_plan(official, [item], offload="experts")
    assert plan.memory.host_bytes == 48 * layer
    assert plan.memory.buffer_bytes == 2 * layer
    assert plan.memory.weights_bytes == plain.memory.weights_bytes - 48 * layer
    assert plan.memory.loaded_bytes < 6.5 * GIB
    assert plan.memory.cache_bytes == plain.memory.cache_bytes
    assert (
        plan.memory.total_bytes
        == plan.memory.loaded_bytes + plan.memory.cache_bytes + plan.memory.workspace_bytes
    )
    # Chunks four times as long.
    assert plain.memory.workspace_bytes < plan.memory.workspace_bytes < 4 * plain.memory.workspace_bytes
    loaded = run_plan(official, [item], offload="experts", weights_loaded=True)
    assert loaded.needed_bytes == plan.memory.cache_bytes + plan.memory.workspace_bytes
    data = plan.to_dict()
    assert (data["offload"], data["host_bytes"], data["buffer_bytes"]) == ("experts", 48 * layer, 2 * layer)
    assert (plain.to_dict()["offload"], plain.memory.host_bytes, plain.memory.buffer_bytes) == (None, 0, 0)


def test_quantised_experts_in_the_host(official: KeyeVL2Config) -> None:
    config = copy(official)
    config.quantization_config = {"weights": "int4", "group_size": 64}
    count = 128 * 3 * 2048 * 768
    assert layer_expert_bytes(config, 2) == count // 2 + count // 64 * 3
    memory = run_plan(config, [planned("a.mp4", 20)], offload="experts").memory
    whole = run_plan(config, [planned("a.mp4", 20)]).memory
    assert memory.weights_bytes + memory.host_bytes == whole.weights_bytes
    config.quantization_config = {"weights": "int4", "group_size": 512}
    assert layer_expert_bytes(config, 2) == count * 2  # 768 inputs are no whole groups


@pytest.mark.parametrize("changes", [{}, {"num_experts": None}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_parts_add_up_to_the_whole(changes: dict[str, Any], layers: int) -> None:
    from tests.tiny import tiny_config

    config = KeyeVL2Config(**tiny_config(num_hidden_layers=layers, **changes))
    first = DevicePart("cuda:0", layers // 2, first=True, last=False)
    last = DevicePart("cuda:1", layers - layers // 2, first=False, last=True)
    for offload in (None, "experts"):
        sizes: dict[str, Any] = {"dtype": "bf16", "device": "cuda", "kernels": "triton", "offload": offload}
        parts = [estimate_memory(config, 100, 6, part=part, **sizes) for part in (first, last)]
        whole = estimate_memory(config, 100, 6, **sizes)
        assert sum(part.weights_bytes for part in parts) == whole.weights_bytes
        assert sum(part.host_bytes for part in parts) == whole.host_bytes
        assert sum(part.cache_bytes for part in parts) == whole.cache_bytes
    assert sum(part_weights_bytes(config, 4, part) for part in (first, last)) == 4 * parameter_count(config)


def test_offloading_is_named_where_it_helps(official: KeyeVL2Config) -> None:
    with pytest.raises(MemoryLimitError, match=r"24.0 GiB are free: use --offload experts, which keeps"):
        run_plan(official, [planned("a.mp4", 20, 16, 16)], free_bytes=24 * GIB).check()
    run_plan(official, [planned("a.mp4", 20, 16, 16)], free_bytes=24 * GIB, offload="experts").check()
    with pytest.raises(MemoryLimitError, match=r"--max-tokens-video \d+, or use --offload experts"):
        run_plan(official, [planned("a.mp4", 720, 16, 16)], free_bytes=66 * GIB).check()
    with pytest.raises(MemoryLimitError) as refusal:
        run_plan(official, [planned("a.mp4", 20)], free_bytes=GIB, device="cpu").check()
    assert "--offload" not in str(refusal.value)


def test_fp8_keys_and_values_are_named_where_they_help(official: KeyeVL2Config) -> None:
    inputs = [planned("a.mp4", 720, 16, 16)]
    need = run_plan(official, inputs).memory
    saved = need.cache_bytes - run_plan(official, inputs, kv="fp8").memory.cache_bytes
    with pytest.raises(
        MemoryLimitError, match=r"--max-tokens-video \d+, or use --kv fp8, which keeps .* or use --offload"
    ):
        run_plan(official, inputs, free_bytes=need.total_bytes - saved).check()
    run_plan(official, inputs, free_bytes=need.total_bytes - saved, kv="fp8").check()
    for changes in (
        {"free_bytes": need.total_bytes - saved - 1},
        {"free_bytes": need.loaded_bytes, "kv": "fp8"},
    ):
        with pytest.raises(MemoryLimitError) as refusal:
            run_plan(official, inputs, **changes).check()
        assert "--kv" not in str(refusal.value)


def test_a_host_that_is_too_small_for_the_experts(official: KeyeVL2Config) -> None:
    plan = run_plan(official, [planned("a.mp4", 20)], offload="experts", host_free_bytes=32 * GIB)
    with pytest.raises(
        MemoryLimitError, match=r"keeps 54.0 GiB of experts .* 32.0 GiB are free: use --quant int4"
    ):
        plan.check()
    replace(plan, weights_loaded=True).check()
    replace(plan, host_free_bytes=54 * GIB).check()


def test_unknown_free_memory_refuses_nothing(official: KeyeVL2Config) -> None:
    run_plan(official, [planned("a.mp4", 20)], free_bytes=None).check()


def test_plan_as_data(official: KeyeVL2Config) -> None:
    plan = run_plan(official, [planned("a.mp4", 21, 4, 6)], free_bytes=5)
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["schema"] == "keye.plan/1"
    assert data["visual_tokens"] == 21 * 24
    assert data["inputs"][0] == {
        "path": "a.mp4",
        "kind": "video",
        "duration_s": 10.5,
        "source_width": 640,
        "source_height": 360,
        "frames": 21,
        "fps": 2.0,
        "start_s": 0.0,
        "end_s": 10.0,
        "width": 168,
        "height": 112,
        "tokens_per_frame": 24,
        "tokens": 504,
        "truncated_at_s": None,
    }


def test_planning_needs_no_torch() -> None:
    code = "import keyecli.engine.plan, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_devices_and_dtypes() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device(None) == choose_device("auto") == expected
    assert choose_device("cpu") == "cpu"
    for wrong in ("gpu", "meta", "cuda:99"):
        with pytest.raises(UsageError, match=wrong):
            choose_device(wrong)
    assert choose_dtype(None, "cuda:1") == "bf16"
    assert choose_dtype("auto", "cpu") == "fp32"
    assert choose_dtype("torch.bfloat16", "cpu") == "bf16"
    with pytest.raises(UsageError, match="int8"):
        choose_dtype("int8", "cpu")


def test_kernels_are_chosen_by_the_device_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keyecli.engine.loaded.has_triton", lambda: True)
    monkeypatch.setattr("keyecli.engine.loaded.interprets", lambda: False)
    assert choose_kernels(None, "cpu") == choose_kernels("auto", "cpu") == "reference"
    assert choose_kernels(None, "cuda:1") == choose_kernels("triton", "cuda") == "triton"
    assert choose_kernels("reference", "cuda") == "reference"
    with pytest.raises(UsageError, match="the device is cpu"):
        choose_kernels("triton", "cpu")
    with pytest.raises(UsageError, match="--kernels fast is not known"):
        choose_kernels("fast", "cpu")
    monkeypatch.setattr("keyecli.engine.loaded.has_triton", lambda: False)
    with pytest.raises(UsageError, match="not installed"):
        choose_kernels("triton", "cuda")
    with pytest.warns(KeyeWarning, match="triton is not installed"):
        assert choose_kernels(None, "cuda") == "reference"


def test_free_memory_of_a_container(tmp_path: Path) -> None:
    assert _control_group_room(tmp_path) is None
    (tmp_path / "memory.max").write_text(f"{8 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{5 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\nactive_file {GIB}\n")
    assert _control_group_room(tmp_path) == 5 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert _control_group_room(tmp_path) is None


def test_free_memory_is_known_on_linux() -> None:
    free = free_memory_bytes("cpu")
    assert (free is not None) == (sys.platform == "linux")
    assert free is None or 2**26 < free < 2**50
