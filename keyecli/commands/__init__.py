"""One file a command (options in, one call, printing out) and the table that names them all."""

from __future__ import annotations

COMMANDS = {
    "ask": "Answer a question about videos and images.",
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
}
"""Command → its line in `keye --help`. Its function stands under its name in the module of its name."""
