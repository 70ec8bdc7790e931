"""One file a command (options in, one call, printing out) and the table that names them all."""

from __future__ import annotations

COMMANDS = {
    "ask": "Answer a question about videos and images.",
    "chat": "Talk about videos: one look, many questions.",
    "ground": "Find when something happens in a video.",
    "summarize": "Summarise videos, with timed chapters.",
    "plan": "Show frames, tokens and memory before anything runs.",
    "scenes": "Find the shots of a video, without a model.",
    "forge": "Write synthetic clips with exact ground truth.",
    "bench": "Measure the kernels on this machine's GPU.",
    "export": "Write saved results in other formats.",
    "clip": "Cut the parts that saved results name out of their videos.",
    "batch": "Do many jobs with one model, resumable.",
    "report": "Show what became of a batch.",
    "data": "Check training data against its videos.",
    "cache": "Show or clear what is kept on the disk.",
    "pull": "Fetch a model from the Hugging Face hub.",
    "doctor": "Check this machine, a model, and its answers.",
    "finetune": "Train a model, or an adapter of it, on local videos.",
    "rl": "Train a model on its own answers, by rewards.",
    "distill": "Bring what several teachers know into one model.",
    "merge": "Put an adapter into the weights of its base.",
    "quantize": "Save a model with its weights in 4 or 8 bits.",
}
"""Command → its line in `keye --help`. Its function stands under its name in the module of its name."""
