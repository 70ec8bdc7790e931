"""Writes docs/cli.md from the help of every command, so that the page cannot drift: `make docs`."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).with_name("cli.md")

INTRODUCTION = """\
# The command line

Written by `make docs` from the commands' own `--help`; a test checks that it is current.

Results go to stdout; progress, notices, warnings and reasoning go to stderr. A flag may be spelled with `-` or `_`.

What is not given as a flag is taken from the environment (`KEYE_MAX_TOKENS=512`), then from `./keye.toml` (or the file
that `--config` or `KEYE_CONFIG` names), then from the user's own file (`~/.config/keye/config.toml` on Linux). In a file,
a key at the top counts for every command and one in a table such as `[ask]` for that command:

```toml
model = "/models/Keye-VL-2.0-30B-A3B"

[ask]
fps = 4
max-tokens = 512
```
"""

EXIT_CODES = """\
## Exit codes

| code | meaning |
| --- | --- |
| 0 | done |
| 1 | a failure inside keye, or the reader of its output went away |
| 2 | wrong usage: options, arguments or settings |
| 3 | an input cannot be read: missing, not a video, damaged, empty |
| 4 | the model cannot be used: missing, incomplete, wrong shape, wrong kind |
| 5 | not enough memory |
| 130 | interrupted |
"""


def page() -> str:
    """The whole text of docs/cli.md."""
    from keyecli.cli import help_text
    from keyecli.commands import COMMANDS

    sections = [INTRODUCTION, EXIT_CODES]
    for name in ("", *COMMANDS):
        sections.append(f"## {f'keye {name}'.strip()}\n\n```text\n{help_text(name)}\n```\n")
    return "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
