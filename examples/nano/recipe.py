"""keye-nano: its size, its tokenizer and the forged clips it learns from.

Shared by train.py and evaluate.py in this folder; change it to grow your own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from keyecli.forge import Draws, SceneOptions, questions, sample_scene
from keyecli.model.config import KeyeVL2Config
from keyecli.video.sampling import FrameBudget

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|frame|>",
)
THINKING_TOKENS = ("<think>", "</think>")
VOCABULARY = 640
MEAN = STD = (0.5, 0.5, 0.5)
BUDGET = FrameBudget(min_tokens=16, max_tokens=24, total_tokens=3072, image_min_tokens=4, image_max_tokens=64)
FPS = 2.0

# How keye's tasks ask it: in words that it was trained on. The first pattern that a query matches chooses its question.
LONGEST_CLIP_S = 60.0
PROMPTS = {
    "ground": [
        [r"\b(moves? (left|right|up|down)|spins?)$", "Find every time the {query}."],
        ["", "Find every time the {query} is on screen."],
    ],
    "summarize": "Summarise the video with times.",
    "longest_clip_s": LONGEST_CLIP_S,
}

# Seeds of clips: the tokenizer's text, training and everything held out never meet.
TOKENIZER_SEEDS = range(900_000_000, 900_002_000)
FIRST_TRAINING_SEED = 1_000_000_000

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == "video" %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif part.type == "image" %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
<think>
{% if enable_thinking is defined and not enable_thinking %}{{ "\\n</think>\\n\\n" }}{% endif %}{% endif -%}
"""


def nano_config(tokenizer: Tokenizer) -> KeyeVL2Config:
    """About nine million parameters of the same classes as the full model; a 10-second clip has twice `topk` tokens."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    return KeyeVL2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        max_position_embeddings=8192,
        rope_theta=10_000.0,
        rope_scaling={"type": "default", "mrope_section": [8, 12, 12]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        sa_config={"indexer_head_dim": 32, "indexer_num_heads": 4, "topk": 256},
        vision_config={
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 768,
            "image_size": 168,
            "packing_positions": 1,
        },
        dtype="bfloat16",
    )


def forged_text(seeds: Iterable[int]) -> Iterator[str]:
    """Questions, thoughts and answers of forged clips."""
    for seed in seeds:
        scene = sample_scene(seed, SceneOptions(max_duration_s=30.0))
        for item in questions(scene, Draws((seed, 1))):
            yield item.question
            yield item.reasoning
            yield item.answer


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE, so that no text is unknown, in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(THINKING_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Ordinary tokens, as in the official vocabulary: they are part of the text that the model writes.
    tokenizer.add_tokens(list(THINKING_TOKENS))
    return tokenizer


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path) -> None:
    """The tokenizer's files and the chat template, the preprocessor's and the generation settings, and the prompts."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 8192,
        },
    )
    write_json(folder / "generation_config.json", {"eos_token_id": tokenizer.token_to_id("<|im_end|>")})
    write_json(folder / "preprocessor_config.json", preprocessor_settings())
    write_json(folder / "keye_prompts.json", PROMPTS)


def preprocessor_settings() -> dict[str, Any]:
    """How frames become patches, in the spelling that `keyecli.model.checkpoint.load_preprocessor` reads."""
    return {
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "patch_size": 14,
        "merge_size": 2,
        "fps": FPS,
        "token_budget": asdict(BUDGET),
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
