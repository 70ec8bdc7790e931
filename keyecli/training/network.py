"""One forward pass of training: what of the network learns, from which losses. Methods: supervised fine-tuning with the loss of
answers alone, dense warm-up and sparse adaptation of the indexer as in DeepSeek-V3.2.

T tokens of a pack, S of them supervised, D width, V visual tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keyecli.errors import UsageError
from keyecli.kernels.kept import Keeper
from keyecli.model.decoder import DecoderLayer
from keyecli.model.keye import IGNORED_LABEL, LOSS_CHUNK_TOKENS, KeyeVL2ForConditionalGeneration
from keyecli.model.moe import SparseMoE
from keyecli.training.losses import load_balance
from keyecli.training.packing import Pack

Main = Literal["lora", "full", "projector", "indexer", "sparse"]
MAINS: tuple[Main, ...] = ("lora", "full", "projector", "indexer", "sparse")
EXTRAS = ("projector", "vision", "router")
BALANCE_WEIGHT = 1e-3
INDEXER_WEIGHT = 1.0


@dataclass(frozen=True)
class Trained:
    """What learns: `main`, and more of the network in `extras`."""

    main: Main
    extras: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ",".join((self.main, *self.extras))

    @property
    def sees(self) -> bool:
        """Whether the projector or the tower learns, so that what frames become changes with every step."""
        return self.main == "projector" or bool({"projector", "vision"} & set(self.extras))

    @property
    def answers(self) -> bool:
        """Whether the loss of answers counts."""
        return self.main != "indexer"

    @property
    def teaches_indexer(self) -> bool:
        return self.main in ("indexer", "sparse")


def trained(text: str) -> Trained:
    """What `--train` asks for: one of `MAINS`, and extras behind it; UsageError for anything else."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in MAINS and name not in EXTRAS]
    if unknown:
        raise UsageError(
            f"--train {unknown[0] or repr(text)} is not known; use {', '.join(MAINS)}, and with them vision, router"
        )
    mains = [name for name in names if name in MAINS and name not in EXTRAS] or ["projector"]
    if len(mains) > 1:
        raise UsageError(
            f"--train {text}: {mains[0]} and {mains[1]} are different trainings; do one, then the other"
        )
    extras = tuple(dict.fromkeys(name for name in names if name in EXTRAS and name != mains[0]))
    if mains[0] == "indexer" and extras:
        raise UsageError("--train indexer freezes everything else: leave the rest out")
    if mains[0] == "projector" and "projector" not in names:
        raise UsageError(f"--train {text} needs one of {', '.join(MAINS)}")
    return Trained(mains[0], extras)


def is_trained(name: str, what: Trained) -> bool:
    """Whether a parameter of the base learns. Tower and projector are frozen unless named, so is the router; an adapter's own
    parameters are not the base's."""
    if name.startswith("visual."):
        return "vision" in what.extras and "packing_position_embedding" not in name
    if name.startswith("mlp_AR."):
        return what.main == "projector" or "projector" in what.extras
    if "sa_indexer" in name:
        return what.teaches_indexer
    if name.endswith("mlp.gate.weight"):
        return "router" in what.extras
    return what.main in ("full", "sparse")


@dataclass(frozen=True)
class Sight:
    """What the visuals of a pack are: embeddings [V, D] of a frozen tower, or patches [P, 3, 14, 14] with the (rows, columns) of
    each frame, to be encoded with gradients."""

    embeds: Tensor | None = None
    patches: Tensor | None = None
    grids: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Sums:
    """What a pack adds to the losses: entropies fp32 [S] with their rows int64 [S]; the indexer's divergence summed over tokens;
    the routers' balance; tokens; and when measuring, bool [S], whether the token is the likeliest one."""

    entropies: Tensor
    rows: Tensor
    divergence: Tensor | None
    balance: Tensor | None
    tokens: int
    likeliest: Tensor | None = None


