"""Counts against real models without memory, parts against shapes worked out by hand, and advice against the estimate itself."""

from __future__ import annotations

import re
from copy import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from keyecli.engine.plan import parameter_count, weights_bytes
from keyecli.errors import MemoryLimitError, UsageError
from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.model.quantize import Quantization
from keyecli.training.estimate import (
    LENGTH_STEP,
    TrainingEstimate,
    adapter_parameters,
    estimate_training,
    parameter_groups,
)
from keyecli.training.network import MAINS, is_trained, trained
from tests.tiny import TINY_CONFIG

GIB = 2**30


def tiny(**changes: Any) -> KeyeVL2Config:
    return KeyeVL2Config(**(TINY_CONFIG | changes))


def dense() -> KeyeVL2Config:
    return tiny(num_experts=None, sa_config=None, tie_word_embeddings=True)


def empty_model(config: KeyeVL2Config) -> KeyeVL2ForConditionalGeneration:
    with torch.device("meta"):
        return KeyeVL2ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def large() -> KeyeVL2Config:
    from keyecli.bench.network import official_config

    return official_config()


def estimated(config: KeyeVL2Config, *train: str, **changes: Any) -> TrainingEstimate:
    arguments: dict[str, Any] = {"dtype": "bf16", "pack_tokens": 32768, "device": "cuda"}
    return estimate_training(config, train=train or ("lora",), **(arguments | changes))


@pytest.mark.parametrize("config", [tiny(), dense()], ids=["experts", "dense"])
def test_what_learns_is_counted_as_in_the_model(config: KeyeVL2Config) -> None:
    model = empty_model(config)
    named = dict(model.named_parameters())
    assert sum(group.count for group in parameter_groups(config)) == parameter_count(config)
    texts = [*MAINS, "lora,projector", "full,router", "full,vision", "sparse,projector,vision,router"]
    for text in texts:
        what = trained(text)
        learns = sum(p.numel() for name, p in named.items() if is_trained(name, what))
        adapter = adapter_parameters(config, 16) if what.main == "lora" else 0
        found = estimate_training(
            config, train=tuple(text.split(",")), dtype="bf16", pack_tokens=64, device="cpu"
        )
        assert found.trained_parameters == learns + adapter, text


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (tiny(), ("attention", "experts")),
        (tiny(), ("attention",)),
        (tiny(), ("experts",)),
        (tiny(), ("attention", "head")),
        (dense(), ("attention", "dense_mlp")),
    ],
    ids=str,
)
def test_an_adapter_has_as_many_parameters_as_its_matrices_have_sides(
    config: KeyeVL2Config, targets: tuple[str, ...]
) -> None:
    names = {"attention": r"self_attn\.[qkvo]_proj", "experts": "experts", "dense_mlp": r"mlp\.\w+_proj"}
    names["head"] = r"^lm_head"
    sides = 0
    for name, parameter in empty_model(config).named_parameters():
        if name.startswith(("model.layers.", "lm_head")) and any(
            re.search(names[target], name) for target in targets
        ):
            experts = parameter.shape[0] if parameter.dim() == 3 else 1
            sides += experts * sum(parameter.shape[-2:])
    assert adapter_parameters(config, 5, targets) == 5 * sides


def test_weights_and_what_an_optimiser_keeps(large: KeyeVL2Config) -> None:
    full, adapter = estimated(large, "full"), estimated(large, "lora")
    learns = full.trained_parameters
    assert full.weights_bytes == weights_bytes(large, 2) == 2 * parameter_count(large)
    assert (full.masters_bytes, full.gradients_bytes, full.optimizer_bytes) == (
        4 * learns,
        2 * learns,
        8 * learns,
    )
    count = adapter_parameters(large, 16)
    assert adapter.weights_bytes == weights_bytes(large, 2) + 4 * count
    assert (adapter.masters_bytes, adapter.gradients_bytes, adapter.optimizer_bytes) == (
        0,
        4 * count,
        8 * count,
    )
    single = estimated(large, "full", dtype="fp32")
    assert (single.masters_bytes, single.gradients_bytes, single.update_bytes) == (0, 4 * learns, 0)
    eight = estimated(large, "full", optimizer="adamw8bit")
    assert 2 * learns < eight.optimizer_bytes < 2.1 * learns
    assert estimated(large, "full", optimizer="paged-adamw8bit").optimizer_bytes == 0


