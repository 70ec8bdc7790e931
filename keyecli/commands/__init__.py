"""One file a command (options in, one call, printing out) and the table that names them all."""

from __future__ import annotations

COMMANDS = {
    "ask": "Answer a question about videos and images.",
    "plan": "Show frames, tokens and memory before anything runs.",
    "forge": "Write synthetic clips with exact ground truth.",
}
"""Command → its line in `keye --help`. Its function stands under its name in the module of its name."""
