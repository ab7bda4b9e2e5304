"""Values that every layer shares: members, views, update rules' facts, parameter specs, units.

A *view* is one generation of membership: an ordered, immutable list of members. A *unit* is the atom of ownership:
one logical tensor, a row block of a large one, or one expert of one layer. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

SAVED, NOT_WHOLE, INTERRUPTED = HOLD_OUTCOMES = ("saved", "not_whole", "interrupted")
"""Outcomes of a save in a hold: the state is saved, or there is none to save; the members do not have all of the state;
something came between."""

SPOT = "spot"  # the market type of machines that the cloud may take back, as Ray's label `ray.io/market-type` has it


class Origin(NamedTuple):
    """When and where a worker was placed.

    Attributes:
        placed_s: wall clock, seconds; 0 if it is not known.
        node_kind: kind of its node, for the price; see `goodput.price_of`.
    """

    placed_s: float = 0.0
    node_kind: str = ""

    @property
    def on_spot(self) -> bool:
        """Its node is a spot machine: the first part of the kind says so."""
        return self.node_kind.partition("/")[0].lower() == SPOT


@dataclass(frozen=True, slots=True)
class Member:
    """One worker process as the others see it.

    Attributes:
        worker: unique id of one life of one worker process; a restarted process has a new id.
        node: fault domain (Ray node id, or host name).
        pid: operating system process id on that node.
        slots: largest number of expert slots per MoE layer that it can hold; 0 for no limit.
        draining: takes part only to hand its state over; it owns nothing and computes nothing in this view.
        address: host and port at which other workers try whether they reach it; port 0: none.
    """

    worker: str
    node: str
    pid: int
    slots: int = 0
    draining: bool = False
    address: tuple[str, int] = ("", 0)


@dataclass(frozen=True, slots=True)
class View:
    """One generation of membership. The rank of a member is its index in `members`."""

    generation: int
    members: tuple[Member, ...]

    @property
    def world_size(self) -> int:
        return len(self.members)

    @property
    def active_ranks(self) -> tuple[int, ...]:
        """Ranks that own state and compute, in order."""
        return tuple(rank for rank, member in enumerate(self.members) if not member.draining)

    def rank_of(self, worker: str) -> int | None:
        """Rank of a worker, or None when it is not in this view."""
        for rank, member in enumerate(self.members):
            if member.worker == worker:
                return rank
        return None


@dataclass(frozen=True, slots=True)
class RuleFacts:
    """Facts of an update rule that planning and the runtime ask for; its arithmetic is in `elastic_moe.optim`.

    Attributes:
        fields: names of the tensors of a unit's state, "weight" first; each has as many elements as the unit.
        has_gradient: the rule uses the unit's gradient, so the gradient is reduced and mirrored at every step.
        may_be_cut: a large tensor may be cut into row blocks; each block is a unit of its own.
        published_each_step: ranks that compute with the weight receive it after every step. If false, they receive it
            only on entering a view.
        elementwise: an element's update depends on that element alone. One call then updates all units of the rule that
            lie one after another; otherwise each unit has a call of its own.
        iterations: rounds of matrix products in an update of one matrix; 0: it is a pass over the elements.
    """

    fields: tuple[str, ...]
    has_gradient: bool
    may_be_cut: bool
    published_each_step: bool
    elementwise: bool
    iterations: int = 0


# Every update rule by its name. The rule NAME updates its units with `elastic_moe/optim/NAME.py`.
RULE_FACTS: dict[str, RuleFacts] = {
    "adamw": RuleFacts(
        fields=("weight", "m", "v"), has_gradient=True, may_be_cut=True, published_each_step=True, elementwise=True
    ),
    "muon": RuleFacts(
        fields=("weight", "m"),
        has_gradient=True,
        may_be_cut=False,
        published_each_step=True,
        elementwise=False,
        iterations=10,  # of Newton-Schulz, see `optim/muon.py`
    ),
    "bias": RuleFacts(
        fields=("weight",), has_gradient=False, may_be_cut=False, published_each_step=True, elementwise=False
    ),
    "frozen": RuleFacts(
        fields=("weight",), has_gradient=False, may_be_cut=True, published_each_step=False, elementwise=True
    ),
}


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One logical parameter tensor of the model, before any layout.

    Attributes:
        name: dotted name, unique; experts one by one (`layers.1.moe.experts.7.gate`).
        shape: its shape.
        init: "normal", "zeros", "ones", "values", or "experts" (rows of distinct expert indices).
        std: standard deviation for "normal".
        values: the elements in order, for "values".
        bound: number of experts, for "experts".
        optimizer: name of its update rule in `RULE_FACTS`.
        decay: weight decay applies.
        stacked: independent matrices that lie one above the other in it.
        lr_scale: factor of the learning rate; weight decay is not scaled.
        layer: transformer layer, if it belongs to one.
        expert: index of the routed expert within its layer, for expert weights only.
        moe_layer: index among the MoE layers, for expert weights and router biases.
    """

    name: str
    shape: tuple[int, ...]
    init: str = "normal"
    std: float = 0.02
    values: tuple[float, ...] = ()
    bound: int = 0
    optimizer: str = "adamw"
    decay: bool = True
    stacked: int = 1
    lr_scale: float = 1.0
    layer: int | None = None
    expert: int | None = None
    moe_layer: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rule(self) -> RuleFacts:
        """Facts of its update rule."""
        return RULE_FACTS[self.optimizer]


