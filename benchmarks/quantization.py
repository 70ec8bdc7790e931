"""What quantised weights change: on keye-nano's held-out clips, and on random layers of the released widths.

    python benchmarks/quantization.py [--clips 4] [--experts 16] [--layer-tokens 192] [--skip-answers]

Compared with the weights as they are, in fp32: the divergence of the next token's distribution and how often the likeliest
token is the same, over the answers' tokens (nano) or all tokens (random layers); how many of the keys that the indexer
selects are the same; and the scores of nano's answers, as `examples/nano/evaluate.py` gives them. Random layers have nothing that
real ones have learnt: they say how large the error of the arithmetic is, not what it costs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import keyecli
from keyecli.engine.plan import plan_inputs
from keyecli.forge.write import write_dataset
from keyecli.kernels import reference
from keyecli.kernels.quantized_weights import quantise
from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import IGNORED_LABEL, KeyeVL2ForConditionalGeneration
from keyecli.model.prompt import Visual
from keyecli.model.quantize import Quantization, Quantized, replace_modules
from keyecli.tasks.options import ask_settings
from keyecli.training.collate import Turn, collate, encode_clip
from keyecli.video.decode import decode_frames
from keyecli.video.patches import frames_to_patches
from keyecli.video.source import probe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "nano"))
import evaluate

METHODS = (
    Quantization("int8"), Quantization("fp8"), Quantization("int4", 64), Quantization("int4", 128)
)  # fmt: skip
HELD_OUT_SEED = 7
HEADER = (
    "| weights | divergence, nats | same likeliest token | same selected keys |\n| --- | --- | --- | --- |"
)

Selections = list[Tensor]


@dataclass(frozen=True)
class Pass:
    """Logits [N, vocabulary] of the tokens compared, and for each layer which keys each query selects, bool [T, S]."""

    logits: Tensor
    selections: Selections


def compare(actual: Pass, expected: Pass) -> tuple[float, float, float]:
    """Mean divergence in nats, share of equal likeliest tokens, share of equal selected keys."""
    log_p, log_q = expected.logits.log_softmax(-1), actual.logits.log_softmax(-1)
    divergence = float(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean())
    agreement = float((actual.logits.argmax(-1) == expected.logits.argmax(-1)).float().mean())
    shared = [
        float((a & e).sum()) / float(e.sum())
        for a, e in zip(actual.selections, expected.selections, strict=True)
        if e.any()
    ]
    return divergence, agreement, sum(shared) / len(shared) if shared else float("nan")


@contextmanager
def watched(model: KeyeVL2ForConditionalGeneration, segments: Tensor | None) -> Iterator[Selections]:
    """What every layer selects, of queries that see more keys than they may select."""
    found: Selections = []

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, index: Any) -> None:
        if index is None:
            return
        top_k = model.config.sa_config["topk"]
        visible = reference.visible_keys(q.shape[1], k.shape[1], q.device, segments)
        selected = reference.select_top_k(reference.index_scores(*index), visible, top_k)
        found.append(selected & (visible.sum(-1, keepdim=True) > top_k))

    layers = [layer.self_attn for layer in model.model.layers]
    for attention in layers:
        attention.observer = observe
    try:
        yield found
    finally:
        for attention in layers:
            attention.observer = None


def clip_batches(keye: keyecli.Keye, folder: Path) -> Iterator[dict[str, Any]]:
    """Each clip with its true answers in one row, as training lays them out."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.setdefault(row["videos"][0], []).append(row)
    loaded = keye.loaded
    for video, asked in rows.items():
        info = probe(folder / video)
        plan = plan_inputs([info], ask_settings(loaded.preprocessor).sampling)[0].sampling
        frames = [frame for chunk in decode_frames(info, plan) for frame in chunk.frames]
        mean, std = loaded.preprocessor.mean, loaded.preprocessor.std
        patches = frames_to_patches(np.stack(frames), mean, std)
        rows_columns = (plan.height // 14, plan.width // 14)
        with torch.no_grad():
            visual = loaded.model.encode_frames(patches, [rows_columns] * len(frames))
        grid = (plan.height // 28, plan.width // 28)
        times = tuple(float(time) for time in plan.times_s)
        turns = [Turn(row["question"], row["answer"], row.get("reasoning")) for row in asked]
        clip = encode_clip(loaded.tokenizer, loaded.config, Visual("video", grid, times), turns)
        batch = collate([clip], loaded.config.pad_token_id or 0)
        yield {"batch": batch, "visual": visual}


@torch.no_grad()
def run_clip(model: KeyeVL2ForConditionalGeneration, clip: dict[str, Any]) -> Pass:
    batch = clip["batch"]
    segments = torch.from_numpy(batch.segments)
    embeds = model.embed(torch.from_numpy(batch.input_ids), clip["visual"])
    with watched(model, segments) as selections:
        hidden, _ = model.model(
            embeds, torch.from_numpy(batch.position_ids), segments=segments, shared_prefix=batch.shared_prefix
        )
    return Pass(model.logits(hidden[torch.from_numpy(batch.targets) != IGNORED_LABEL]), selections)


@torch.no_grad()
def random_layers(experts: int) -> KeyeVL2ForConditionalGeneration:
    """Two layers of the released widths with a small vocabulary, weights as large as keep activations of size one."""
    config = KeyeVL2Config(
        vocab_size=4096, num_hidden_layers=2, num_experts=experts, max_position_embeddings=8192,
        image_token_id=4092, video_token_id=4093, vision_start_token_id=4094, vision_end_token_id=4095,
        vision_config={"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
        sa_config={"indexer_head_dim": 64, "indexer_num_heads": 16, "topk": 64},
    )  # fmt: skip
    model = KeyeVL2ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.model.layers.named_parameters():
        if parameter.dim() > 1:
            inputs = parameter.shape[-2] if "experts" in name else parameter.shape[-1]
            parameter.normal_(std=inputs**-0.5, generator=generator)
    model.model.embed_tokens.weight.normal_(generator=generator)
    model.lm_head.weight.normal_(std=4 * config.hidden_size**-0.5, generator=generator)
    return model


@torch.no_grad()
def quantised(
    model: KeyeVL2ForConditionalGeneration, quantization: Quantization
) -> KeyeVL2ForConditionalGeneration:
    """The same model with quantised modules."""
    weights = dict(model.named_parameters())
    with torch.device("meta"):
        made = KeyeVL2ForConditionalGeneration(model.config)
        names = replace_modules(made, quantization)
    state = model.state_dict()
    for name in names:
        weight = weights[name].mT if name in weights else weights[f"{name}.weight"]
        state.pop(name if name in weights else f"{name}.weight")
        matrix = quantise(weight, quantization.method, quantization.group)
        assert isinstance(made.get_submodule(name), Quantized)
        state |= {f"{name}.{part}": tensor for part, tensor in matrix.tensors.items()}
    made.load_state_dict(state, assign=True)
    return made.eval()


@torch.no_grad()
def run_tokens(model: KeyeVL2ForConditionalGeneration, ids: Tensor) -> Pass:
    with watched(model, None) as selections:
        logits = model(input_ids=ids).logits
    return Pass(logits[0], selections)


def load(quant: str | None) -> keyecli.Keye:
    """Nano in fp32, as it is or quantised on the way."""
    return keyecli.load(device="cpu", dtype="fp32", quant=quant, cache=False)


def print_row(label: str, figures: Sequence[str]) -> None:
    print(f"| {label} | " + " | ".join(figures) + " |", flush=True)


def compared(passes: Sequence[tuple[Pass, Pass]]) -> list[str]:
    """Means over clips, as text."""
    figures = [compare(actual, expected) for actual, expected in passes]
    return [f"{sum(values) / len(values):.4f}" for values in zip(*figures, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=4, help="held-out clips of nano")
    parser.add_argument("--questions", type=int, default=8, help="questions a clip")
    parser.add_argument(
        "--experts", type=int, default=16, help="experts of a random layer; the release has 128"
    )
    parser.add_argument("--layer-tokens", type=int, default=192, help="tokens through the random layers")
    parser.add_argument("--skip-answers", action="store_true", help="do not generate nano's answers")
    arguments = parser.parse_args()
    keye = load(None)
    print(
        "| weights | divergence, nats | same likeliest token | same selected keys |\n| --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder, arguments.clips, HELD_OUT_SEED, questions_per_clip=arguments.questions)
        clips = list(clip_batches(keye, folder))
        expected = [run_clip(keye.loaded.model, clip) for clip in clips]
        for quantization in METHODS:
            model = quantised(keye.loaded.model, quantization)
            pairs = [(run_clip(model, clip), full) for clip, full in zip(clips, expected, strict=True)]
            print_row(f"nano, {quantization}", compared(pairs))
        if not arguments.skip_answers:
            print_answers(folder)
    layers = random_layers(arguments.experts)
    ids = torch.randint(0, 4092, (1, arguments.layer_tokens), generator=torch.Generator().manual_seed(1))
    full = run_tokens(layers, ids)
    print(
        "\n| weights | divergence, nats | same likeliest token | same selected keys |\n| --- | --- | --- | --- |"
    )
    for quantization in METHODS:
        figures = compared([(run_tokens(quantised(layers, quantization), ids), full)])
        print_row(f"random layers, {arguments.experts} experts, {quantization}", figures)


def print_answers(folder: Path) -> None:
    """Scores of generated answers, one row a method."""
    condition = evaluate.CONDITIONS[0]
    header: list[str] = []
    for quant in (None, "int8", "fp8", "int4"):
        figures = evaluate.summary_figures(evaluate.grade_all(load(quant), folder, condition))
        if not header:
            header = list(figures)
            print("\n| nano's answers | " + " | ".join(header) + " |\n| --- |" + " --- |" * len(header))
        print_row(quant or "as trained", [f"{value:.3f} ({count})" for value, count in figures.values()])


if __name__ == "__main__":
    main()
