"""Gradients: from the ranks that compute with a unit to its primary, and the sums from there to its mirrors.

Where ranks are on several nodes, gradients leave as soon as the last backward pass of a step has made them, in buckets
that follow it from the last layer to the first. So most of them travel while this rank still computes, and the sums of
a bucket leave for their mirrors two buckets later. All ranks begin these exchanges in the same order; a rank may begin
some of them after its backward pass. Rows that travel in the same pass have a group of their own.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_moe.parallel.collectives.group import HOST, Group, Pending
from elastic_moe.plan.state.schedule import Layout, Schedule
from elastic_moe.runtime.exchange.rounding import StochasticRounding
from elastic_moe.runtime.exchange.unit_exchange import UnitExchange
from elastic_moe.runtime.exchange.windows import ComputeTensors, copy_all, windows_of
from elastic_moe.runtime.state import HeldState

ROOM_BYTES = 64 << 20  # of the buckets that are under way at once, unless one alone is larger
LAG = 2  # buckets that begin before the sums of one leave: so long it has time to arrive


class GradientReducer:
    """Reduces gradients to the state that this rank holds, bucket by bucket.

    Args:
        layout: the schedules.
        grads: this rank's gradient tensors; those of units without a gradient are not used.
        held: takes the reduced gradients.
        group: the collectives of this generation.
        rounding_seed: of the stochastic rounding to bf16 of what is sent; None: it is sent as it is.
    """

    def __init__(
        self,
        layout: Layout,
        grads: ComputeTensors,
        held: HeldState,
        group: Group,
        rounding_seed: int | None = None,
    ) -> None:
        held.grads.lie_in(_at_home(layout, grads, held))
        of_update = next(iter(grads.dense.values()))
        on_host = of_update.dtype == torch.float32 and of_update.device == held.device == HOST
        early_U = layout.early_bucket_U if on_host else None
        bucket_U = layout.bucket_U if early_U is None else early_U
        buckets = zip(layout.gradients.split(bucket_U), layout.mirrors.split(bucket_U), strict=True)
        self._buckets = [
            _Bucket(layout, *bucket, grads, held, group, _rounding(layout, rounding_seed, number))
            for number, bucket in enumerate(buckets)
        ]
        self._waiting = {} if early_U is None else _waiting(layout, early_U)
        self._under_way = _UnderWay()
        self._to_mirror = self._buckets if (layout.ownership.mirrors >= 0).any() else []
        self._begun = self._mirrored = 0  # buckets of this step whose gradients, and whose sums, have left

    def early(self, step: int) -> Callable[[str], None] | None:
        """A step's last backward pass begins. Returns what is to be called with each parameter that has its gradient.

        None where gradients leave in `reduce`: all ranks are on one node, sums are exact, or gradients or state are not
        in host memory.
        """
        if not self._waiting:
            return None
        missing = Counter(number for numbers in self._waiting.values() for number in numbers)

        def complete(parameter: str) -> None:
            missing.subtract(self._waiting.get(parameter, ()))
            while self._begun < len(self._buckets) and not missing[self._begun]:
                self._begin_next(step)

        return complete

    def reduce(self, step: int) -> float:
        """Sum every unit's gradient at its primary; collective. Begins what has not left in the backward pass.

        The sum adds up in the order of the ranks, so it is the same in every run with this layout.

        Returns:
            Sum of squares of the reduced gradients, over the units whose primary is this rank.
        """
        while self._begun < len(self._buckets):
            self._begin_next(step)
        self._end_until(self._buckets[-1])
        self._begun = 0
        return sum(bucket.square for bucket in self._buckets)

    def mirror(self) -> None:
        """Send each reduced gradient from its primary to the unit's mirrors, as far as it has not left; collective."""
        while self._mirrored < len(self._to_mirror):
            self._begin_mirror()
        self._under_way.end()
        self._mirrored = 0

    def _begin_next(self, step: int) -> None:
        """Send the gradients of the next bucket, and the sums of an earlier one."""
        bucket = self._buckets[self._begun]
        bucket.is_reduced = False
        self._under_way.begin(partial(bucket.reduce, step), bucket.to_primaries.moved_bytes)
        self._begun += 1
        if self._begun > LAG and self._to_mirror:
            self._begin_mirror()

    def _begin_mirror(self) -> None:
        bucket = self._to_mirror[self._mirrored]
        self._end_until(bucket)
        self._under_way.begin(bucket.mirror, bucket.to_mirrors.moved_bytes)
        self._mirrored += 1

    def _end_until(self, bucket: _Bucket) -> None:
        """Wait until a bucket is reduced."""
        while not bucket.is_reduced:
            self._under_way.end_first()