def test_a_quantised_base_is_as_large_as_its_files_say(large: KeyeVL2Config) -> None:
    config = copy(large)
    config.quantization_config = Quantization("int4").to_dict()
    assert estimated(config).weights_bytes == weights_bytes(config, 2) + 4 * adapter_parameters(config, 16)
    assert estimated(config).total_bytes < estimated(large).total_bytes - 35 * GIB


def test_a_step_holds_what_tensors_of_its_shapes_hold(large: KeyeVL2Config) -> None:
    tokens, width, chosen = 8192, 2048, 8
    found = estimated(large, "full", pack_tokens=tokens, patches_per_row=0)
    inputs = 48 * tokens * width * 2
    assert inputs < found.activations_bytes < 1.2 * inputs
    # Per routed row gate and up, their product and the output, as the kernels' backward pass keeps them.
    rows = tokens * chosen * (3 * 768 + width) * 2
    gradient = 3 * 128 * 768 * width * 2
    assert found.layer_bytes > rows + gradient
    assert found.loss_bytes == 2048 * 151936 * 12 + 151936 * width * 2
    assert found.vision_bytes == 0
    assert estimated(large, "indexer").loss_bytes == 0
    # One row's frames are encoded at a time; those of a whole pack are kept where they are learnt from, pixels and all.
    frozen = [estimated(large, "full", patches_per_row=patches) for patches in (1000, 4000)]
    assert 4 * frozen[0].vision_bytes == pytest.approx(frozen[1].vision_bytes, rel=0.01)
    assert frozen[0].activations_bytes == frozen[1].activations_bytes
    seeing = estimated(large, "full", "vision", patches_per_row=1000)
    assert seeing.activations_bytes - frozen[0].activations_bytes > 4 * 32768 * (27 * 1152 + 3 * 14**2) * 2


def test_more_of_everything_takes_more(large: KeyeVL2Config) -> None:
    base = estimated(large).total_bytes
    assert estimated(large, pack_tokens=65536).total_bytes > base
    assert estimated(large, lora_rank=32).total_bytes > base
    assert estimated(large, checkpointing=False).total_bytes > base + 10 * GIB
    assert estimated(large, "lora", "projector", "vision").total_bytes > base
    assert estimated(large, "lora", lora_targets=("attention",)).total_bytes < base
    # The definition keeps every routed row.
    assert estimated(large, device="cpu").total_bytes > base


