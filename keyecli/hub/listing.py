"""What a model's repository holds at one commit, as the hub tells it, and the hub's refusals as sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from keyecli import __version__
from keyecli.errors import KeyeError, ModelError, UsageError
from keyecli.model.shards import one_line

DEFAULT_MODEL = "Kwai-Keye/Keye-VL-2.0-30B-A3B"
DEFAULT_REVISION = "main"
LISTING_TIMEOUT_S = 30.0

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHECKSUMS: dict[str, re.Pattern[str]] = {
    "sha256": re.compile(r"[0-9a-f]{64}"),
    "git-sha1": re.compile(r"[0-9a-f]{40}"),
}

Algorithm = Literal["sha256", "git-sha1"]


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository: its size in bytes and its checksum.

    sha256 for a file in large file storage; git-sha1, the hash of git's blob object, for any other.
    """

    path: str
    bytes: int
    algorithm: Algorithm
    checksum: str


@dataclass(frozen=True)
class Listing:
    """The files of a model at one commit; `revision` is what was asked for: a branch, a tag or a commit."""

    name: str
    revision: str
    commit: str
    endpoint: str
    files: tuple[RemoteFile, ...]


def list_files(name: str, revision: str | None = None) -> Listing:
    """Ask the hub (HF_ENDPOINT) which commit `revision` (default: main) is and which files that has.

    ModelError: no such model or revision, no access to it, or an answer without sizes and checksums; KeyeError: the hub
    cannot be reached; UsageError: a name or a revision that cannot be one.
    """
    asked = revision or DEFAULT_REVISION
    if ".." in PurePosixPath(asked).parts or asked.startswith("/"):
        raise UsageError(f"--revision {asked} is not a branch, tag or commit")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"{name} is not a hub name: give one such as {DEFAULT_MODEL}")
    api = HfApi(endpoint=constants.ENDPOINT, library_name="keyecli", library_version=__version__)
    with explaining(name, asked):
        commit = api.model_info(name, revision=asked, timeout=LISTING_TIMEOUT_S).sha
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise ModelError(
                f"{constants.ENDPOINT} names no commit for {name} at {asked}: it is no Hugging Face hub"
            )
        entries = list(api.list_repo_tree(name, revision=commit, recursive=True))
    files = tuple(_remote_file(entry) for entry in entries if hasattr(entry, "size"))
    return Listing(name, asked, commit, constants.ENDPOINT, files)


def _remote_file(entry: Any) -> RemoteFile:
    """A file of the hub's listing; its checksum becomes a file's name, so it must look like one."""
    if entry.lfs is not None:
        size, algorithm, checksum = entry.lfs.size, "sha256", entry.lfs.sha256
    else:
        size, algorithm, checksum = entry.size, "git-sha1", entry.blob_id
    if not isinstance(size, int) or size < 0 or not _CHECKSUMS[algorithm].fullmatch(str(checksum)):
        raise ModelError(
            f"{constants.ENDPOINT} tells no size or no checksum of {entry.path}: what cannot be verified is not fetched"
        )
    return RemoteFile(entry.path, size, algorithm, checksum)  # type: ignore[arg-type]


@contextmanager
def explaining(name: str, revision: str) -> Iterator[None]:
    """Whatever the hub or the way to it refuses inside the block becomes one sentence."""
    endpoint = constants.ENDPOINT
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise KeyeError(
            "the network is forbidden by HF_HUB_OFFLINE: unset it to pull a model, or give a folder with --model"
        ) from error
    except HFValidationError as error:
        raise UsageError(f"{name} is not a hub name: give one such as {DEFAULT_MODEL}") from error
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms at {endpoint}/{name}, then give an access token in HF_TOKEN or log in "
            "with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{name} has no revision {revision}: choose a branch, tag or commit listed at {endpoint}/{name}/commits/main"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{endpoint} has no model {name}, or shows it to nobody without the right: check the spelling, and give an "
            "access token in HF_TOKEN where it is private"
        ) from error
    except DisabledRepoError as error:
        raise ModelError(f"{endpoint} has withdrawn {name}: choose another model") from error
    except HfHubHTTPError as error:
        raise _refused(error.response.status_code, name, endpoint) from error
    except HTTPError as error:
        raise KeyeError(
            f"{endpoint} cannot be reached ({one_line(error) or type(error).__name__}): check the connection and HF_ENDPOINT"
        ) from error


def _refused(status: int, name: str, endpoint: str) -> KeyeError:
    if status == 401 and get_token() is None:
        return ModelError(
            f"{endpoint} shows {name} to nobody without an access token: check the spelling, and give a token in HF_TOKEN"
        )
    if status == 401:
        return ModelError(f"{endpoint} does not accept the access token: check HF_TOKEN or log in again")
    if status == 403:
        return ModelError(
            f"{endpoint} forbids access to {name}: the access token in HF_TOKEN needs the right to read it"
        )
    if status == 404:
        return ModelError(
            f"{endpoint} does not have what it lists of {name}: try again, or another --revision"
        )
    return KeyeError(f"{endpoint} answers with error {status}: try again later")
