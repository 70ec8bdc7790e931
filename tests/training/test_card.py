"""The card says everything, and nothing that the data holds can become markup; read back by a Markdown and a YAML parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from keyecli.errors import KeyeError
from keyecli.training.card import write_card

ROW = {"source": "held.jsonl:3", "question": "What grows?", "expected": "The heart.", "answer": "A ring."}


def card(folder: Path, **changes: Any) -> str:
    folder.mkdir(exist_ok=True)
    arguments: dict[str, Any] = {
        "title": "Hearts that grow",
        "base": "Kwai-Keye/Keye-VL-2.0-30B-A3B",
        "base_revision": "abc123",
        "train": "lora,projector",
        "data": [{"path": "/home/someone/data.jsonl", "sha256": "f" * 64, "rows": 498, "skipped": 2}],
        "settings": {"rank": 16, "lr": 1e-4, "targets": ("attention", "experts"), "eval data": None},
        "results": {"own": 3, "loss_last": 0.25, "loss_first": 2.0, "seconds": 75.25, "peak_bytes": 3 * 2**30,
                    "held_out_exact_before": 0.125, "tokens": 1234567},
        "machine": {"device": "cuda", "GPUs": 2, "sharded": True},
        "samples": [ROW],
    }  # fmt: skip
    path = write_card(folder, **(arguments | changes))
    assert path == folder / "README.md"
    return path.read_text(encoding="utf-8")


def parts(text: str) -> tuple[dict[str, Any], list[Token]]:
    """The front matter, and the tokens of the page below it."""
    _, front, page = text.split("---\n", 2)
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    return yaml.safe_load(front), tokens


def cells(tokens: list[Token]) -> list[list[str]]:
    """The texts of all table rows, as a reader sees them."""
    rows: list[list[str]] = []
    for place, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("td_open", "th_open"):
            rows[-1].append("".join(part.content for part in tokens[place + 1].children or ()))
    return rows


def headings(tokens: list[Token]) -> list[str]:
    return [
        "".join(part.content for part in tokens[place + 1].children or ())
        for place, token in enumerate(tokens)
        if token.type == "heading_open"
    ]


def test_an_adapters_card(tmp_path: Path) -> None:
    folder = tmp_path / "my hearts"
    folder.mkdir()
    (folder / "loss.png").write_bytes(b"")
    front, tokens = parts(card(folder))
    assert front["base_model"] == "Kwai-Keye/Keye-VL-2.0-30B-A3B"
    assert front["base_model_relation"] == "adapter"
    assert front["library_name"] == "peft"
    assert {"lora", "keyecli"} <= set(front["tags"])
    assert headings(tokens) == [
        "Hearts that grow", "Use", "Trained on", "Results", "Samples of held-out rows", "Settings", "Machine"
    ]  # fmt: skip
    table = cells(tokens)
    for row in (
        ["data.jsonl", "498", "2", "f" * 64],
        ["training loss, first step", "2.0000"],
        ["time", "0:01:15.250"],
        ["most memory of a device", "3.0 GiB"],
        ["held-out rows exactly right before", "12.5 %"],
        ["tokens", "1,234,567"],
        ["own", "3"],
        ["lr", "0.0001"],
        ["targets", "attention, experts"],
        ["eval data", "none"],
        ["sharded", "yes"],
        list(ROW.values()),
    ):
        assert row in table
    assert table.index(["training loss, first step", "2.0000"]) < table.index(
        ["training loss, last step", "0.2500"]
    )
    (fence,) = (token for token in tokens if token.type == "fence")
    assert "keye ask clip.mp4 \"What happens?\" --adapter 'my hearts'\n" in fence.content
    images = [part for token in tokens for part in token.children or () if part.type == "image"]
    assert [image.attrs["src"] for image in images] == ["loss.png"]


def test_a_whole_models_card_names_its_folder_with_m_and_needs_no_plot(tmp_path: Path) -> None:
    text = card(tmp_path / "model", train="full", base="/models/keye", samples=[], data=[])
    front, _ = parts(text)
    assert front["library_name"] == "transformers"
    # The hub would refuse a path there.
    assert "base_model" not in front
    assert "-m model\n" in text
    assert "adapter" not in text
    assert "loss.png" not in text
    assert "Base: /models/keye" in text


def test_a_projector_saved_as_an_adapter_is_used_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    text = card(tmp_path, train="projector")
    assert parts(text)[0]["library_name"] == "peft"
    assert "--adapter" in text


NASTY = "a | b\n\n# Heading\n<script>alert(1)</script> [link](http://x) ![i](y) `code` **bold** --- \\| $x$ & ```\n---"


def test_texts_of_the_data_are_text(tmp_path: Path) -> None:
    shown = " ".join(NASTY.split())
    folder = tmp_path / "out```\n# x"
    front, tokens = parts(
        card(
            folder,
            title=f"{NASTY} ##",
            base='x"\n---\nlicense: mit',
            base_revision=NASTY,
            train=f"lora,{NASTY.replace(',', '')}",
            data=[{"path": f"/d/{NASTY.replace('/', '')}", "sha256": NASTY, "rows": NASTY}],
            samples=[{NASTY: NASTY, "answer": f"\x00{NASTY}"}],
            settings={NASTY: [NASTY]},
            results={NASTY: NASTY, "tokens": NASTY},
            machine={NASTY: NASTY},
        )
    )
    assert set(front) == {"library_name", "pipeline_tag", "tags"}
    assert headings(tokens)[0] == f"{shown} ##"
    assert len(headings(tokens)) == 7
    table = cells(tokens)
    for row in ([shown, shown], ["tokens", shown]):
        assert row in table
    assert [token.type for token in tokens].count("fence") == 1
    kinds = {part.type for token in tokens for part in token.children or ()}
    assert not {"link_open", "image", "html_inline", "code_inline", "strong_open"} & kinds
    assert "html_block" not in {token.type for token in tokens}


def test_long_answers_are_shortened(tmp_path: Path) -> None:
    rows = cells(parts(card(tmp_path, samples=[{"answer": "word " * 1000}]))[1])
    (answer,) = next(row for row in rows if row[0].startswith("word"))
    assert len(answer) < 500
    assert answer.endswith(" ...")


def test_a_card_that_is_there_is_replaced_and_a_disk_that_fails_named(tmp_path: Path) -> None:
    first = card(tmp_path)
    assert card(tmp_path, title="Another") != first
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyeError):
        write_card(
            tmp_path / "file", title="x", base="b", base_revision="r", train="lora", data=[], settings={},
            results={}, machine={}, samples=[],
        )  # fmt: skip
