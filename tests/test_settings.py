"""Settings: which source wins, what each may hold, and what is said about a wrong value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keyecli import settings as settings_module
from keyecli.errors import UsageError
from keyecli.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings_module, "user_file", lambda: tmp_path / "user" / "config.toml")


def write_user(text: str) -> None:
    path = settings_module.user_file()
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def load(
    flags: dict[str, Any] | None = None, environment: dict[str, str] | None = None, config: Path | None = None
) -> Settings:
    return load_settings(
        "ask", flags or {}, commands=("ask", "plan"), config=config, environment=environment or {}
    )


def test_defaults_without_any_source() -> None:
    assert load() == Settings()


def test_each_source_wins_over_the_one_below() -> None:
    write_user("seed = 1")
    assert load().seed == 1
    Path("keye.toml").write_text("seed = 2")
    assert load().seed == 2
    assert load(environment={"KEYE_SEED": "3"}).seed == 3
    assert load({"seed": 4}, {"KEYE_SEED": "3"}).seed == 4
    assert load({"seed": None}, {"KEYE_SEED": "3"}).seed == 3


def test_sources_are_merged_setting_by_setting() -> None:
    write_user("fps = 4\nmodel = 'from-user'")
    Path("keye.toml").write_text("model = 'from-project'")
    merged = load({"seed": 7}, {"KEYE_TOP_P": "0.5"})
    assert (merged.fps, merged.model, merged.seed, merged.top_p) == (4.0, "from-project", 7, 0.5)


def test_texts_may_be_one_or_several() -> None:
    Path("keye.toml").write_text("stop = 'END'")
    assert load().stop == ("END",)
    Path("keye.toml").write_text("[ask]\nstop = ['a', 'b c']")
    assert load().stop == ("a", "b c")
    assert load(environment={"KEYE_STOP": "\n\n"}).stop == ("\n\n",)
    assert load({"stop": ["x", "y"]}, {"KEYE_STOP": "z"}).stop == ("x", "y")
    Path("keye.toml").write_text("stop = ['a', 1]")
    with pytest.raises(UsageError, match=r"sets stop to \['a', 1\], but stop is text or a list of texts"):
        load()


def test_a_flag_can_take_back_what_a_file_says() -> None:
    Path("keye.toml").write_text("think = false\nstrict = true")
    assert not load().think
    assert load({"think": True, "strict": False}) == Settings()


def test_a_command_table_wins_over_the_top_of_its_file() -> None:
    Path("keye.toml").write_text("max-tokens = 10\n[ask]\nmax_tokens = 20\n[plan]\nmax_tokens = 30")
    assert load().max_tokens == 20
    assert load_settings("plan", {}, commands=("ask", "plan"), environment={}).max_tokens == 30


def test_config_stands_in_the_place_of_the_project_file() -> None:
    Path("keye.toml").write_text("seed = 1\nfps = 3")
    other = Path("other.toml")
    other.write_text("seed = 2")
    for loaded in (load(config=other), load(environment={"KEYE_CONFIG": str(other)})):
        assert loaded.seed == 2
        assert loaded.fps is None


@pytest.mark.parametrize("text", ["1", "true", "YES", "on"])
def test_true_in_the_environment(text: str) -> None:
    assert load(environment={"KEYE_JSON": text}).json


@pytest.mark.parametrize("text", ["0", "false", "No", "off"])
def test_false_in_the_environment(text: str) -> None:
    assert not load(environment={"KEYE_THINK": text}).think


def test_an_empty_variable_counts_as_not_set() -> None:
    assert load(environment={"KEYE_SEED": "", "KEYE_MODEL": " "}) == Settings()


@pytest.mark.parametrize(
    ("name", "text"),
    [("KEYE_SEED", "many"), ("KEYE_SEED", "1.5"), ("KEYE_FPS", "fast"), ("KEYE_THINK", "maybe")],
)
def test_a_wrong_variable_is_named(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is '{text}'"):
        load(environment={name: text})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seeed = 1", "did you mean seed"),
        ("seed = 'one'", "seed is a whole number"),
        ("seed = true", "seed is a whole number"),
        ("fps = true", "fps is a number"),
        ("think = 1", "think is true or false"),
        ("model = 1", "model is text"),
        ("[aks]\nseed = 1", r"\[aks\]"),
        ("[ask]\nseeed = 1", "did you mean seed"),
        ("seed = ", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_named(content: str, message: str) -> None:
    Path("keye.toml").write_text(content)
    with pytest.raises(UsageError, match=rf"keye\.toml.*{message}"):
        load()


def test_a_config_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"none\.toml does not exist"):
        load(config=Path("none.toml"))
    with pytest.raises(UsageError, match=r"none\.toml does not exist"):
        load(environment={"KEYE_CONFIG": "none.toml"})


def test_a_config_that_is_a_folder() -> None:
    Path("folder").mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        load(config=Path("folder"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fps": 0.0}, "--fps must be above 0"),
        ({"fps": float("nan")}, "--fps must be above 0"),
        ({"max_frames": 0}, "--max-frames must be at least 1"),
        ({"max_tokens": 0}, "--max-tokens must be at least 1"),
        ({"temperature": -0.1}, "--temperature must be 0 or above"),
        ({"top_p": 0.0}, "--top-p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "--top-p must be above 0 and at most 1"),
        ({"top_k": -1}, "--top-k must be 0 or above"),
        ({"min_p": -0.1}, "--min-p must be from 0 to 1"),
        ({"min_p": 1.1}, "--min-p must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty must be above 0"),
        ({"repetition_penalty": float("nan")}, "--repetition-penalty must be above 0"),
        ({"stop": ["end", ""]}, "--stop must not be empty"),
        ({"seed": -1}, "--seed must be 0 or above"),
        ({"dtype": "int8"}, "--dtype must be auto"),
        ({"kernels": "cuda"}, "--kernels must be auto, reference or triton"),
        ({"device": "tpu"}, "--device must be auto"),
        ({"min_pixels": 2000, "max_pixels": 1000}, "--min-pixels 2000 is above --max-pixels 1000"),
    ],
)
def test_values_out_of_range(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(flags)
