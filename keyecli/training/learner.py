"""What learns, with its optimisers: every kind of training updates the network by this."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from keyecli.engine.loaded import LoadedModel
from keyecli.errors import KeyeError
from keyecli.model.keye import IGNORED_LABEL
from keyecli.training.distributed import Processes, placed_like
from keyecli.training.examples import Example
from keyecli.training.network import Network, Sight, loss_of, moved
from keyecli.training.optimizer import MasterAdamW
from keyecli.training.packing import Pack, pack
from keyecli.training.schedule import Schedule


class NotFiniteError(KeyeError):
    """The loss is not a number; the message names the rows."""


class Learner:
    """The network with its optimisers; gradients are made by who inherits."""

    def __init__(
        self,
        loaded: LoadedModel,
        network: Network,
        schedule: Schedule,
        processes: Processes,
        optimizer: str = "adamw",
    ) -> None:
        self.loaded, self.network = loaded, network
        self.schedule, self.processes = schedule, processes
        self.device = loaded.device
        learning = network.learning()
        self.names = sorted(learning, key=lambda name: "sa_indexer" in name)
        self.parameters = [learning[name] for name in self.names]
        indexer = [learning[name] for name in self.names if "sa_indexer" in name]
        rest = [learning[name] for name in self.names if "sa_indexer" not in name]
        # Each with a norm of its own: a step in which the indexer has much to learn must not shrink everybody's.
        self.optimizers = [
            MasterAdamW(part, 0.0, decay, clip_norm=schedule.clip_norm, kind=optimizer)
            for part, decay in ((rest, schedule.weight_decay), (indexer, 0.0))
            if part
        ]
        self.parts_s: dict[str, float] = {}

    # State: everything that a checkpoint has to hold of the network and its optimisers.

    def tensors(self) -> dict[str, Tensor]:
        """Master weights and moments of everything that learns."""
        return {
            f"{number}.{name}": tensor
            for number, optimizer in enumerate(self.optimizers)
            for name, tensor in optimizer.state().items()
        }

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        for number, optimizer in enumerate(self.optimizers):
            begin = f"{number}."
            part = {
                name.removeprefix(begin): tensor for name, tensor in tensors.items() if name.startswith(begin)
            }
            optimizer.take(part, placed_like)

    def update(self, lr: float) -> float:
        """One step of the optimisers at learning rate `lr` from the gradients, which are dropped; returns their norm."""
        with self.timed("update_s"):
            norms = [optimizer.step(lr) for optimizer in self.optimizers]
            return float(torch.stack([norm.float() for norm in norms]).norm())

    def drop_gradients(self) -> None:
        """Forget gradients that nothing is to be made of."""
        for parameter in self.parameters:
            parameter.grad = None

    def refuse_not_finite(self, bad: Sequence[str], what: str = "") -> None:
        """NotFiniteError when any process names rows whose loss is not a number; what: has become of the step."""
        named: list[str] = [name for part in self.processes.gathered(list(bad)) for name in part]  # type: ignore[attr-defined]
        if not named:
            return
        self.drop_gradients()
        raise NotFiniteError(
            f"the loss is not a number in {', '.join(named[:8])}{' …' if len(named) > 8 else ''}: {what}"
            "look at these rows, or lower --lr"
        )

    # With shards every process has to make as many passes with gradients.

    def rounds(self, passes: int) -> int:
        """How many there are in this step, of which `passes` are this process's own."""
        if not self.processes.sharded:
            return passes
        most: list[int] = self.processes.gathered(passes)  # type: ignore[assignment]
        return max(most)

    def learn_nothing(self) -> None:
        """A pass in which nothing is learnt, for the sake of a process that has one more."""
        sums = self.network(moved(self._nothing(), self.device), Sight())
        (loss_of(sums, 1, 1, 1) * 0).backward()

    def _nothing(self) -> Pack:
        """A pack of two tokens, any that stand for no visual, of which none is learnt."""
        config = self.loaded.config
        word = min({0, 1, 2} - {config.image_token_id, config.video_token_id})
        ids = torch.full((2,), word).numpy()
        return pack([Example("", ids, torch.arange(2).expand(3, 2).numpy(), ids * 0 + IGNORED_LABEL, 0)])

    def training(self) -> None:
        """Frozen parts are in evaluation, as they are when answering."""
        self.network.train()
        if "vision" not in self.network.what.extras:
            self.loaded.model.visual.eval()

    def peak_bytes(self) -> int:
        """The most memory so far: of the GPU, or of the process."""
        if self.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """The block counts into `parts_s`, until the device has done it."""
        begin_s = time.perf_counter()
        yield
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        self.parts_s[name] = self.parts_s.get(name, 0.0) + time.perf_counter() - begin_s
