"""Workers on a Ray cluster, one a GPU; what they answer is written down here, by the process that drives them."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keyecli.batch.hosts import Ended
from keyecli.batch.outpost import Outpost
from keyecli.engine.loaded import ModelFiles, choose_dtype, choose_offload, open_model
from keyecli.errors import KeyeError, KeyeWarning, UsageError

LOCAL = "local"
MOST_LOSSES = 3  # machines of a cluster go for reasons of their own
PATIENCE_S = 30.0  # without any worker, before the user is told
RESULTS_BYTES = 100 * 2**20  # Ray's store: lines of text pass through it
# Of this process's environment, what its workers must have too: where models are found, and how many threads compute.
_CARRIED = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Share:
    """What workers take of a cluster: `device`, "cuda" or "cpu"; how many there are; CPU cores of each."""

    device: str
    workers: int
    cpus: int


@contextmanager
def cluster(address: str, *, verbose: bool = False) -> Iterator[None]:
    """Inside the block this process drives the cluster at `address`: "auto", host:port, or "local", which is started for it.

    UsageError without ray, and for a cluster that cannot be joined.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would be sent over the network
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # how all later versions do it
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError:
        raise UsageError("--ray needs the package ray: pip install 'keyecli[ray]'") from None
    own: dict[str, Any] = {}
    what = f"the Ray cluster {address} cannot be joined"
    if address == LOCAL:
        own = {"include_dashboard": False, "object_store_memory": RESULTS_BYTES}
        what = "Ray cannot be started here"
    try:
        with nullcontext() if verbose else _stderr_closed():
            level = logging.INFO if verbose else logging.FATAL
            ray.init(address=address, log_to_driver=False, logging_level=level, **own)
    except (RayError, RuntimeError, ConnectionError, ValueError, OSError) as error:
        raise UsageError(f"{what}: {_first_sentence(error)}; -v shows what Ray says") from error
    try:
        yield
    finally:
        ray.shutdown()


def share_of_cluster(device: str | None, workers: int | None) -> Share:
    """What to take of the cluster that this process drives: see `share_of`."""
    import ray

    return share_of([node["Resources"] for node in ray.nodes() if node["Alive"]], device, workers)


def share_of(nodes: Sequence[Mapping[str, float]], device: str | None, workers: int | None) -> Share:
    """The workers that fit machines with these resources ("CPU", "GPU"), as many as `workers` where that is given.

    Else as many as there are GPUs, or two cores each. UsageError for more than there is.
    """
    if device not in (None, "auto", "cpu", "cuda"):
        raise UsageError(f"--device {device} is for one worker: leave it out with --ray")
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if device == "cuda" and not gpus:
        raise UsageError("--device cuda: the cluster has no GPU; leave the option out")
    if device != "cpu" and gpus:
        if workers is not None and workers > gpus:
            raise UsageError(f"--workers {workers} is one GPU each, and the cluster has {gpus}")
        return Share("cuda", workers or gpus, 0)
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    count = workers or max(1, sum(cores // 2 for cores in cpus))
    if count > sum(cpus):
        raise UsageError(f"--workers {count} is a CPU core each, and the cluster has {sum(cpus)}")
    most = next(each for each in range(max(cpus), 0, -1) if sum(cores // each for cores in cpus) >= count)
    return Share("cpu", count, most)


def open_model_for(share: Share, load: Mapping[str, Any]) -> ModelFiles:
    """As `open_model`, for the machines of the cluster: this one may have no GPU."""
    kernels = load["kernels"]
    if share.device == "cpu":
        return open_model(**{**load, "device": "cpu"})
    here = {"device": "cpu", "kernels": None if kernels == "triton" else kernels, "offload": None}
    files = open_model(**{**load, **here})
    return replace(
        files,
        offload=choose_offload(load.get("offload"), share.device, files.config),
        device=share.device,
        dtype=choose_dtype(load["dtype"], share.device),
        kernels="reference" if kernels == "reference" else "triton",
    )


class Actor:
    """A worker on the cluster: `coming` is what the actor says next."""

    def __init__(self, actor: Any, coming: Any) -> None:
        self.actor = actor
        self.coming = coming
        self.started = False

    def send(self, message: Any) -> None:
        self.actor.send.remote(message)

    def end(self) -> None:
        import ray

        ray.kill(self.actor)


class RayHost:
    """Starts workers on the cluster that this process drives."""

    most_losses = MOST_LOSSES

    def __init__(self, share: Share) -> None:
        import ray

        self.devices: Sequence[str] = [share.device] * share.workers
        needs = {"num_gpus": 1, "num_cpus": 0} if share.device == "cuda" else {"num_cpus": share.cpus}
        # Beside what waits for the process's words, messages for it are taken one after the other.
        remote: Any = ray.remote
        self._outpost = remote(concurrency_groups={"hearing": 1}, **needs)(Outpost)
        self._environment = {name: os.environ[name] for name in _CARRIED if name in os.environ}
        self._folder = str(Path.cwd())
        self._needs = "one GPU each" if share.device == "cuda" else f"{share.cpus} CPU cores each"
        self._told = False

    def start(self, first_message: Mapping[str, Any]) -> Actor:
        actor = self._outpost.remote()
        return Actor(actor, actor.start.remote(first_message, self._environment, self._folder))

    def listen(self, links: Sequence[Actor]) -> Iterator[tuple[Actor, list[dict[str, Any]] | Ended]]:
        import ray
        from ray.exceptions import RayActorError, RayError, RayTaskError

        awaited = {link.coming: link for link in links}
        nobody = not any(link.started for link in links)
        came, _ = ray.wait(list(awaited), timeout=PATIENCE_S if nobody and not self._told else None)
        if not came:
            self._told = True
            text = f"the cluster has no room yet for {len(links)} workers, {self._needs}: waiting for it"
            warnings.warn(text, KeyeWarning, stacklevel=2)
        for coming in came:
            link = awaited[coming]
            try:
                heard = ray.get(coming)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, KeyeError) else error from None
            except RayActorError as error:
                if error.actor_init_failed:
                    raise KeyeError(
                        "a machine of the cluster cannot start a worker: install the same keyecli there "
                        f"({_first_sentence(error)})"
                    ) from error
                yield link, Ended(f"its Ray actor ({_first_sentence(error)})")
                continue
            except RayError as error:
                yield link, Ended(f"its Ray actor ({_first_sentence(error)})")
                continue
            link.coming = link.actor.hear.options(concurrency_group="hearing").remote()
            if isinstance(heard, str):
                link.started = True
            else:
                yield link, heard

    def close(self) -> None:
        """The actors have been ended, and whose the cluster is, ends it."""


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """Ray's own C++ writes there, past every logger."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _first_sentence(error: BaseException) -> str:
    """Of a message of many lines the first, which says what it is about."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
