"""A new update rule is one line of facts and one function.

A rule registered here is carried through units, updates, transfers and checkpoints, without an edit elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from elastic_moe.checkpoint.manifest import Manifest
from elastic_moe.checkpoint.reader import load_manifest
from elastic_moe.checkpoint.shards import read_units, write_shard
from elastic_moe.checkpoint.writer import write_manifest
from elastic_moe.config.schema import ModelConfig, OptimConfig
from elastic_moe.control.vote import Measures, VoteResult
from elastic_moe.errors import UserError
from elastic_moe.model.init import Init
from elastic_moe.model.layers import DeclaredModule
from elastic_moe.optim.committed import CommittedStep
from elastic_moe.optim.rules import RULES, UpdateRule
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.plan.state.ownership import MIRROR, NONE, PRIMARY
from elastic_moe.plan.state.units import build_units
from elastic_moe.runtime.state import HeldState
from elastic_moe.types import RULE_FACTS, ModelStats, ParamSpec, RuleFacts, Unit

CPU = torch.device("cpu")
MATRIX = ParamSpec("matrix", (6, 4), optimizer="sgd")
TALL = ParamSpec("tall", (6, 4), optimizer="adamw")
SPECS = [
    MATRIX,
    TALL,
    *(
        ParamSpec(f"layers.0.experts.1.{name}", shape, optimizer="sgd", layer=0, expert=1, moe_layer=0)
        for name, shape in (("up", (3, 2)), ("down", (2, 3)))
    ),
    ParamSpec("layers.0.bias", (2,), init="zeros", optimizer="bias", layer=0, moe_layer=0),
    ParamSpec("table", (4, 2), optimizer="frozen"),
]


def apply_sgd(units: Sequence[Unit], state: UnitState, grad: torch.Tensor | None, step: CommittedStep) -> None:
    """SGD with momentum, whose step has length 1 in every row: it needs whole matrices, one unit at a time."""
    (unit,) = units
    assert grad is not None
    state["momentum"].mul_(0.5).add_(grad)
    for part in unit.parts:
        span = slice(part.offset, part.offset + part.numel)
        rows = state["momentum"][span].view(part.shape)
        state.weight[span].view(part.shape).sub_(step.lr * rows / rows.norm(dim=1, keepdim=True))


@pytest.fixture(autouse=True)
def _sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a new rule needs."""
    facts = RuleFacts(
        fields=("weight", "momentum"),
        has_gradient=True,
        may_be_cut=False,
        published_each_step=True,
        elementwise=False,
    )
    monkeypatch.setitem(RULE_FACTS, "sgd", facts)
    monkeypatch.setitem(RULES, "sgd", UpdateRule(facts, apply_sgd))


def vote_of(step: int, tokens: float = 1.0, nonfinite: float = 0.0) -> VoteResult:
    return VoteResult(
        ce_sum=0.0, tokens=tokens, grad_square=1.0, nonfinite=nonfinite, reconfigure=0.0, stop=0.0, save=0.0,
        stats=ModelStats(), measures=Measures(0, 0, 0, 0, 0, 0), load_LE=np.array([[3.0, 1.0]]),
        step=step, generation=1, world_size=1, balance=1.0, spike=False, layer_time_L=np.ones(1),
    )  # fmt: skip


def initial(units: Sequence[Unit]) -> dict[int, UnitState]:
    generator = torch.Generator().manual_seed(0)
    return {u: UnitState.initial(unit, torch.randn(unit.numel, generator=generator)) for u, unit in enumerate(units)}


def held_of(units: Sequence[Unit], roles: np.ndarray | None = None) -> HeldState:
    roles = np.full(len(units), PRIMARY, dtype=np.uint8) if roles is None else roles
    return HeldState.build(units, roles, initial(units), CPU)


def gradients(held: HeldState) -> dict[int, torch.Tensor]:
    """Different gradients, the same at every call, are put where they belong. Returns copies."""
    given = {}
    for u, unit in enumerate(held.units):
        if u in held.states and unit.rule.has_gradient:
            given[u] = torch.randn(unit.numel, generator=torch.Generator().manual_seed(u))
            held.grads.of(u).copy_(given[u])
    return given


def test_every_rule_has_facts_and_a_function() -> None:
    assert {name: rule.facts for name, rule in RULES.items()} == RULE_FACTS
    for facts in RULE_FACTS.values():
        assert facts.fields[0] == "weight"
        assert len(set(facts.fields)) == len(facts.fields)


