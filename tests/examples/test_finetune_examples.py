"""The parts of examples/finetune_nano.sh and examples/rebuild_indexer.sh that judge, and the rows that they learn from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return scores(tmp_path / "before.json", new=[0.0, 0.0, 1.0, 0.0], old=[1.0, 1.0])


def scores(path: Path, **parts: list[float]) -> Path:
    path.write_text(json.dumps({name: {"kind": values} for name, values in parts.items()}))
    return path


def test_what_was_learnt_and_kept(tmp_path: Path, before: Path) -> None:
    after = scores(tmp_path / "after.json", new=[1.0] * 4, old=[1.0, 0.97])
    code, out = run("finetune_nano/compare.py", before, after)
    assert code == 0
    assert out.splitlines()[2:] == [
        "| **held-out rows** | **0.250** | **1.000** |",
        "| kind (4) | 0.250 | 1.000 |",
        "| **nano's old table** | **1.000** | **0.985** |",
        "| kind (2) | 1.000 | 0.985 |",
    ]


def test_what_was_not(tmp_path: Path, before: Path) -> None:
    after = scores(tmp_path / "after.json", new=[1.0, 1.0, 0.0, 1.0], old=[1.0, 0.9])
    code, out = run("finetune_nano/compare.py", before, after)
    assert code == 1
    assert "held-out rows reach 0.750, not 0.9" in out
    assert "the old table lost 0.050, more than 0.02" in out


def test_recall_of_every_layer(tmp_path: Path) -> None:
    for name, recalls in (("warm", ([0.4, 0.4], [0.76, 0.72])), ("sparse", ([0.76, 0.72], [0.78, 0.75]))):
        (tmp_path / name).mkdir()
        rows = [
            {"kind": "eval", "answer_recall": [0.7, 0.6], "indexer_recall": values, "best_recall": [0.8, 0.8]}
            for values in recalls
        ]
        rows.insert(1, {"kind": "step"})
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [tmp_path / name / "metrics.jsonl" for name in ("warm", "sparse")]
    code, out = run("rebuild_indexer/recall.py", *files)
    assert code == 1
    assert out.splitlines() == [
        "| layer | before | warm | sparse | answers | all | best possible |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 0 | 0.500 | 0.950 | 0.975 | 0.700 | 0.780 | 0.800 |",
        "| 1 | 0.500 | 0.900 | 0.938 | 0.600 | 0.750 | 0.800 |",
        "layers below 0.95: 1",
    ]
    assert run("rebuild_indexer/recall.py", *files, "--least", "0.9")[0] == 0


def test_rows_of_a_new_shape_and_a_new_verb(tmp_path: Path) -> None:
    code, out = run("finetune_nano/make_data.py", tmp_path / "data", "--rows", "24", "--old", "3")
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "data" / "data.jsonl").read_text().splitlines()]
    kinds = Counter(row["kind"] for row in rows)
    assert kinds.pop("old") == 3
    assert sum(kinds.values()) == 24
    for row in rows:
        assert (tmp_path / "data" / row["videos"][0]).is_file()
        text = json.dumps(row)
        if row["kind"] == "old":
            assert "heart" not in text
            assert "grow" not in text
        else:
            assert "heart" in text or "grow" in text or "another" in row["kind"] or "not grow" in row["kind"]
    assert f"{kinds.most_common(1)[0][1]:5d}" in out