@dataclass(frozen=True, slots=True)
class ModelStats:
    """Statistics that a model returns with its loss, in this order. They add up over micro-batches and over ranks.

    Attributes:
        mtp_sum: cross-entropy of the multi-token prediction, summed over its targets, in nats.
        mtp_tokens: number of those targets.
        index_sum: loss of the attention's indexers, summed over tokens.
        z_sum: squares of the log-sum-exp of the head's logits, summed over targets; 0 without a z-loss.
        router_z_sum: the same of the routers' logits, summed over tokens, as a mean over MoE layers.
        gain_forward: largest absolute row sum of the product of the residual maps, as a mean over the positions of the
            batch's first sequence; 0 where the rank does not observe that sequence.
        gain_backward, gain_backward_min: the same of its largest and of its smallest absolute column sum.
    """

    mtp_sum: float = 0.0
    mtp_tokens: float = 0.0
    index_sum: float = 0.0
    z_sum: float = 0.0
    router_z_sum: float = 0.0
    gain_forward: float = 0.0
    gain_backward: float = 0.0
    gain_backward_min: float = 0.0


@dataclass(frozen=True, slots=True)
class Part:
    """A contiguous piece of one parameter inside a unit's flat vector.

    Attributes:
        param: the ParamSpec's name.
        start: first element of the piece in the flattened parameter.
        numel: elements in the piece.
        offset: where the piece begins in the unit's flat vector.
        shape: shape of the piece; that of the parameter, or of a block of its rows.
        stacked: independent matrices that lie one above the other in it.
    """

    param: str
    start: int
    numel: int
    offset: int
    shape: tuple[int, ...]
    stacked: int = 1


@dataclass(frozen=True, slots=True)
class Unit:
    """The atom of ownership: a named flat fp32 vector made of parts; `optimizer` names its update rule.

    `lr_scale`: factor of the learning rate; weight decay is not scaled.
    """

    name: str
    parts: tuple[Part, ...]
    optimizer: str = "adamw"
    decay: bool = True
    layer: int | None = None
    expert: int | None = None
    moe_layer: int | None = None
    lr_scale: float = 1.0

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.parts)

    @property
    def rule(self) -> RuleFacts:
        """Facts of its update rule."""
        return RULE_FACTS[self.optimizer]

    @property
    def state_numel(self) -> int:
        """Elements of its whole state: every field of its rule."""
        return self.numel * len(self.rule.fields)
