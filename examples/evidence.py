"""Does the evidence point at the right frames? `python examples/evidence.py --clips 24`.

Forges clips, asks when things happen, and compares the share of the recorded weight that lies inside the true spans with the
share of the frames that do; for all tokens of an answer, and for those of the list of spans alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from torch import Tensor

import keyecli
from keyecli.engine.evidence import record_attention
from keyecli.engine.generate import GenerationSettings
from keyecli.engine.plan import plan_inputs
from keyecli.engine.shared import SharedPrefix
from keyecli.forge import SceneOptions
from keyecli.forge.write import write_dataset
from keyecli.tasks.options import ask_settings
from keyecli.video.source import probe

ANSWER_TOKENS = 320
TOP_FRAMES = 3


def weights_of(keye: keyecli.Keye, clip: Path, question: str) -> tuple[list[float], dict[str, Tensor]]:
    """Times of the frames in seconds, and for each way of looking the weight of every frame."""
    loaded = keye.loaded
    plans = plan_inputs([probe(clip)], ask_settings(loaded.preprocessor).sampling)
    prefix = SharedPrefix.prefill(loaded, plans, question_room_tokens=64, answer_tokens=ANSWER_TOKENS)
    with record_attention(loaded.model) as record:
        answer = prefix.answer(question, GenerationSettings(max_tokens=ANSWER_TOKENS))
    count = len(answer.token_ids)
    end_of_thought = loaded.tokenizer.convert_tokens_to_ids("</think>")
    first = answer.token_ids.index(end_of_thought) + 1 if end_of_thought in answer.token_ids else 0
    return [float(time_s) for time_s in prefix.times_s[0]], {
        "all tokens": record.frame_weights(prefix.frame_tokens, range(count)),
        "tokens of the answer": record.frame_weights(prefix.frame_tokens, range(first, count)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="model folder; default: the embedded nano")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    keye = keyecli.load(arguments.model, device="cpu", dtype="fp32")
    shares: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        options = SceneOptions(min_duration_s=8, max_duration_s=40)
        tasks = ("ground", "ground_motion")
        write_dataset(Path(name), arguments.clips, arguments.seed, options, questions_per_clip=2, tasks=tasks)
        for line in (Path(name) / "data.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if not row["solution"]:
                continue  # what is not there has no frames
            times_s, weights = weights_of(keye, Path(name) / row["videos"][0], row["question"])
            inside = [any(start <= time_s < end for start, end in row["solution"]) for time_s in times_s]
            for way, weight in weights.items():
                top = weight.topk(min(TOP_FRAMES, sum(inside))).indices.tolist()
                share = float(
                    sum(w for w, is_inside in zip(weight.tolist(), inside, strict=True) if is_inside)
                )
                found = sum(inside[frame] for frame in top) / len(top)
                shares.setdefault(way, []).append((share, sum(inside) / len(inside), found))
    print(
        f"| {len(next(iter(shares.values())))} questions | weight inside | time inside | top {TOP_FRAMES} frames inside |"
    )
    print("| --- | --- | --- | --- |")
    for way, rows in shares.items():
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        print(f"| {way} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


if __name__ == "__main__":
    main()