def test_shards_divide_the_decoder_and_leave_the_tower_whole(large: KeyeVL2Config) -> None:
    one = estimated(large, "full", "vision")
    four = estimated(large, "full", "vision", world=4, sharded=True)
    copies = estimated(large, "full", "vision", world=4)
    tower = sum(g.count for g in parameter_groups(large) if g.sees)
    rest = parameter_count(large) - tower
    assert four.weights_bytes == 2 * (tower + rest // 4)
    assert one.optimizer_bytes > four.optimizer_bytes > one.optimizer_bytes // 4
    # While it computes a layer is whole, and so are its gradients.
    assert four.activations_bytes > one.activations_bytes
    # Whole models exchange their gradients in buckets.
    assert copies.weights_bytes == one.weights_bytes
    assert copies.update_bytes == one.update_bytes + 2**28
    several = estimated(large, "full", "vision", world=4, sharded=True, accumulates=True)
    assert several.gradients_bytes == one.gradients_bytes


def test_shards_that_answer_become_whole(large: KeyeVL2Config) -> None:
    alone = estimated(large, answers=True)
    learning = estimated(large, world=8, sharded=True)
    answering = estimated(large, world=8, sharded=True, answers=True)
    assert alone.answering_bytes == learning.answering_bytes == 0
    assert learning.total_bytes < alone.weights_bytes < answering.total_bytes
    assert answering.total_bytes - answering.answering_bytes < learning.total_bytes


def test_what_fits_is_no_error(large: KeyeVL2Config) -> None:
    found = estimated(large)
    found.check(found.total_bytes)
    found.check(None)
    found.check(found.total_bytes - found.weights_bytes, weights_loaded=True)
    with pytest.raises(MemoryLimitError):
        found.check(found.total_bytes - found.weights_bytes - 1, weights_loaded=True)
    with pytest.raises(
        MemoryLimitError, match=r"training lora needs .* GiB on cuda \(weights .* are free: use "
    ):
        found.check(found.total_bytes - 1)


def refusal(found: TrainingEstimate, free_bytes: int) -> str:
    with pytest.raises(MemoryLimitError) as caught:
        found.check(free_bytes)
    return str(caught.value)


def case_of(way: str, config: KeyeVL2Config, train: str) -> TrainingEstimate:
    """The estimate of what a piece of advice says, its flags read as the command line would."""
    changes: dict[str, Any] = {}
    if gpus := re.match(r"(\d+) such GPUs with --shard", way):
        changes |= {"world": int(gpus[1]), "sharded": True}
    flags = dict(re.findall(r"--([\w-]+) (\S+)", way))
    names = {"max-length": "pack_tokens", "rank": "lora_rank"}
    changes |= {names[flag]: int(value) for flag, value in flags.items() if flag in names}
    if "optimizer" in flags:
        changes["optimizer"] = flags["optimizer"]
    if "quant" in flags:
        config = copy(config)
        config.quantization_config = Quantization(flags["quant"]).to_dict()  # type: ignore[arg-type]
    return estimated(config, *flags.get("train", train).split(","), **changes)


@pytest.mark.parametrize("train", ["lora", "full", "sparse", "indexer", "projector", "lora,vision"])
@pytest.mark.parametrize("free_gib", [24, 48, 66, 79, 139])
def test_each_advice_fits(large: KeyeVL2Config, train: str, free_gib: int) -> None:
    found = estimated(large, *train.split(","))
    free_bytes = free_gib * GIB
    if found.total_bytes <= free_bytes:
        return found.check(free_bytes)
    text = refusal(found, free_bytes)
    if "use a smaller model" in text:
        # A card of the same size beside it would not do either, nor would the smallest steps.
        assert estimated(large, *train.split(","), pack_tokens=LENGTH_STEP).total_bytes > free_bytes
        return None
    ways = text.split(": use ")[1].split(", or ")
    assert ways
    for way in ways:
        assert case_of(way, large, train).total_bytes <= free_bytes, way
    return None


def test_the_length_and_the_number_of_gpus_are_the_best_ones(large: KeyeVL2Config) -> None:
    text = refusal(estimated(large), 79 * GIB)
    length = int(re.search(r"--max-length (\d+)", text)[1])  # type: ignore[index]
    assert length % LENGTH_STEP == 0
    assert estimated(large, pack_tokens=length + LENGTH_STEP).total_bytes > 79 * GIB
    text = refusal(estimated(large, "full"), 139 * GIB)
    gpus = int(re.search(r"(\d+) such GPUs", text)[1])  # type: ignore[index]
    assert estimated(large, "full", world=gpus - 1, sharded=True).total_bytes > 139 * GIB


def test_a_device_that_is_far_too_small_is_told_so() -> None:
    text = refusal(estimated(tiny(), device="cpu", pack_tokens=LENGTH_STEP, dtype="fp32"), 1000)
    assert text.endswith("use a smaller model or a larger device")


def test_all_of_it_as_plain_data_and_as_a_sentence(large: KeyeVL2Config) -> None:
    found = estimated(large, "lora", "projector")
    data = found.to_dict()
    assert data["train"] == "lora,projector"
    kept = ("weights", "masters", "gradients", "optimizer", "activations")
    step = max(data[f"{name}_bytes"] for name in ("layer", "loss", "vision"))
    assert data["total_bytes"] == sum(data[f"{name}_bytes"] for name in kept) + step
    assert found.describe().startswith("training lora,projector needs ")
    assert "each of 2 devices" in replace(found, case=replace(found.case, world=2)).describe()


def test_an_optimiser_that_there_is_not(large: KeyeVL2Config) -> None:
    with pytest.raises(UsageError, match="--optimizer sgd is not known; use adamw, adamw8bit"):
        estimated(large, optimizer="sgd")


def test_room_for_what_attention_found(large: KeyeVL2Config) -> None:
    """The lists of 2,048 keys, outputs and denominators of 32 heads, in each of 48 layers: 16,512 bytes a token."""
    found = estimated(large)
    assert found.found_bytes == 48 * 32768 * (2048 * 4 + 32 * (128 * 2 + 4))
    needed = found.total_bytes - found.weights_bytes
    assert found.room_bytes(needed - 1) == 0
    assert found.room_bytes(needed + 1000) == 1000
    assert found.room_bytes(needed + 2 * found.found_bytes) == found.found_bytes
    assert found.room_bytes(None) == 0
    assert estimated(large, device="cpu").room_bytes(2**50) == 0
    assert estimated(dense(), dtype="fp32", pack_tokens=64).room_bytes(2**50) == 0
