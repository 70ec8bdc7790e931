"""What a pool of workers asks of where they run: processes of this machine (`processes`) or a Ray cluster (`ray_workers`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar


@dataclass(frozen=True)
class Ended:
    """What is heard last of a worker: how it ended, as in "the last one with signal SIGKILL"."""

    how: str


class Link(Protocol):
    """A worker as its pool reaches it."""

    @property
    def started(self) -> bool:
        """False while there is no room for it yet."""

    def send(self, message: Any) -> None:
        """Give it an object that JSON can hold; one that has ended takes it without complaint."""

    def end(self) -> None:
        """End it, whatever it does, with everything that it has begun."""


LinkT = TypeVar("LinkT", bound=Link)


class Host(Protocol[LinkT]):
    """Where workers run.

    devices: of each worker that there is to be. most_losses: a job at which so many workers were lost has failed, and so
    has the model after so many in a row that never came to work.
    """

    devices: Sequence[str]
    most_losses: int

    def start(self, first_message: Mapping[str, Any]) -> LinkT:
        """Start a worker (`worker`), whose first message this is."""

    def listen(self, links: Sequence[LinkT]) -> Iterator[tuple[LinkT, list[dict[str, Any]] | Ended]]:
        """Wait until something happens, and tell it: what a worker said, or that it has ended."""

    def close(self) -> None:
        """Called when all workers have been ended."""
