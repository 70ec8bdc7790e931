"""Fine-tuning's benchmark in small: its steps, its parts, its check, and what it is compared with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keyecli.bench import finetune, finetune_peft
from keyecli.bench.finetune import RandomRows, check_step, measure_lengths, random_loaded
from keyecli.bench.finetune_figures import FinetuneCheck, FinetuneComparison, FinetuneMeasurement
from keyecli.bench.parts import PartTimer
from keyecli.engine.loaded import LoadedModel
from keyecli.kernels import dispatch
from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import IGNORED_LABEL
from keyecli.training.network import Network
from tests.compare import assert_close
from tests.tiny import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

TOKENS, LEARNT, RANK = 40, 6, 2


def loaded() -> LoadedModel:
    return random_loaded(KeyeVL2Config(**tiny_config()), "cpu")


def test_rows_have_the_lengths_asked_for_and_learn_their_ends() -> None:
    config = KeyeVL2Config(**tiny_config())
    rows = RandomRows(config, [TOKENS, 300], LEARNT)
    assert [row.example.tokens for row in rows.step().rows] == [TOKENS, 300]
    (planned,) = rows.step(1).rows
    example = rows.lay_out(planned.row, ())
    assert example is planned.example
    assert example.learnt_tokens == LEARNT
    assert (example.targets[:-LEARNT] == IGNORED_LABEL).all()
    assert list(example.targets[-LEARNT:-1]) == list(example.input_ids[-LEARNT + 1 :])
    assert not {config.image_token_id, config.video_token_id} & {*example.input_ids, *example.targets}
    assert example.position_ids.shape == (3, 300)


def test_steps_learn_and_are_told_with_all_their_fields() -> None:
    short, long = measure_lengths(loaded(), [TOKENS, 2 * TOKENS], rank=RANK, learnt_tokens=LEARNT)
    assert (short.tokens, long.tokens) == (TOKENS, 2 * TOKENS)
    assert (short.network, short.how, short.learnt_tokens) == ("keye", "fp32", LEARNT)
    row = short.to_dict()
    assert row["schema"] == "keye.bench.finetune/1"
    assert row["tokens_per_s"] == pytest.approx(TOKENS / short.seconds)
    assert row["error"] == pytest.approx(row["planned_bytes"] / row["peak_bytes"] - 1)
    assert list(short.shares) == ["attention", "projections", "experts", "loss", "optimiser", "rest"]
    assert all(0 < share < 1 for share in short.shares.values())
    assert sum(short.shares.values()) == pytest.approx(1)


def test_marks_change_neither_loss_nor_gradients() -> None:
    example_rows = RandomRows(KeyeVL2Config(**tiny_config()), [TOKENS], LEARNT)
    found = []
    for watched in (False, True):
        model = loaded()
        network = finetune.adapted_network(model, RANK, moved_factors=True)
        timer = PartTimer("cpu")

        def loss(model: LoadedModel = model, network: Network = network) -> Tensor:
            return finetune.example_loss(model, network, example_rows.examples[0])

        with timer.watching(finetune.parts_of(model.model) if watched else {}):
            found.append(finetune.gradients_of(model, network, loss, None))
        assert bool(timer.seconds()) is watched
    (loss, gradients), (same, others) = found
    assert loss == same
    assert gradients.keys() == others.keys()
    # Sums of gradients may come in another order.
    for name, gradient in gradients.items():
        assert_close(gradient, others[name], relative=1e-5)


def test_parts_are_exclusive_and_count_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(99))
    monkeypatch.setattr("keyecli.bench.parts.time.perf_counter", lambda: float(next(clock)))
    inner, outer = nn.Linear(2, 2), nn.Sequential()
    outer.append(inner)
    timer = PartTimer("cpu")
    with timer.watching({outer: "outer", inner: "inner"}):
        timer.begin()
        output: Tensor = outer(torch.ones(1, 2, requires_grad=True))
        assert timer.seconds() == {"outer": 2.0, "inner": 1.0}
        output.sum().backward()
    # Forward: outer, inner, outer; so is the way back, a mark at each border.
    assert timer.seconds() == {"outer": 4.0, "inner": 2.0}


def test_the_check_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = check_step(loaded(), TOKENS, rank=RANK)
    assert right.loss_error == 0
    assert set(right.gradient_errors) == {
        *(f"{name}.lora_{side}" for name in finetune.PROJECTIONS for side in "AB"),
        *(f"experts.{name}_{side}" for name in ("gate_up", "down") for side in "AB"),
    }
    assert max(right.gradient_errors.values()) < 1e-5
    right.require()

    plain = dispatch.lora_experts

    def wrong(x: Tensor, *arguments: Any) -> Tensor:
        scaled = 1.5 if arguments[-1] is None else 1.0
        result = plain(x, *arguments)
        return result * scaled - (result * (scaled - 1)).detach()

    monkeypatch.setattr(dispatch, "lora_experts", wrong)
    found = check_step(loaded(), TOKENS, rank=RANK)
    assert found.loss_error == 0
    with pytest.raises(RuntimeError, match=r"a step is not what the definitions give: .* gradients by [5-9]"):
        found.require()


def test_no_number_is_no_match() -> None:
    nan = float("nan")
    with pytest.raises(RuntimeError, match="not what the definitions give"):
        FinetuneCheck(8, 2, nan, nan, {"q_proj.lora_A": 0.0}).require()


def adapted() -> finetune_peft.Adapted:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=32,
    )  # fmt: skip
    return finetune_peft.Adapted(Qwen3MoeForCausalLM(config), RANK, LEARNT)


def test_both_losses_of_the_baseline_are_the_same() -> None:
    model = adapted()
    torch.manual_seed(0)
    ids = torch.randint(64, (1, TOKENS))
    own, few = (float(model._loss(ids, own_loss).detach()) for own_loss in (True, False))
    assert own == pytest.approx(few, rel=1e-5)
    names = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    assert any("mlp.experts" in name for name in names)
    assert any("q_proj" in name for name in names)


def test_the_baseline_goes_on_until_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    plain = finetune_peft.Adapted.step

    def limited(self: finetune_peft.Adapted, tokens: int, *, own_loss: bool) -> tuple[float, float]:
        if tokens > (16 if own_loss else 32):
            raise torch.OutOfMemoryError
        return plain(self, tokens, own_loss=own_loss)

    monkeypatch.setattr(finetune_peft.Adapted, "step", limited)
    rows = list(finetune_peft.longer_and_longer(model, (8, 16, 32, 64)))
    assert [(row.network, row.tokens) for row in rows] == [
        (finetune_peft.OWN_LOSS, 8), (finetune_peft.OWN_LOSS, 16), (finetune_peft.FEW_LOGITS, 32)
    ]  # fmt: skip
    assert rows[0].steps == 2
    monkeypatch.setattr(finetune_peft, "SLOW_STEP_S", 0.0)
    (slow,) = finetune_peft.longer_and_longer(model, (8, 16))
    assert slow.steps == 1


def test_lines_by_hand() -> None:
    row = FinetuneMeasurement(
        "keye", "bf16", 1000, 512, 4.0, 0.5, 3, 2 * 2**30, 1.0, 3 * 2**30, {"attention": 0.75, "rest": 0.25}
    )
    assert row.line() == (
        "fine-tuning, keye, bf16: 1000 tokens in 4.00 s ±0.50 s, 250 tokens/s, peak 2.0 GiB, estimated 3.0 GiB (+50.0%); "
        "attention 75%, rest 25%"
    )
    compared = FinetuneComparison("PEFT", 1000, 250.0, 100.0, 4000)
    assert (compared.to_dict()["speedup"], compared.to_dict()["length_ratio"]) == (2.5, 4.0)
    assert compared.line() == (
        "fine-tuning, 2.50 × the tokens/s of PEFT at 1000 tokens, the longest that it holds (250 and 100); "
        "4000 tokens are 4.0 × as long"
    )