def test_units_are_cut_where_the_rule_allows_it() -> None:
    units = build_units(SPECS, 8)
    assert [unit.name for unit in units] == [
        "matrix", "tall#0", "tall#1", "tall#2", "layers.0.experts.1", "layers.0.bias", "table",
    ]  # fmt: skip
    assert [part.shape for unit in units for part in unit.parts] == [
        (6, 4), (2, 4), (2, 4), (2, 4), (3, 2), (2, 3), (2,), (4, 2),
    ]  # fmt: skip
    assert [unit.state_numel for unit in units] == [48, 24, 24, 24, 24, 2, 8]


def test_a_layer_declares_a_parameter_of_the_rule() -> None:
    layer = DeclaredModule()
    layer.declare("matrix", (6, 4), Init(optimizer="sgd"))
    assert dict(layer.named_parameters()).keys() == {"matrix"}
    assert not dict(layer.named_buffers())


def test_the_update_is_the_rules() -> None:
    units = build_units(SPECS, 8)
    held, before = held_of(units), initial(units)
    grads = gradients(held)
    held.apply(vote_of(step=1, tokens=2.0), 0.1, OptimConfig(grad_clip=0.0), ModelConfig())
    for u, unit in enumerate(units):
        if unit.optimizer != "sgd":
            continue
        for part in unit.parts:
            span = slice(part.offset, part.offset + part.numel)
            rows = (grads[u] / 2.0)[span].view(part.shape)
            expected = before[u].weight[span].view(part.shape) - 0.1 * rows / rows.norm(dim=1, keepdim=True)
            torch.testing.assert_close(held.states[u].weight[span].view(part.shape), expected)
            torch.testing.assert_close(held.states[u]["momentum"][span], rows.flatten())
    frozen = next(u for u, unit in enumerate(units) if unit.optimizer == "frozen")
    assert torch.equal(held.states[frozen].weight, before[frozen].weight)


def test_twins_stay_equal_wherever_they_lie() -> None:
    units = build_units(SPECS, 8)
    whole = held_of(units)
    roles = np.array([MIRROR if u % 2 == 0 else NONE for u in range(len(units))], dtype=np.uint8)
    part = held_of(units, roles)
    assert set(part.states) == set(range(0, len(units), 2))
    for step in (1, 2, 3):
        for held in (whole, part):
            gradients(held)
            held.apply(vote_of(step=step, tokens=3.0), 0.1, OptimConfig(), ModelConfig())
    for u, state in part.states.items():
        assert torch.equal(state.pack(), whole.states[u].pack()), units[u].name


def test_state_travels_as_one_vector() -> None:
    units = build_units(SPECS, 8)
    held = held_of(units)
    gradients(held)
    held.apply(vote_of(step=1), 0.1, OptimConfig(), ModelConfig())
    for u, unit in enumerate(units):
        vector = held.states[u].pack()
        assert vector.numel() == unit.state_numel
        back = UnitState.unpacked(unit, vector)
        assert tuple(back.fields) == unit.rule.fields
        assert all(torch.equal(back[name], held.states[u][name]) for name in unit.rule.fields)
        assert vector.data_ptr() != held.states[u].weight.data_ptr(), "a packed state is a copy"


def write(held: HeldState, root: Path) -> Manifest:
    tensors = {
        f"{held.units[u].name}/{name}": tensor
        for u, state in held.states.items()
        for name, tensor in state.fields.items()
    }
    return write_manifest(str(root), 7, [write_shard(str(root), 7, "r0", tensors)])


def test_state_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    units = build_units(SPECS, 8)
    held = held_of(units)
    gradients(held)
    held.apply(vote_of(step=1), 0.1, OptimConfig(), ModelConfig())
    write(held, tmp_path)
    read = read_units(load_manifest(str(tmp_path), 7), [unit.name for unit in units])
    stored = {u: UnitState.stored(unit, read[unit.name]) for u, unit in enumerate(units)}
    again = HeldState.build(units, held.roles, stored, CPU)
    for u in range(len(units)):
        assert again.states[u].fields.keys() == held.states[u].fields.keys()
        assert torch.equal(again.states[u].pack(), held.states[u].pack())


def test_a_checkpoint_of_another_rule_is_refused(tmp_path: Path) -> None:
    (adamw,) = build_units([TALL], 0)
    manifest = write(held_of([adamw]), tmp_path)
    (sgd,) = build_units([ParamSpec("tall", (6, 4), optimizer="sgd")], 0)
    read = read_units(manifest, ["tall"])
    with pytest.raises(UserError, match="no momentum of tall"):
        UnitState.stored(sgd, read["tall"])
    (larger,) = build_units([ParamSpec("tall", (7, 4))], 0)
    with pytest.raises(UserError, match="no weight of tall with 28 elements"):
        UnitState.stored(larger, read["tall"])
