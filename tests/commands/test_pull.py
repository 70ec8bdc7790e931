"""`keye pull` as a user meets it, from a hub on this machine, and `keye ask -m NAME` afterwards."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.commands.conftest import Keye
from tests.commands.test_interrupt import terminal
from tests.hub.conftest import hub, hub_cache, toy_folder  # noqa: F401 - fixtures
from tests.hub.server import COMMIT, NAME, Hub

SHARD = "model-00002-of-00003.safetensors"
REPORT_FIELDS = {
    "schema", "model", "revision", "commit", "endpoint", "folder", "dry_run", "files", "left_out", "total_bytes",
    "needed_bytes", "free_bytes", "seconds", "keye_version",
}  # fmt: skip


def test_pull_then_ask(keye: Keye, hub: Hub, hub_cache: Path, clip: Path) -> None:  # noqa: F811
    hub.cuts[SHARD] = [1000]
    code, out, err = keye("pull", NAME)
    folder = hub_cache / "models--someone--toy-keye" / "snapshots" / COMMIT
    assert (code, out) == (0, f"{folder}: 9 files, 811.7 KiB, commit {COMMIT}\n")
    lines = err.splitlines()
    assert re.fullmatch(
        rf"keye: {NAME} at commit {COMMIT} \(main\) from {hub.endpoint}: 811.7 KiB in 9 files, 0 bytes of them here, "
        r"811.7 KiB to fetch, \S+ GiB free",
        lines[0],
    )
    assert lines[1:3] == [
        "keye: left out modeling_keye.py: remote code, which keye never runs",
        "keye: left out pytorch_model.bin: pickles, which keye never opens",
    ]
    assert f"keye: {SHARD}: 166.7 KiB, fetched, sha256 as listed" in lines
    assert len(lines) == 12

    code, out, err = keye("ask", str(clip), "What?", "-m", NAME, "--max-tokens", "4", "--json", "--no-think")
    assert code == 0, err
    answer = json.loads(out)
    assert (answer["model"], answer["weights_revision"]) == (NAME, COMMIT[:12])

    code, out, err = keye("pull", NAME, "-q")
    assert (code, err) == (0, "")


def test_json_says_all_that_is_documented(keye: Keye, hub: Hub, hub_cache: Path) -> None:  # noqa: F811
    code, out, _ = keye("pull", NAME, "--json", "--dry-run")
    plan = json.loads(out)
    assert code == 0
    assert not hub_cache.exists()
    assert (plan["dry_run"], plan["seconds"], plan["needed_bytes"]) == (True, None, plan["total_bytes"])
    code, out, _ = keye("pull", NAME, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["schema"] == "keye.pull/1"
    assert (report["model"], report["revision"], report["commit"]) == (NAME, "main", COMMIT)
    shard = next(file for file in report["files"] if file["file"] == SHARD)
    assert shard == {
        "file": SHARD,
        "bytes": len(hub.files[SHARD]),
        "sha256": hub.checksum(SHARD),
        "state": "fetched",
    }
    config = next(file for file in report["files"] if file["file"] == "config.json")
    assert config["git_sha1"] == hub.checksum("config.json")
    assert {"path": "modeling_keye.py", "bytes": 16, "reason": "code"} in report["left_out"]
    _, out, _ = keye("pull", NAME, "--json", "--verify")
    assert {file["state"] for file in json.loads(out)["files"]} == {"verified"}
    assert set(report) == set(plan) == REPORT_FIELDS


def test_a_dry_run_lists_files(keye: Keye, hub: Hub, hub_cache: Path) -> None:  # noqa: F811
    code, out, _ = keye("pull", NAME, "--dry-run", "-q")
    assert code == 0
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert rows[0] == ["file", "size", "is"]
    assert [SHARD, "166.7 KiB", "missing"] in rows
    assert ["modeling_keye.py", "16 bytes", "left out: code"] in rows
    assert rows[-1] == ["pytorch_model.bin", "5 bytes", "left out: pickle"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("nano",), 2, "keye: nano is not a hub name: give one such as Kwai-Keye/Keye-VL-2.0-30B-A3B\n"),
        (("someone/nothing",), 4, "keye: {endpoint} has no model someone/nothing, or shows it to nobody"),
        ((NAME, "--revision", "v2"), 4, f"keye: {NAME} has no revision v2: choose a branch"),
    ],
)
def test_what_cannot_be_pulled(
    keye: Keye,
    hub: Hub,  # noqa: F811
    hub_cache: Path,  # noqa: F811
    arguments: tuple[str, ...],
    code: int,
    sentence: str,
) -> None:
    got, out, err = keye("pull", *arguments)
    assert (got, out) == (code, "")
    assert err.startswith(sentence.format(endpoint=hub.endpoint))
    assert err.count("\n") == 1
    assert not hub_cache.exists()


def test_a_full_disk_and_a_damaged_file(
    keye: Keye,
    hub: Hub,  # noqa: F811
    hub_cache: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from types import SimpleNamespace

    from keyecli.hub import cache

    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1024))
        code, out, err = keye("pull", NAME, "-q")
    assert (code, out) == (5, "")
    assert err == (
        f"keye: {NAME} needs 811.7 KiB more on the disk of {hub_cache} and 1.0 KiB are free: make room, or set HF_HOME to "
        "a folder on a larger disk\n"
    )
    hub.corrupt.add(SHARD)
    code, out, err = keye("pull", NAME, "-q")
    assert (code, out) == (1, "")
    assert err.startswith(f"keye: {SHARD} arrived damaged (its sha256 is ")
    code, _, err = keye("ask", "clip.mp4", "What?", "-m", NAME)
    assert code != 0


def test_the_default_is_the_released_model(keye: Keye, hub: Hub, hub_cache: Path) -> None:  # noqa: F811
    code, _, err = keye("pull")
    assert code == 4, err
    assert "Kwai-Keye/Keye-VL-2.0-30B-A3B" in err
    assert hub.requests[-1][1] == "/api/models/Kwai-Keye/Keye-VL-2.0-30B-A3B/revision/main"


def test_interrupted_in_a_terminal_it_goes_on(
    keye: Keye,
    hub: Hub,  # noqa: F811
    hub_cache: Path,  # noqa: F811
    isolated: dict[str, str],
) -> None:
    places = {"HF_HOME": str(hub_cache.parent), "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    hub.stalls[SHARD] = 100_000
    with terminal(
        [sys.executable, "-m", "keyecli", "pull", NAME], {**isolated, **places, "TERM": "xterm"}
    ) as shown:
        # All other files are here, and this one has begun.
        shown.read_until(lambda seen: re.search(rb"7[\d.]+ KiB of 811.7 KiB", seen))
        shown.process.send_signal(signal.SIGINT)
        assert shown.end() == 130
    assert b"what has arrived is kept: the same command goes on from there" in shown.seen
    assert b"Traceback" not in shown.seen
    (partial,) = hub_cache.glob("*/blobs/*.incomplete")
    assert partial.name == hub.checksum(SHARD) + ".incomplete"
    here = partial.stat().st_size
    assert 0 < here < len(hub.files[SHARD])
    hub.stalls.clear()
    code, _, err = keye("pull", NAME)
    assert code == 0
    assert f"keye: {SHARD}: 166.7 KiB, resumed, sha256 as listed\n" in err
    asked = [asked for _, path, asked in hub.requests if path.endswith(SHARD)]
    assert asked == [None, f"bytes={here}-"]
