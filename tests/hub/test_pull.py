"""Pulls from a hub on this machine: whole, broken off, damaged, forbidden, too large."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants, scan_cache_dir

from keyecli.errors import ExitCode, KeyeError, ModelError, UsageError
from keyecli.hub import cache as cache_module
from keyecli.hub.cache import ModelCache, checksum_of, size_text
from keyecli.hub.listing import RemoteFile, list_files
from keyecli.hub.pull import Pulled, PullPlan, plan_pull, pull
from keyecli.hub.transfer import DamagedError, DiskSpaceError, Partial, Stopped, fetch
from keyecli.model.checkpoint import load_model, resolve_model
from tests.hub.server import COMMIT, NAME, Hub, Server
from tests.tiny import random_tensors, tiny_config, write_checkpoint

SHARD = "model-00002-of-00003.safetensors"
FILES = [
    "chat_template.jinja",
    "config.json",
    "model-00001-of-00003.safetensors",
    SHARD,
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def states(result: Pulled | PullPlan) -> dict[str, str]:
    return {item.file.path: item.state for item in result.files}


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*/blobs/*.incomplete"))


def test_a_plan_says_what_would_come_and_writes_nothing(hub: Hub, hub_cache: Path) -> None:
    plan = plan_pull(NAME)
    assert sorted(states(plan)) == FILES
    assert set(states(plan).values()) == {"missing"}
    assert {left.path: left.reason for left in plan.left_out} == {
        "README.md": "other",
        "modeling_keye.py": "code",
        "pytorch_model.bin": "pickle",
    }
    assert plan.listing.commit == COMMIT
    assert plan.needed_bytes == plan.total_bytes == sum(len(hub.files[name]) for name in FILES)
    assert plan.folder == hub_cache / "models--someone--toy-keye" / "snapshots" / COMMIT
    assert not hub_cache.exists()
    assert hub.fetched() == []


def test_a_pulled_model_is_the_hubs_and_loads(hub: Hub, hub_cache: Path, toy_folder: Path) -> None:
    seen: list[tuple[float, float | None]] = []
    heard: list[str] = []
    pulled = pull(
        plan_pull(NAME),
        on_progress=lambda text, done, total: seen.append((done, total)),
        on_file=lambda file, state: heard.append(file.path),
    )
    assert states(pulled) == dict.fromkeys(FILES, "fetched")
    assert sorted(heard) == FILES
    assert heard[0] == "config.json"
    folder = resolve_model(NAME)
    assert folder == pulled.plan.folder
    for name in FILES:
        assert (folder / name).is_symlink()
        assert (folder / name).read_bytes() == (toy_folder / name).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert "modeling_keye.py" not in hub.fetched()
    assert seen[-1] == (pulled.plan.total_bytes, pulled.plan.total_bytes)
    expected = load_model(toy_folder).state_dict()
    for name, tensor in load_model(folder).state_dict().items():
        assert torch.equal(tensor, expected[name])
    scanned = scan_cache_dir(hub_cache)
    assert scanned.warnings == []
    assert leftovers(hub_cache) == []
    (repo,) = scanned.repos
    assert [(revision.commit_hash, revision.refs) for revision in repo.revisions] == [(COMMIT, {"main"})]


def test_what_is_here_is_not_fetched_again(hub: Hub, hub_cache: Path) -> None:
    pull(plan_pull(NAME))
    hub.requests.clear()
    plan = plan_pull(NAME)
    assert plan.needed_bytes == 0
    assert set(states(pull(plan)).values()) == {"here"}
    assert hub.fetched() == []


def test_a_cut_connection_goes_on_where_it_broke(hub: Hub, hub_cache: Path) -> None:
    hub.cuts[SHARD] = [1000, 0, 70_000]
    pulled = pull(plan_pull(NAME))
    assert states(pulled)[SHARD] == "fetched"
    ranges = [asked for _, path, asked in hub.requests if path.endswith(SHARD)]
    assert ranges == [None, "bytes=1000-", "bytes=1000-", "bytes=71000-"]
    assert hub.sent[SHARD] == len(hub.files[SHARD])


def test_an_interrupted_pull_goes_on_and_is_no_model_before(hub: Hub, hub_cache: Path) -> None:
    hub.cuts[SHARD] = [5000, 0, 0, 0, 0, 0, 0]
    with pytest.raises(
        KeyeError, match=f"{SHARD} could not be fetched .* what has arrived is kept"
    ) as caught:
        pull(plan_pull(NAME))
    assert caught.value.exit_code == ExitCode.FAILURE
    # What other connections were in the middle of may be there too.
    assert hub.checksum(SHARD) + ".incomplete" in leftovers(hub_cache)
    with pytest.raises(ModelError, match="nor in the local Hugging Face cache"):
        resolve_model(NAME)
    assert scan_cache_dir(hub_cache).warnings == []
    hub.cuts.clear()
    plan = plan_pull(NAME)
    partial = next(item for item in plan.files if item.file.path == SHARD)
    assert (partial.state, partial.here_bytes) == ("partial", 5000)
    seen: list[float] = []
    pulled = pull(plan, on_progress=lambda text, done, total: seen.append(done))
    assert states(pulled)[SHARD] == "resumed"
    assert hub.sent[SHARD] == len(hub.files[SHARD])
    assert seen[-1] == plan.total_bytes
    assert leftovers(hub_cache) == []
    assert resolve_model(NAME) == plan.folder


def test_a_server_without_ranges_sends_all_again(hub: Hub, hub_cache: Path) -> None:
    hub.ranges = False
    hub.cuts[SHARD] = [1000]
    seen: list[float] = []
    pulled = pull(plan_pull(NAME), on_progress=lambda text, done, total: seen.append(done))
    assert (pulled.plan.folder / SHARD).read_bytes() == hub.files[SHARD]
    assert seen[-1] == pulled.plan.total_bytes


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json"])
def test_a_wrong_checksum_is_told_and_nothing_kept(hub: Hub, hub_cache: Path, name: str) -> None:
    hub.corrupt.add(name)
    with pytest.raises(
        DamagedError, match=f"{name} arrived damaged .*{hub.checksum(name)}.*nothing of it was kept"
    ):
        pull(plan_pull(NAME))
    assert not list(hub_cache.rglob(hub.checksum(name) + "*[!k]"))
    with pytest.raises(ModelError, match="nor in the local"):
        resolve_model(NAME)
    hub.corrupt.clear()
    pull(plan_pull(NAME))
    assert (resolve_model(NAME) / name).read_bytes() == hub.files[name]


@pytest.mark.parametrize("junk", [b"not the beginning", b"x" * 10_000_000])
def test_a_beginning_that_does_not_fit_is_forgotten(hub: Hub, hub_cache: Path, junk: bytes) -> None:
    partial = ModelCache(NAME).folder / "blobs" / (hub.checksum(SHARD) + ".incomplete")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(junk)
    pulled = pull(plan_pull(NAME))
    assert (pulled.plan.folder / SHARD).read_bytes() == hub.files[SHARD]
    assert leftovers(hub_cache) == []


def test_a_whole_partial_needs_no_request(hub: Hub, hub_cache: Path) -> None:
    partial = ModelCache(NAME).folder / "blobs" / (hub.checksum(SHARD) + ".incomplete")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(hub.files[SHARD])
    assert states(pull(plan_pull(NAME)))[SHARD] == "resumed"
    assert SHARD not in hub.fetched()


def test_too_small_a_disk_is_told_before_anything_is_written(
    hub: Hub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    plan = plan_pull(NAME)
    need = size_text(plan.total_bytes)
    with pytest.raises(
        DiskSpaceError, match=f"needs {need} more on the disk of {hub_cache} and 19.5 KiB are free"
    ) as caught:
        pull(plan)
    assert caught.value.exit_code == ExitCode.MEMORY
    assert not hub_cache.exists()


def test_a_disk_that_fills_up_keeps_what_has_arrived(
    hub: Hub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [30_000]
    write = Partial.add

    def add(self: Partial, piece: bytes) -> None:
        if self.file.path == SHARD:
            piece, room[0] = piece[: room[0]], room[0] - len(piece)
            write(self, piece)
            if room[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            write(self, piece)

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "add", add)
        with pytest.raises(DiskSpaceError, match=f"is full: .* of {SHARD} are still to come and .* are free"):
            pull(plan_pull(NAME))
    with pytest.raises(ModelError):
        resolve_model(NAME)
    assert ModelCache(NAME).partial_bytes(remote(hub, SHARD)) == 30_000
    assert states(pull(plan_pull(NAME)))[SHARD] == "resumed"


def test_a_folder_that_cannot_be_written_to(
    hub: Hub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Partial, piece: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Partial, "add", refuse)
    with pytest.raises(KeyeError, match=r"cannot write to .* \(Read-only file system\)"):
        pull(plan_pull(NAME))


def remote(hub: Hub, name: str) -> RemoteFile:
    return RemoteFile(name, len(hub.files[name]), "sha256", hub.checksum(name))


def test_verify_reads_again_what_is_here_and_replaces_what_is_damaged(hub: Hub, hub_cache: Path) -> None:
    folder = pull(plan_pull(NAME)).plan.folder
    blob = (folder / SHARD).resolve()
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    hub.requests.clear()
    assert set(states(pull(plan_pull(NAME))).values()) == {"here"}
    seen: list[float] = []
    pulled = pull(plan_pull(NAME), verify=True, on_progress=lambda text, done, total: seen.append(done))
    assert states(pulled) == dict.fromkeys(FILES, "verified") | {SHARD: "fetched"}
    assert hub.fetched() == [SHARD]
    assert (folder / SHARD).read_bytes() == hub.files[SHARD]
    assert seen[-1] == pulled.plan.total_bytes


def test_a_blob_of_another_size_is_fetched_again(hub: Hub, hub_cache: Path) -> None:
    folder = pull(plan_pull(NAME)).plan.folder
    (folder / SHARD).resolve().write_bytes(b"short")
    plan = plan_pull(NAME)
    assert states(plan)[SHARD] == "missing"
    pull(plan)
    assert (folder / SHARD).read_bytes() == hub.files[SHARD]


@pytest.mark.parametrize(
    ("part", "answer", "sentence", "code"),
    [
        ("/api/models/", (404, "RepoNotFound"), f"has no model {NAME}", ExitCode.MODEL),
        ("/api/models/", (401, ""), f"shows {NAME} to nobody without an access token", ExitCode.MODEL),
        ("/revision/", (404, "RevisionNotFound"), f"{NAME} has no revision main", ExitCode.MODEL),
        ("/revision/", (403, "GatedRepo"), f"{NAME} is gated: accept its terms at", ExitCode.MODEL),
        ("/resolve/", (403, "GatedRepo"), f"{NAME} is gated: accept its terms at", ExitCode.MODEL),
        ("/resolve/", (401, "x"), f"shows {NAME} to nobody", ExitCode.MODEL),
        ("/revision/", (403, ""), f"forbids access to {NAME}", ExitCode.MODEL),
        ("/resolve/", (404, "EntryNotFound"), "does not have what it lists", ExitCode.MODEL),
        ("/tree/", (418, ""), "answers with error 418", ExitCode.FAILURE),
        ("/resolve/", (503, ""), "could not be fetched .*error 503", ExitCode.FAILURE),
    ],
)
def test_refusals_are_one_sentence(
    hub: Hub, hub_cache: Path, part: str, answer: tuple[int, str], sentence: str, code: ExitCode
) -> None:
    hub.statuses[part] = answer
    with pytest.raises(KeyeError, match=sentence) as caught:
        pull(plan_pull(NAME))
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)


def test_nobody_there(hub: Hub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        KeyeError, match=r"http://127.0.0.1:9 cannot be reached .*check the connection"
    ) as caught:
        plan_pull(NAME)
    assert caught.value.exit_code == ExitCode.FAILURE


def test_offline(hub: Hub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(KeyeError, match="the network is forbidden by HF_HUB_OFFLINE"):
        plan_pull(NAME)
    assert hub.requests == []


def test_a_token_opens_a_gated_model(hub: Hub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_right"
    with pytest.raises(ModelError, match="is gated"):
        plan_pull(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    hub.statuses["/tree/"] = (401, "")
    with pytest.raises(ModelError, match="is gated"):
        plan_pull(NAME)
    hub.statuses["/revision/"] = (401, "")
    with pytest.raises(ModelError, match="does not accept the access token"):
        plan_pull(NAME)
    hub.statuses.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert set(states(pull(plan_pull(NAME))).values()) == {"fetched"}


def test_large_files_come_from_elsewhere_without_the_token(
    hub: Hub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with Server(Hub(dict(hub.files))) as storage:
        hub.elsewhere, storage.cuts[SHARD] = storage.endpoint, [1000]
        folder = pull(plan_pull(NAME)).plan.folder
    assert (folder / SHARD).read_bytes() == hub.files[SHARD]
    assert storage.fetched() == [name for name in FILES if name.endswith(".safetensors")]
    assert [asked for _, path, asked in storage.requests if path.endswith(SHARD)] == [None, "bytes=1000-"]
    assert set(storage.tokens) == {None}
    assert set(hub.tokens[1:]) == {"Bearer hf_right"}


@pytest.mark.parametrize("name", ["nano", "a/b/c", "../etc", "a b/c"])
def test_names_that_are_none(hub: Hub, hub_cache: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is not a hub name"):
        plan_pull(name)


def test_a_revision_that_is_none(hub: Hub, hub_cache: Path) -> None:
    with pytest.raises(UsageError, match=r"--revision \.\./main is not a branch"):
        plan_pull(NAME, "../main")
    with pytest.raises(ModelError, match="has no revision v9"):
        plan_pull(NAME, "v9")


def test_a_commit_is_found_under_itself_alone(hub: Hub, hub_cache: Path) -> None:
    folder = pull(plan_pull(NAME, COMMIT)).plan.folder
    assert resolve_model(NAME, COMMIT) == folder
    assert not (ModelCache(NAME).folder / "refs").exists()


def test_the_old_commit_stays_until_the_new_one_is_whole(hub: Hub, hub_cache: Path) -> None:
    old = pull(plan_pull(NAME)).plan.folder
    hub.commit = "f" * 40
    hub.files["config.json"] += b"\n"
    hub.corrupt.add("config.json")
    with pytest.raises(DamagedError):
        pull(plan_pull(NAME))
    assert resolve_model(NAME) == old
    hub.corrupt.clear()
    pulled = pull(plan_pull(NAME))
    assert [name for name, state in states(pulled).items() if state == "fetched"] == ["config.json"]
    assert resolve_model(NAME) == pulled.plan.folder != old


def test_another_kind_of_model_is_refused_before_its_weights(hub: Hub, hub_cache: Path) -> None:
    hub.files["config.json"] = b'{"model_type": "llama"}'
    with pytest.raises(ModelError, match="model of type 'llama'"):
        pull(plan_pull(NAME))
    assert hub.fetched() == ["config.json"]
    with pytest.raises(ModelError, match="nor in the local"):
        resolve_model(NAME)


def test_weights_that_do_not_belong_to_the_configuration(hub: Hub, hub_cache: Path, tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=3)
    other = write_checkpoint(tmp_path / "other", config, random_tensors(tiny_config()), shards=3)
    hub.files = Hub.of(other).files
    with pytest.raises(ModelError, match=r"lacks the tensor model\.layers\.2"):
        pull(plan_pull(NAME))
    with pytest.raises(ModelError, match="nor in the local"):
        resolve_model(NAME)


@pytest.mark.parametrize(
    ("keep", "sentence"),
    [
        ((".json", ".bin", ".py"), r"only as pickle files \(pytorch_model.bin\)"),
        ((".json",), "has no safetensors files"),
        ((".safetensors",), "has no config.json"),
    ],
)
def test_repositories_without_a_model(
    hub: Hub, hub_cache: Path, keep: tuple[str, ...], sentence: str
) -> None:
    hub.files = {name: content for name, content in hub.files.items() if name.endswith(keep)}
    with pytest.raises(ModelError, match=sentence):
        plan_pull(NAME)
    assert not hub_cache.exists()


def test_files_beyond_the_top_folder_are_left_out(hub: Hub, hub_cache: Path) -> None:
    for name in ("../evil.json", "sub/model.safetensors", ".hidden.json", "/etc/x.json"):
        hub.files[name] = b"{}"
    plan = plan_pull(NAME)
    assert sorted(states(plan)) == FILES
    assert {left.path for left in plan.left_out} >= {"../evil.json", "sub/model.safetensors", ".hidden.json"}


@pytest.mark.parametrize("checksum", ["../../../evil", "", "A" * 64, "0" * 63])
def test_a_checksum_that_is_none_is_refused(
    hub: Hub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch, checksum: str
) -> None:
    monkeypatch.setattr(Hub, "checksum", lambda self, name: checksum)
    with pytest.raises(ModelError, match="what cannot be verified is not fetched"):
        list_files(NAME)


def test_without_symbolic_links_files_stand_in_the_snapshot(
    hub: Hub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Any, *more: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = pull(plan_pull(NAME)).plan.folder
    assert not (folder / SHARD).is_symlink()
    assert list((folder.parents[1] / "blobs").iterdir()) == []
    assert set(states(plan_pull(NAME)).values()) == {"here"}
    (folder / SHARD).write_bytes(b"\x00" * len(hub.files[SHARD]))
    assert states(pull(plan_pull(NAME), verify=True))[SHARD] == "fetched"
    assert (folder / SHARD).read_bytes() == hub.files[SHARD]


def test_a_stopped_transfer_keeps_what_it_has(hub: Hub, hub_cache: Path) -> None:
    stop = Event()
    listing, file, cache = list_files(NAME), remote(hub, SHARD), ModelCache(NAME)
    cache.prepare()
    hub.cuts[SHARD] = [4000]

    def count(more: int) -> None:
        stop.set()

    with pytest.raises(Stopped):
        fetch(cache, listing, file, count, stop)
    assert cache.partial_bytes(file) == 4000
    counted: list[int] = []
    fetch(cache, listing, file, counted.append, Event())
    assert sum(counted) == file.bytes - 4000
    fetch(cache, listing, file, counted.append, Event())  # another process was faster
    assert sum(counted) == 2 * file.bytes - 4000


def test_partial_downloads_of_others_do_not_hide_the_model(hub: Hub, hub_cache: Path) -> None:
    """`hf download` leaves files and a snapshot of its own; a pull completes them."""
    cache = ModelCache(NAME)
    config = remote(hub, "config.json")
    blob = cache.folder / "blobs" / config.checksum
    for path in (blob.parent, cache.snapshot(COMMIT), cache.folder / "refs"):
        path.mkdir(parents=True)
    blob.write_bytes(hub.files["config.json"])
    (cache.snapshot(COMMIT) / "config.json").symlink_to(f"../../blobs/{config.checksum}")
    (cache.folder / "refs" / "main").write_text(COMMIT)
    files = {"README.md": {"size": 5, "blob_id": "0" * 40}}
    (cache.folder / "trees").mkdir()
    (cache.folder / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    assert states(pull(plan_pull(NAME)))["config.json"] == "here"
    assert sorted(path.name for path in resolve_model(NAME).iterdir()) == FILES


def test_checksums_are_those_of_sha256sum_and_git(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"hello\n")
    seen: list[int] = []
    assert checksum_of(path, "git-sha1", seen.append) == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert checksum_of(path, "sha256", seen.append) == (
        "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    )
    assert seen == [6, 6]


def test_sizes_for_a_reader() -> None:
    assert [size_text(count) for count in (0, 712, 4096, 62_244_164_320)] == [
        "0 bytes",
        "712 bytes",
        "4.0 KiB",
        "58.0 GiB",
    ]
