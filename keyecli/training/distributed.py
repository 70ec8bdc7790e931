"""The processes of a training run: started by torchrun or accelerate, each with a whole model or with a shard of one (FSDP2).

Sums over all processes give the losses and gradients that one process would have computed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from keyecli.errors import UsageError
from keyecli.training.network import Network

BUCKET_BYTES = 2**28


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. sharded: each holds a part of every layer."""

    rank: int = 0
    count: int = 1
    sharded: bool = False

    @property
    def first(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device | str) -> bool:
        """Whether the flag is set in any of them."""
        return bool(self.sum(torch.tensor(float(flag), device=device)) > 0)

    def gathered(self, value: object) -> list[object]:
        """The value of each process, in order."""
        if self.count == 1:
            return [value]
        found: list[object] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined(device: str, shard: bool | None) -> Iterator[tuple[Processes, str]]:
    """This process among the others that torchrun or accelerate started, and its own device.

    shard None: as accelerate's configuration says, else whole models. UsageError for sharding with one process.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" if shard is None else shard
    if count == 1:
        if shard:
            raise UsageError(
                "--shard shares the model out among processes, and there is one: start several with torchrun or "
                "accelerate launch"
            )
        yield Processes(), device
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(dist.get_rank(), count, wanted), device
    finally:
        dist.destroy_process_group()


def shard(network: Network, processes: Processes, device: str) -> None:
    """Give each process a part of every decoder layer, of the embeddings and of the output head (FSDP2); a layer is whole only
    while it computes, the head as long as the network does, since it computes as often as there are chunks of learnt tokens.
    Tower and projector stay whole in each, since their passes differ in number from process to process."""
    mesh = init_device_mesh(torch.device(device).type, (processes.count,))
    model = network.model
    for module in (*model.model.layers, model.model.embed_tokens):
        fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh, ignored_params={*model.visual.parameters(), *model.mlp_AR.parameters()})
    for method in ("states", "empty_pass"):
        register_fsdp_forward_method(network, method)


@contextmanager
def whole_layers(network: Network, processes: Processes) -> Iterator[None]:
    """Every layer is whole in every process, which may call the model, or parts of it, as often as it likes, without gradients.

    All processes enter together. Weights that the learner changes inside are not seen before the next time.
    """
    if not processes.sharded:
        yield
        return
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        # What a pass without gradients left whole may be older than the last update.
        part.reshard()
        part.set_reshard_after_forward(False, recurse=False)
    # FSDP takes what first computes for the whole of the network, and the engine calls layers by themselves.
    network.empty_pass()
    for part in parts:
        part.unshard()
    gathered = [(parameter, parameter.data) for parameter in network.parameters()]
    try:
        yield
    finally:
        # Kernels join matrices, whose parameters then are views of a copy that is never gathered into.
        for parameter, data in gathered:
            parameter.data = data
        # A backward pass gathers ahead what computed before, which has to be the same in every process.
        network.empty_pass()
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not network, recurse=False)


@contextmanager
def last_backward(network: Network, processes: Processes, last: bool) -> Iterator[None]:
    """Gradients of shards are exchanged once a step, in its last backward pass."""
    if processes.sharded:
        cast(FSDPModule, network).set_requires_gradient_sync(last)
    yield


def add_gradients(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """Sum gradients over processes that hold whole parameters; those of shards were averaged by FSDP, and become sums."""
    if processes.count == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if isinstance(parameter.grad, DTensor):
            parameter.grad.mul_(processes.count)
            continue
        bucket.append(parameter.grad)
        size += parameter.grad.nbytes
        if size >= BUCKET_BYTES:
            _reduce(bucket)
            bucket, size = [], 0
    _reduce(bucket)


def _reduce(gradients: list[Tensor]) -> None:
    if not gradients:
        return
    joint = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joint)
    parts = joint.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def whole(tensor: Tensor) -> Tensor:
    """A tensor, of a shard the whole of it; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """A tensor, of a shard what this process holds of it, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(saved: Tensor, like: Tensor) -> Tensor:
    """A whole tensor where and how `like` is: on its device, and of a sharded one this process's part."""
    if isinstance(like, DTensor):
        return distribute_tensor(saved.to(like.device), like.device_mesh, like.placements)
    return saved.to(like.device)
