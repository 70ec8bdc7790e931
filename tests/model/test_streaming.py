"""Reading weights in pieces: wherever tensors are cut, and whatever fails on the way, the model is the same or there is none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from keyecli.errors import ModelError
from keyecli.kernels.quantized_weights import quantise
from keyecli.model import streaming
from keyecli.model.checkpoint import load_model, plan_load
from keyecli.model.quantize import Quantization
from tests.compare import assert_same
from tests.tiny import random_tensors, split_experts, tiny_config

Make = Callable[..., Path]
WIDE = tiny_config(hidden_size=128, moe_intermediate_size=64, num_hidden_layers=1)


def state_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, **options).state_dict())


@pytest.mark.parametrize("piece_bytes", [1, 1000, 70_000])
@pytest.mark.parametrize("layout", ["fused", "one by one"])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"quantization": Quantization("int8")}])
def test_pieces_make_the_whole(
    make_checkpoint: Make,
    monkeypatch: pytest.MonkeyPatch,
    piece_bytes: int,
    layout: str,
    options: dict[str, Any],
) -> None:
    tensors = random_tensors(WIDE)
    stored = tensors if layout == "fused" else split_experts(tensors)
    if piece_bytes == 1:  # a value or a row at a time: of a few tensors that is enough
        monkeypatch.setattr(streaming, "PIECES_AHEAD", 3)
        piece_bytes = 100
    monkeypatch.setattr(streaming, "PIECE_BYTES", piece_bytes)
    state = state_of(make_checkpoint(config=WIDE, tensors=stored, shards=2), **options)
    for name, tensor in state.items():
        if name in tensors:
            assert_same(tensor, tensors[name].to(options.get("dtype", torch.float32)), what=name)
    if "quantization" in options:
        prefix = "model.layers.0.mlp.experts.down_proj"
        made = quantise(tensors[prefix].mT, "int8", 64).tensors
        made |= {
            f"q.{part}": tensor
            for part, tensor in quantise(
                tensors["model.layers.0.self_attn.q_proj.weight"], "int8", 64
            ).tensors.items()
        }
        for part in ("codes", "scale", "zero"):
            assert_same(state[f"{prefix}.{part}"], made[part], what=part)
            assert_same(state[f"model.layers.0.self_attn.q_proj.{part}"], made[f"q.{part}"], what=part)


def test_offsets_are_those_of_the_file(make_checkpoint: Make) -> None:
    folder = make_checkpoint(shards=2)
    plan = plan_load(folder)
    for name in ("model.norm.weight", "model.layers.1.mlp.experts.gate_up_proj"):
        entry = plan.entries[name]
        raw = entry.shard.read_bytes()[entry.offset : entry.offset + entry.bytes]
        assert raw == load_file(entry.shard)[name].numpy().tobytes()


def test_the_buffer_is_bounded(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PIECE_BYTES", 256)
    made: list[int] = []

    def memory(size: int, places: Any) -> torch.Tensor:
        made.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(streaming, "_host_memory", memory)
    load_model(make_checkpoint(), dtype=torch.bfloat16)
    assert made == [256] * streaming.SLOTS
    made.clear()
    load_model(make_checkpoint())
    assert made == [], "tensors of the same type are read where they are to be"


def test_readers_run_at_once(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that wait for each other: with fewer of them at a time this would never end, but break."""
    met = threading.Barrier(streaming.READERS, timeout=60)
    plain, count = streaming._read, iter(range(10**9))

    def read(*arguments: Any) -> None:
        if next(count) < streaming.READERS:
            met.wait()
        plain(*arguments)

    monkeypatch.setattr(streaming, "_read", read)
    load_model(make_checkpoint())


@pytest.mark.parametrize("kept", [0, 2000])
def test_a_shard_that_shrinks_while_it_is_read(
    make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    folder = make_checkpoint()
    shard = folder / "model.safetensors"
    plain = streaming._pieces_of

    def cut(*arguments: Any) -> Any:
        with shard.open("r+b") as file:
            file.truncate(kept)
        return plain(*arguments)

    plan = plan_load(folder)
    stream = streaming.stream_weights(plan, "cpu", None)
    next(stream)
    monkeypatch.setattr(streaming, "_pieces_of", cut)
    with pytest.raises(
        ModelError, match=r"model\.safetensors cannot be read \(it ends at .*download it again"
    ):
        list(stream)


def test_a_shard_that_vanishes_is_named(make_checkpoint: Make) -> None:
    folder = make_checkpoint(shards=2)
    plan = plan_load(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors cannot be read"):
        list(streaming.stream_weights(plan, "cpu", None))


def test_no_reader_outlives_an_interrupted_load(make_checkpoint: Make) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_model(make_checkpoint(), on_progress=interrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]
