"""A rank that is alone computes with its master weights, with the bits that copies would give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastic_moe.plan.shares import Batching
from elastic_moe.runtime import session
from elastic_moe.runtime.exchange.one_memory import _joined
from elastic_moe.runtime.exchange.windows import windows_of
from elastic_moe.runtime.session import ContextBuilder
from elastic_moe.runtime.state import HeldState
from tests.unit.runtime.test_step import Lone, workers


@pytest.fixture
def lone(tmp_path: Path) -> Callable[[], Lone]:
    return workers(tmp_path)


def _in_place(worker: Lone, held: HeldState) -> set[str]:
    """Units whose every window lies in the memory of the held state, weights and gradients."""
    context, found = worker.context, set[str]()
    dense = dict(worker.model.named_parameters()) | dict(worker.model.named_buffers())
    layers = range(worker.config.model.num_moe_layers)
    weights = session.ComputeTensors(dense, [context.experts.slot_params(i) for i in layers])
    grads = session.ComputeTensors(worker.runner.gradients.tensors, [context.experts.slot_grads(i) for i in layers])
    for u, unit in enumerate(context.layout.units):
        windows = windows_of(context.layout, weights, u)
        places = held.states[u].weight.split([w.numel() for w in windows])
        same = [w.data_ptr() == p.data_ptr() for w, p in zip(windows, places, strict=True)]
        if unit.rule.has_gradient:
            windows = windows_of(context.layout, grads, u)
            places = held.grads.of(u).split([w.numel() for w in windows])
            same += [w.data_ptr() == p.data_ptr() for w, p in zip(windows, places, strict=True)]
        if all(same):
            found.add(unit.name)
    return found


def _same_tensors(worker: Lone) -> bool:
    """The gradients that are reduced are those that autograd adds to."""
    dense = all(p.grad is worker.runner.gradients.tensors[name] for name, p in worker.model.named_parameters())
    experts = worker.context.experts
    pairs = [
        (param, grad)
        for layer in range(worker.config.model.num_moe_layers)
        for param, grad in zip(experts.slot_params(layer), experts.slot_grads(layer), strict=True)
    ]
    return dense and all(param.grad is grad for param, grad in pairs)


def test_weights_and_gradients_exist_once(lone: Callable[[], Lone]) -> None:
    worker = lone()
    assert _in_place(worker, worker.context.held) == {unit.name for unit in worker.context.layout.units}
    assert _same_tensors(worker)
    worker.step()
    assert _in_place(worker, worker.context.held) == {unit.name for unit in worker.context.layout.units}
    assert _same_tensors(worker)


def test_the_bits_are_those_of_copies(lone: Callable[[], Lone], monkeypatch: pytest.MonkeyPatch) -> None:
    shared = lone()
    monkeypatch.setattr(session, "share", lambda *_: None)
    copied = lone()
    assert not _in_place(copied, copied.context.held)
    for _ in range(4):
        mine, theirs = shared.step().record, copied.step().record
        assert (mine["loss"], mine["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    for u, state in shared.context.held.states.items():
        assert torch.equal(state.pack(), copied.context.held.states[u].pack()), shared.context.layout.units[u].name


def test_a_change_of_the_state_moves_the_tensors(lone: Callable[[], Lone]) -> None:
    """As in a new view, or when homes move: the state is laid out anew, and the old one is no longer written to."""
    worker, twin = lone(), lone()
    for one in (worker, twin):
        one.step()
    old, context = worker.context.held, worker.context
    roles_U = context.layout.ownership.role(0)
    new = HeldState.build(context.layout.units, roles_U, old.states, torch.device("cpu"))
    shape = worker.config.model.num_moe_layers
    builder = ContextBuilder(context.layout.units, worker.model, worker.runner.gradients.tensors, shape, Batching(4, 2))
    ownership, placement = context.layout.ownership, context.layout.placement
    worker.context = builder.build(context.layout.view, worker.group, context.experts, new, ownership, placement)
    worker.local.holdings[:] = [new]
    assert len(_in_place(worker, new)) == len(context.layout.units)
    before = {u: state.pack() for u, state in old.states.items()}
    assert worker.step().record["loss"] == twin.step().record["loss"]
    assert all(torch.equal(state.pack(), before[u]) for u, state in old.states.items())


def test_nothing_is_shared_beside_others(lone: Callable[[], Lone]) -> None:
    worker = lone()
    layout, held = worker.context.layout, worker.context.held
    member = layout.view.members[0]
    layout.view = replace(layout.view, members=(member, replace(member, worker="other")))
    own = torch.zeros(3)
    session.share(layout, session.ComputeTensors({"x": own}, []), session.ComputeTensors({"x": own}, []), held)
    assert own.data_ptr() not in {state.weight.data_ptr() for state in held.states.values()}


def test_pieces_are_joined_only_if_they_lie_one_after_another() -> None:
    whole = torch.arange(12.0)
    a, b, c = whole[2:5], whole[5:6], whole[6:11]
    joined = _joined([a, b, c])
    assert joined is not None
    assert joined.data_ptr() == a.data_ptr()
    assert torch.equal(joined, whole[2:11])
    assert _joined([a, c]) is None
    assert _joined([b, a]) is None
    assert _joined([a, whole.clone()[5:6]]) is None
