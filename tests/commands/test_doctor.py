"""`keye doctor` as a user meets it: the machine, a model, its answers, the exit codes."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from keyecli.doctor import answers, codecs
from keyecli.doctor.codecs import Codec
from keyecli.model.companions import NANO_FOLDER
from tests.commands.conftest import Keye
from tests.hub.conftest import hub_cache  # noqa: F401 - a fixture
from tests.tiny import write_checkpoint

pytestmark = pytest.mark.usefixtures("hub_cache")

SECTIONS = ["machine", "kernels", "video", "room", "caches"]


def test_the_machine_in_words(keye: Keye) -> None:
    code, out, err = keye("doctor", "--no-progress")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line for line in lines if re.fullmatch(r"[a-z]+", line)] == [*SECTIONS, "memory"]
    assert "  ok       H.264: 6 frames of libx264 decoded as they were" in lines
    for line, after in itertools.pairwise(lines):
        if line.startswith(("  warning", "  problem")):
            assert after.startswith("           → ")
    rows = [line.split() for line in lines if line.startswith("Kwai-Keye/Keye-VL-2.0-30B-A3B ")]
    assert rows[0][1:4] == ["--dtype", "bf16", "32,768"]
    assert ["--quant", "int4", "262,144"] in [row[1:4] for row in rows]


def test_json(keye: Keye, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", shards=2)
    code, out, err = keye("doctor", "--json", "--model", str(folder))
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert set(report) == {"schema", "status", "model", "findings", "fits", "answers", "keye_version"}
    assert (report["schema"], report["model"], report["answers"]) == ("keye.doctor/1", str(folder), [])
    assert report["status"] in ("ok", "warning")
    for finding in report["findings"]:
        assert set(finding) == {"section", "name", "status", "text", "remedy", "details"}
        assert (finding["remedy"] is None) == (finding["status"] == "ok")
    assert list(dict.fromkeys(finding["section"] for finding in report["findings"])) == [*SECTIONS, "model"]
    assert set(report["fits"][0]) == {
        "model", "mode", "flags", "tokens", "device", "weights_bytes", "cache_bytes", "workspace_bytes", "total_bytes",
        "free_bytes", "fits",
    }  # fmt: skip
    assert (report["fits"][0]["model"], report["fits"][0]["tokens"]) == (str(folder), 4096)


def test_nano_passes_the_known_answers(keye: Keye, own_cache: Path) -> None:
    code, out, err = keye("doctor", "--ask", "--no-progress")
    assert code == 0, out + err
    assert not own_cache.exists()
    scores = dict(re.findall(r"  ok       (\w+): keye-nano: (\d\.\d\d) of 1 over \d questions", out))
    assert set(scores) == {"words", "colours", "shapes", "events"}
    assert min(map(float, scores.values())) >= 0.75
    table = out[out.index("known answers") :].splitlines()
    assert table[1].split() == ["clip", "topic", "question", "truth", "given", "score"]
    assert len(table) > 20


def test_random_weights_fail_them(keye: Keye, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(answers.HOW, "max_tokens", 4)
    folder = write_checkpoint(tmp_path / "model")
    code, out, _ = keye("doctor", "--ask", "--json", "--model", str(folder))
    report = json.loads(out)
    assert code == 4
    assert report["status"] == "problem"
    assert {answer["topic"] for answer in report["answers"]} == {"words", "colours", "shapes", "events"}
    assert set(report["answers"][0]) == {"clip", "topic", "question", "truth", "given", "score"}


def test_a_bad_model_is_not_asked_and_has_its_exit_code(keye: Keye, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", shards=2)
    (folder / "model-00001-of-00002.safetensors").unlink()
    code, out, err = keye("doctor", "--ask", "--model", str(folder))
    assert (code, err) == (4, "")
    lines = out.splitlines()
    place = next(place for place, line in enumerate(lines) if line.startswith("  problem  weights: "))
    assert lines[place].endswith(
        "names model-00001-of-00002.safetensors, which is missing: complete the download"
    )
    assert lines[place + 1] == f"           → get the files of {folder} again from where they come"
    assert "known answers" not in out


def test_another_problem_has_code_1(keye: Keye, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "CODECS", (Codec("H.267", "h267", {}),))
    code, out, _ = keye("doctor", "--json")
    assert code == 1
    assert json.loads(out)["status"] == "problem"


def test_a_model_that_does_not_fit_is_told_before_it_is_asked(
    keye: Keye, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keyecli.engine import loaded

    monkeypatch.setattr(loaded, "free_memory_bytes", lambda device: 1000)
    code, out, _ = keye("doctor", "--ask", "--json", "--model", str(NANO_FOLDER))
    assert code == 4
    (finding,) = (finding for finding in json.loads(out)["findings"] if finding["section"] == "answers")
    assert finding["text"].startswith(f"the weights of {NANO_FOLDER} take ")


def test_wrong_usage(keye: Keye, tmp_path: Path) -> None:
    code, out, err = keye("doctor", "--hashes")
    assert (code, out) == (2, "")
    assert err == "keye: --hashes compares the files of a model: name one with --model\n"
    folder = write_checkpoint(tmp_path / "model")
    code, out, err = keye("doctor", "--json", "--model", str(folder), "--revision", "main")
    assert (code, out) == (2, "")
    code, _, err = keye("doctor", "--json", "--model", str(folder), "--ask", "--device", "cuda:99")
    assert "does not exist" in err