class Network(nn.Module):
    """The model with what learns switched on and everything else frozen; `forward` gives a pack's sums."""

    def __init__(self, model: KeyeVL2ForConditionalGeneration, what: Trained) -> None:
        super().__init__()
        self.model = model
        self.what = what
        self.keeper = Keeper()
        self.loads: dict[int, Tensor] = {}
        self._router_logits: dict[int, Tensor] = {}
        for number, layer in enumerate(model.model.layers):
            mlp = cast(DecoderLayer, layer).mlp
            if isinstance(mlp, SparseMoE):
                mlp.gate.register_forward_hook(self._watch(number, mlp.top_k))

    def learning(self) -> dict[str, nn.Parameter]:
        """Parameters that learn, by their names in the model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def checkpoint_activations(self) -> None:
        """Recompute each layer in the backward pass: only its input is kept, and what its attention found while there is room
        (`self.keeper.room_bytes`, none at first)."""
        how = {"use_reentrant": False, "context_fn": self.keeper.contexts}
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)

    def forward(self, batch: Pack, sight: Sight, measuring: bool = False) -> Sums:
        """A pack whose tensors are on the model's device. measuring: as the model answers, whatever learns."""
        model, what = self.model, self.what
        answers, teach = what.answers or measuring, what.teaches_indexer and not measuring
        hidden, divergence = self._decoded(
            batch, sight, teach, dense=what.main == "indexer" and not measuring
        )
        flat = batch.targets.flatten()
        learnt = (flat != IGNORED_LABEL).nonzero()[:, 0] if answers else flat.new_empty(0)
        states, wanted = hidden.flatten(0, 1)[learnt], flat[learnt]
        return Sums(
            entropies(model.logits, states, wanted),
            batch.rows.flatten()[learnt],
            None if divergence is None else divergence.sum(),
            self.balance(),
            batch.tokens,
            _likeliest(model.logits, states, wanted) if measuring else None,
        )

    def states(self, batch: Pack, sight: Sight) -> Tensor:
        """The last hidden states [S, D] before the learnt tokens of a pack, in their order."""
        hidden, _ = self._decoded(batch, sight, teach=False, dense=False)
        learnt = (batch.targets.flatten() != IGNORED_LABEL).nonzero()[:, 0]
        return hidden.flatten(0, 1)[learnt]

    def empty_pass(self) -> None:
        """A pass of nothing, which counts as one of the whole network where that is sharded."""

    def _decoded(self, batch: Pack, sight: Sight, teach: bool, dense: bool) -> tuple[Tensor, Tensor | None]:
        """Hidden states [1, T, D], and the indexer's divergence if it is taught."""
        model = self.model
        model.model.mode = "dense" if dense else "sparse"
        visual = sight.embeds
        if sight.patches is not None:
            visual = model.encode_frames(sight.patches, sight.grids)
        return model.model(
            model.embed(batch.input_ids, visual),
            batch.position_ids,
            segments=batch.segments,
            teach_indexer=teach,
        )

    def fullest_expert(self) -> float:
        """Rows of the fullest expert of the last pass over those of an even load, 1 when all have as many; 0 without experts."""
        return float(torch.stack(list(self.loads.values())).max()) if self.loads else 0.0

    def balance(self) -> Tensor | None:
        """Of the last pass, over all layers, where routers learn."""
        if "router" not in self.what.extras or not self._router_logits:
            return None
        chosen = self.model.config.num_experts_per_tok
        everywhere = [
            load_balance(logits, torch.ones(len(logits), dtype=torch.bool, device=logits.device), chosen)
            for logits in self._router_logits.values()
        ]
        return torch.stack(everywhere).mean()

    def _watch(self, layer: int, top_k: int) -> Callable[..., None]:
        def see(module: nn.Module, arguments: Any, logits: Tensor) -> None:
            with torch.no_grad():
                experts = logits.shape[-1]
                chosen = logits.topk(top_k, dim=-1).indices.flatten()
                counts = torch.zeros(experts, device=logits.device).index_add_(
                    0, chosen, torch.ones(len(chosen), device=logits.device)
                )
                self.loads[layer] = counts.max() * experts / len(chosen)
            if "router" in self.what.extras and logits.requires_grad:
                self._router_logits[layer] = logits

        return see


def freeze(model: KeyeVL2ForConditionalGeneration, what: Trained) -> None:
    """Let learn what `what` names of the base, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, what))


def entropies(logits: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies fp32 [S] of targets int64 [S], each after its state [S, D]; in chunks whose logits are made again in the
    backward pass, so that S × vocabulary logits never exist."""

    def chunk(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits(part), wanted, reduction="none")

    parts = [
        checkpoint(chunk, part, wanted, use_reentrant=False)
        for part, wanted in zip(
            states.split(LOSS_CHUNK_TOKENS), targets.split(LOSS_CHUNK_TOKENS), strict=True
        )
    ]
    return torch.cat(parts) if parts else torch.zeros(0, device=states.device)


def _likeliest(logits: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> Tensor:
    parts = zip(states.split(LOSS_CHUNK_TOKENS), targets.split(LOSS_CHUNK_TOKENS), strict=True)
    return torch.cat([logits(part).argmax(-1) == wanted for part, wanted in parts])


def loss_of(sums: Sums, supervised: float, tokens: float, packs: int) -> Tensor:
    """This pack's share of the step's loss: entropies over all `supervised` tokens of the step, divergence over all its `tokens`,
    balance over its `packs`."""
    total = sums.entropies.sum() / max(1.0, supervised)
    if sums.divergence is not None:
        total = total + INDEXER_WEIGHT * sums.divergence / max(1.0, tokens)
    return total + balance_loss(sums.balance, packs)


def balance_loss(balance: Tensor | None, packs: int) -> Tensor | float:
    """A pack's share of what routers lose by uneven loads, which counts for little (C); 0 where they do not learn."""
    return 0.0 if balance is None else BALANCE_WEIGHT * balance / max(1, packs)


def row_losses(sums: Sums, rows: int) -> Tensor:
    """Mean entropy of each row of a pack, fp32 [rows]; NaN where one of its tokens' is, 0 without any."""
    zeros = torch.zeros(rows, device=sums.entropies.device)
    added = zeros.index_add(0, sums.rows, sums.entropies.detach())
    counts = zeros.index_add(0, sums.rows, torch.ones_like(sums.entropies))
    return added / counts.clamp(min=1)


def moved(batch: Pack, device: torch.device | str) -> Pack:
    """A pack on a device."""
    tensors: Mapping[str, Any] = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in vars(batch).items()
    }
    return Pack(**tensors)
