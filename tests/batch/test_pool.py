"""What a pool of workers does, with workers that a test makes up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from keyecli.batch.answering import Outcome
from keyecli.batch.hosts import Ended
from keyecli.batch.identity import Work
from keyecli.batch.jobs import make_jobs
from keyecli.batch.workers import WorkerPool
from keyecli.errors import KeyeError, KeyeWarning, ModelError

Heard = list[dict[str, Any]] | Ended


class Puppet:
    """A worker that answers a job each time it is heard; at one whose id is "deadly" it ends.

    together: it ends already at the first job of a group that has such a one.
    """

    together = False

    def __init__(self, number: int, started: bool = True) -> None:
        self.number = number
        self.started = started
        self.groups: list[list[str]] = []
        self.most_groups = 0
        self.said_ready = False
        self.ended = False

    def send(self, message: Any) -> None:
        assert self.started
        assert not self.ended
        self.groups.append([job["id"] for job in message])
        self.most_groups = max(self.most_groups, len(self.groups))

    def end(self) -> None:
        self.ended = True

    def hear(self) -> Heard | None:
        if not self.said_ready:
            self.said_ready = True
            return [{"ready": {"is_nano": False, "warnings": []}}]
        if not self.groups:
            return None
        if "deadly" in self.groups[0][: None if self.together else 1]:
            return Ended("signal SIGSEGV")
        id = self.groups[0].pop(0)
        if not self.groups[0]:
            del self.groups[0]
        return [{"id": id, "outcome": Outcome(started_at=f"{self.number}", seconds=0.0).to_dict()}]


class PuppetHost:
    """Starts puppets, the first `late` of which come to work when another has said everything it had."""

    def __init__(self, workers: int, *, most_losses: int = 3, late: int = 0) -> None:
        self.devices: Sequence[str] = [f"device {number}" for number in range(workers)]
        self.most_losses = most_losses
        self.late = late
        self.started: list[Puppet] = []
        self.first_messages: list[Mapping[str, Any]] = []
        self.closed = False

    def start(self, first_message: Mapping[str, Any]) -> Puppet:
        self.first_messages.append(first_message)
        self.started.append(Puppet(len(self.started), started=len(self.started) >= self.late))
        return self.started[-1]

    def listen(self, links: Sequence[Puppet]) -> Iterator[tuple[Puppet, Heard]]:
        said = [(link, link.hear()) for link in links if link.started]
        if not any(heard for _, heard in said):
            assert not all(link.started for link in links), "the pool waits for nothing"
            for link in links:
                link.started = True
        for link, heard in said:
            if heard is not None:
                yield link, heard

    def close(self) -> None:
        assert all(worker.ended for worker in self.started)
        self.closed = True


def groups_of(*names: str) -> list[list[Work]]:
    """A group of jobs for each text, its jobs named by the words in it."""
    jobs = make_jobs(
        (id, {"id": id, "task": "summarize", "inputs": f"{id}.mp4"}) for name in names for id in name.split()
    )
    works = iter([Work(job, None, (), job.id) for job in jobs])  # type: ignore[arg-type]
    return [[next(works) for _ in name.split()] for name in names]


def answered(host: PuppetHost, *names: str) -> list[tuple[str, Outcome]]:
    with WorkerPool(host, {"load": {}}) as pool:
        found = [(work.job.id, outcome) for work, outcome in pool.answer(iter(groups_of(*names)))]
    assert host.closed
    return found


@pytest.mark.parametrize(("together", "losses"), [(False, 3), (True, 5)])
def test_a_job_at_which_every_worker_ends_fails_and_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, together: bool, losses: int
) -> None:
    monkeypatch.setattr(Puppet, "together", together)
    host = PuppetHost(2)
    found = dict(answered(host, "a b", "c h deadly d", "e", "f g"))
    assert sorted(found) == ["a", "b", "c", "d", "deadly", "e", "f", "g", "h"]
    assert found.pop("deadly").error == {
        "code": 1,
        "kind": "WorkerLost",
        "message": "3 worker processes ended at this job, the last one with signal SIGSEGV",
    }
    assert all(outcome.error is None for outcome in found.values())
    assert len(host.started) == 2 + losses
    assert {message["load"]["device"] for message in host.first_messages} == set(host.devices)


def test_each_job_is_done_once_and_a_group_by_one_worker() -> None:
    host = PuppetHost(3)
    found = answered(host, "a b c", "d e", "f", "g h", "i")
    by = {id: outcome.started_at for id, outcome in found}
    assert len(found) == len(by) == 9
    assert len({by[id] for id in "abc"}) == len({by[id] for id in "de"}) == len({by[id] for id in "gh"}) == 1
    assert len(set(by.values())) == 3
    assert max(worker.most_groups for worker in host.started) == 2


@pytest.mark.parametrize("late", [1, 2])
def test_who_has_no_room_yet_is_given_nothing(late: int) -> None:
    host = PuppetHost(2, late=late)
    assert sorted(id for id, _ in answered(host, "a", "b", "c")) == ["a", "b", "c"]


def test_nothing_to_do_waits_for_nobody() -> None:
    assert answered(PuppetHost(2, late=2)) == []


def test_workers_that_never_come_to_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Puppet, "hear", lambda self: Ended("exit code 1"))
    host = PuppetHost(1)
    sentence = "worker processes end while they load the model, the last one with exit code 1"
    with pytest.raises(KeyeError, match=sentence):
        answered(host, "a")
    assert len(host.started) == 3
    assert host.closed


def test_a_model_that_cannot_be_loaded_ends_the_run_and_a_lost_gpu_its_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped = {"stopped": {"kind": "ModelError", "message": "no such weights"}}
    with monkeypatch.context() as patch:
        patch.setattr(Puppet, "hear", lambda self: [stopped])
        with pytest.raises(ModelError, match="no such weights"):
            answered(PuppetHost(2), "a")

    hear = Puppet.hear

    def lose(self: Puppet) -> Heard | None:
        if self.number == 0 and self.said_ready and self.groups:
            self.groups[0][0] = "deadly"
            stopped["stopped"]["message"] = "the GPU is lost"
            if not getattr(self, "told", False):
                self.told = True
                return [stopped]
        return hear(self)

    monkeypatch.setattr(Puppet, "hear", lose)
    with pytest.warns(KeyeWarning, match="the GPU is lost"):
        found = answered(PuppetHost(1), "a b", "c")
    assert [(id, outcome.error) for id, outcome in found] == [("a", None), ("b", None), ("c", None)]