class _UnderWay:
    """Exchanges under way, as many as there is room for. They end in the order in which they began."""

    def __init__(self) -> None:
        self._exchanges = deque[tuple[Callable[[], None], int]]()

    def begin(self, begin: Callable[[], Callable[[], None]], moved_bytes: int) -> None:
        """Begin an exchange, after those before it have ended as far as room is needed.

        Args:
            begin: begins it, and returns what waits for its end and takes what came.
            moved_bytes: of its buffers.
        """
        while self._exchanges and sum(size for _, size in self._exchanges) + moved_bytes > ROOM_BYTES:
            self.end_first()
        self._exchanges.append((begin(), moved_bytes))

    def end(self) -> None:
        """End all of them."""
        while self._exchanges:
            self.end_first()

    def end_first(self) -> None:
        """End the one that began first."""
        end, _ = self._exchanges.popleft()
        end()


def _rounding(layout: Layout, seed: int | None, bucket: int) -> StochasticRounding | None:
    return None if seed is None else StochasticRounding(seed, layout.rank, bucket)


def _waiting(layout: Layout, bucket_U: NDArray[np.int64]) -> dict[str, set[int]]:
    """Parameter -> the buckets that may not leave before its gradient is complete.

    An expert's gradients are added within the backward pass of its layer, before those of the layer's norms.
    """
    units, of_layer, waiting = layout.units, dict[int | None, set[str]](), dict[str, set[int]]()
    trained = [(u, unit, {part.param for part in unit.parts}) for u, unit in enumerate(units) if unit.rule.has_gradient]
    for _, unit, parameters in trained:
        if unit.expert is None:
            of_layer.setdefault(unit.layer, set()).update(parameters)
    for u, unit, parameters in trained:
        for parameter in parameters if unit.expert is None else of_layer[unit.layer]:
            waiting.setdefault(parameter, set()).add(int(bucket_U[u]))
    return waiting


def _at_home(layout: Layout, grads: ComputeTensors, held: HeldState) -> dict[int, list[torch.Tensor]]:
    """Experts that this rank owns and computes with, and the windows on their gradients, where the update can read
    them. A rank that is alone has all gradients in vectors of the state (`one_memory.py`), where they lie already.
    """
    of_update = next(iter(grads.dense.values()))
    if of_update.dtype != torch.float32 or of_update.device.type != held.device.type or layout.view.world_size == 1:
        return {}
    own = layout.gradients.send[layout.rank]
    return {u: windows_of(layout, grads, u) for u in own if layout.units[u].expert is not None}


