"""The optimiser against torch's own, and the steps that bf16 alone would lose."""

from __future__ import annotations

import torch
from torch import nn

from keyecli.training.optimizer import MasterAdamW


def test_in_fp32_it_is_adamw_with_clipping() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(6, 4), nn.Linear(6, 4)
    theirs.load_state_dict(ours.state_dict())
    master = MasterAdamW(ours.parameters(), lr=1e-2, weight_decay=0.1, clip_norm=0.5)
    plain = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for step in range(5):
        x = torch.randn(8, 6)
        for model in (ours, theirs):
            model(x).square().sum().backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        plain.step()
        plain.zero_grad()
        torch.testing.assert_close(master.step(1e-2), expected)
        assert ours.weight.grad is None, step
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_small_steps_add_up_in_bf16() -> None:
    parameter = nn.Parameter(torch.full((4, 4), 1.0, dtype=torch.bfloat16))
    optimizer = MasterAdamW([parameter], lr=1e-4)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-4)
    # One step of 1e-4 rounds away next to 1.0 in bf16; a hundred of them must show.
    assert torch.allclose(optimizer.masters[0], torch.tensor(0.99), atol=1e-4)
    assert torch.all(parameter == torch.tensor(0.99).to(torch.bfloat16))


def test_frozen_and_unused_parameters_stay() -> None:
    used, unused, frozen = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = MasterAdamW([used, unused, frozen], lr=0.1)
    used.sum().backward()
    optimizer.step(0.1)
    assert not torch.equal(used, torch.ones(2, 2))
    assert torch.equal(unused, torch.ones(2, 2))
    assert torch.equal(frozen, torch.ones(2, 2))
