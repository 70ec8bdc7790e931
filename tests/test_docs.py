"""The documents say what is: help pages, the tree, exit codes, and every field of every format."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from keyecli.commands import COMMANDS
from keyecli.errors import ExitCode, KeyeWarning

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FORMATS = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documented(heading: str) -> list[set[str]]:
    """The field names of each table under a heading of formats.md, up to the next heading."""
    section = re.split(r"^#+ ", FORMATS.split(f"# {heading}\n")[1], flags=re.MULTILINE)[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    return [set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) for table in tables]


def test_cli_page_is_current() -> None:
    script = load_script(ROOT / "docs" / "generate_cli.py")
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run `make docs`"


def test_the_tree_is_the_tree() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    # A line that begins deeper goes on with the one before.
    top, _, rest = re.sub(r"\n {4,}", " ", tree).partition("keyecli/\n")
    lines = [line for line in rest.splitlines() if line]
    inside = {line.split()[0]: line for line in lines if line.startswith("  ")}
    outside = top.split() + [line.split()[0] for line in lines if not line.startswith(" ")]
    for name in outside:
        assert (ROOT / name).exists(), f"README's tree names {name}"
    real = {
        path.name + "/" * path.is_dir() for path in (ROOT / "keyecli").iterdir() if path.name != "__pycache__"
    }
    assert real == set(inside)
    for room, line in inside.items():
        for module in sorted((ROOT / "keyecli" / room).glob("[a-z]*.py")):
            assert re.search(rf"\b{module.stem}\b", line), f"README's tree does not name {room}{module.name}"


def test_the_readme_uses_flags_and_commands_that_exist() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert [flag for flag in sorted(flags) if not re.search(rf"{flag}\b", page)] == []
    assert set(re.findall(r"^keye (\w+)", README, flags=re.MULTILINE)) == set(COMMANDS)


def test_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_exit_codes_are_written_down() -> None:
    for page in (README, (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")):
        table = page.split("xit codes\n")[1].split("\n#")[0]
        assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)] == sorted(
            ExitCode
        )


def test_every_dependency_is_in_the_tested_set() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    names = {re.split(r"[<>=\[]", item)[0] for item in needed}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert {re.split(r"[<>=]", line)[0] for line in lines if line and not line.startswith("#")} == names


def test_every_dependency_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[<>=]", item)[0] for item in project["dependencies"]}
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "keyecli").rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", code, flags=re.MULTILINE))
    modules = {"pillow": "PIL", "scenedetect-headless": "scenedetect"}
    assert [name for name in names if modules.get(name, name) not in imported] == []


def test_every_field_of_an_answer_is_described(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import keyecli
    from tests.video.conftest import write_clip

    clip = write_clip(tmp_path / "clip.mp4", 26)
    with pytest.warns(KeyeWarning, match="cut off after 2 tokens"):
        answer = keyecli.load(tiny_checkpoint).ask(clip, "What?", max_tokens=2, think=False).to_dict()
    top, one_input = documented("keye.ask/1")
    assert set(answer) == top
    assert set(answer["inputs"][0]) == one_input
    assert_named("keye.ask/1", answer["timings"], answer["settings"], answer["inputs"][0]["settings"])


def test_every_field_of_a_plan_is_described(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from keyecli.session import plan
    from tests.video.conftest import write_clip

    clip = write_clip(tmp_path / "clip.mp4", 26)
    planned = plan(clip, model=tiny_checkpoint).to_dict()
    top, one_input = documented("keye.plan/1")
    assert set(planned) == top
    assert set(planned["inputs"][0]) == one_input
    assert_named("keye.plan/1", planned["devices"][0])


def test_every_field_of_a_forge_row_is_described(tmp_path: Path) -> None:
    import json

    from keyecli.forge import TASKS, SceneOptions, write_dataset

    write_dataset(tmp_path / "set", 1, 0, SceneOptions(2.0, 2.0))
    row = json.loads((tmp_path / "set" / "data.jsonl").read_text().splitlines()[0])
    (fields,) = documented("Rows of data.jsonl")
    assert set(row) == fields
    assert_named("Rows of data.jsonl", dict.fromkeys(TASKS))


def assert_named(heading: str, *objects: dict[str, Any]) -> None:
    """Each key of the objects is named somewhere under the heading."""
    section = re.split(r"^#+ ", FORMATS.split(f"# {heading}\n")[1], flags=re.MULTILINE)[0]
    assert [key for part in objects for key in part if f"`{key}`" not in section] == []


def test_every_field_of_a_cut_clip_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from keyecli.cli import run
    from tests.commands.test_export import grounding, lines
    from tests.video.conftest import write_clip

    clip = write_clip(tmp_path / "clip.mp4", 51)
    (tmp_path / "found.jsonl").write_text(lines(grounding(clip, "dog", (0, 1, 0.5))))
    assert run(["clip", str(tmp_path / "found.jsonl"), str(tmp_path / "cuts"), "--json"]) == 0
    (fields,) = documented("keye.clip/1")
    assert set(json.loads(capsys.readouterr().out)) == fields


def test_every_field_of_a_conversation_is_described(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import json

    import keyecli
    from tests.video.conftest import write_clip

    chat = keyecli.load(tiny_checkpoint).chat(
        write_clip(tmp_path / "clip.mp4", 26), max_tokens=2, think=False
    )
    turn = chat.ask("What?").to_dict()
    (fields,) = documented("keye.chat/1")
    assert set(turn) == fields
    assert_named("keye.chat/1", turn["timings"])
    chat.save(tmp_path / "talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text())
    (fields,) = documented("keye.conversation/1")
    assert set(saved) == fields
    assert_named("keye.conversation/1", saved["sampling"])