class _Bucket:
    """The part of the reduction that is made at once.

    Args:
        gradients, mirrors: its schedules.
        rounding: of what is sent; None: it is sent as it is.

    Attributes:
        to_primaries, to_mirrors: its exchanges.
        is_reduced: its gradients of this step are added up.
        square: sum of squares of its reduced gradients, over the units whose primary is this rank.
    """

    def __init__(
        self,
        layout: Layout,
        gradients: Schedule,
        mirrors: Schedule,
        grads: ComputeTensors,
        held: HeldState,
        group: Group,
        rounding: StochasticRounding | None,
    ) -> None:
        self._layout, self._held, self._mirrors, self._rounding = layout, held, mirrors, rounding
        self._dtype = next(iter(grads.dense.values())).dtype
        own, others = gradients.send[layout.rank], gradients.without(layout.rank)
        self._windows = [window for u in others.sent_units for window in windows_of(layout, grads, u)]
        narrow = torch.bfloat16 if rounding else None
        self.to_primaries = UnitExchange(layout, others, group, held.device, narrow or self._dtype)
        self.to_mirrors = UnitExchange(layout, mirrors, group, held.device, narrow or torch.float32)
        self._arriving = [(rank, u) for rank, units in enumerate(others.receive) for u in units]
        self._own = {u: windows_of(layout, grads, u) for u in own}
        self._rounds = list(_rounds(gradients.receive))
        self._units = sorted(self._rounds[0]) if self._rounds else []
        self._apart = [u for u in self._units if not held.grads.is_in_place(u)]
        self.is_reduced, self.square = False, 0.0

    def reduce(self, step: int) -> Callable[[], None]:
        """Begin to send a step's gradients to their primaries. Returns what waits for them and adds them up."""
        pack = partial(self._rounding.pack, step=step) if self._rounding else None
        return partial(self._add_up, step, *self.to_primaries.begin(self._windows, pack))

    def _add_up(self, step: int, pending: Pending, received: torch.Tensor) -> None:
        """Add up what has come, once it is there."""
        pending.wait()
        self.is_reduced = True
        if not self._units:
            return
        split = received.to(self._dtype).split(self._numels([u for _, u in self._arriving]))
        pieces = dict(zip(self._arriving, split, strict=True))
        if self._dtype == torch.float32:
            self._add_up_apart({u: self._held.grads.of(u) for u in self._apart}, pieces)
            self._add_up_in_place(pieces)
        else:  # rounded once, at the end
            numels = self._numels(self._units)
            buffer = torch.empty(sum(numels), dtype=self._dtype, device=self._held.device)
            wide = dict(zip(self._units, buffer.split(numels), strict=True))
            self._add_up_apart(wide, pieces)
            copy_all([self._held.grads.of(u) for u in self._units], list(wide.values()))
        if self._rounding:  # to what the mirrors get
            sums = [piece for u in sorted(set(self._mirrors.sent_units)) for piece in self._held.grads.pieces(u)]
            self._rounding.round_sums(sums, step)
        reduced = [piece for u in self._units for piece in self._pieces(u)]
        norms = torch._foreach_norm(reduced)  # pyright: ignore[reportPrivateImportUsage]
        self.square = sum((torch.stack(norms).double() ** 2).tolist())

    def _pieces(self, unit: int) -> Sequence[torch.Tensor]:
        """The reduced gradient, cut as this rank's windows are, so that the norm does not depend on where it lies."""
        if self._held.grads.is_in_place(unit) or unit not in self._own:
            return self._held.grads.pieces(unit)
        return self._held.grads.of(unit).split([window.numel() for window in self._own[unit]])

    def _add_up_apart(self, sums: Mapping[int, torch.Tensor], pieces: Mapping[tuple[int, int], torch.Tensor]) -> None:
        """Set the sums of these units: the first rank's gradients are copied, those of the next ones added."""
        for number, senders in enumerate(self._rounds):
            targets: list[torch.Tensor] = []
            sources: list[torch.Tensor] = []
            for u, rank in senders.items():
                if u not in sums:
                    continue
                if rank == self._layout.rank:
                    sources += self._own[u]
                    targets += sums[u].split([window.numel() for window in self._own[u]])
                else:
                    sources.append(pieces[rank, u])
                    targets.append(sums[u])
            if number == 0:
                copy_all(targets, sources)
            elif targets:  # own gradients may lie on another device than the state
                here = [source.to(self._held.device) for source in sources]
                torch._foreach_add_(targets, here)  # pyright: ignore[reportPrivateImportUsage]

    def _add_up_in_place(self, pieces: Mapping[tuple[int, int], torch.Tensor]) -> None:
        """Add up in the same order where this rank computes the gradients.

        The sum of the ranks before this one is made in the receive buffer, and then added to the own gradient: which
        of two numbers is added to the other makes no difference.
        """
        so_far: dict[int, Sequence[torch.Tensor]] = {}
        for senders in self._rounds:
            targets: list[torch.Tensor] = []
            sources: list[torch.Tensor] = []
            for u, rank in senders.items():
                if not self._held.grads.is_in_place(u):
                    continue
                own = self._held.grads.pieces(u)
                if rank == self._layout.rank:
                    came, so_far[u] = so_far.get(u), own
                else:
                    came = pieces[rank, u].split([window.numel() for window in own])
                    if u not in so_far:
                        so_far[u], came = came, None
                if came is not None:
                    targets += so_far[u]
                    sources += came
            if targets:
                torch._foreach_add_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]

    def mirror(self) -> Callable[[], None]:
        """Begin to send reduced gradients to their mirrors. Returns what waits for them and keeps them."""
        grads, sent_units = self._held.grads, self._mirrors.sent_units
        return partial(self._keep, *self.to_mirrors.begin([piece for u in sent_units for piece in grads.pieces(u)]))

    def _keep(self, pending: Pending, received: torch.Tensor) -> None:
        pending.wait()
        units = self._mirrors.received_units
        copy_all([self._held.grads.of(u) for u in units], received.split(self._numels(units)))

    def _numels(self, units: list[int]) -> list[int]:
        return [self._layout.units[u].numel for u in units]


def _rounds(receive: Iterable[Iterable[int]]) -> Iterable[dict[int, int]]:
    """In round k, unit -> the k-th rank that sends it, for the units that so many ranks send."""
    senders: dict[int, list[int]] = {}
    for rank, units in enumerate(receive):
        for u in units:
            senders.setdefault(u, []).append(rank)
    for number in range(max(map(len, senders.values()), default=0)):
        yield {u: ranks[number] for u, ranks in senders.items() if number < len(ranks)}
