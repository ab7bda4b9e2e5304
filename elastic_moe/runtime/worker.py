"""One worker process of a run: its parts, and its way from one generation to the next.

The worker enters the newest view, trains in it until a newer view is agreed on at a vote or a peer is lost, and goes on
from the committed step in the next view. The process, its imports and its state stay.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from elastic_moe.checkpoint.storage import set_timeout
from elastic_moe.config.schema import TrainConfig
from elastic_moe.control.messages import HeldMessage, ViewMessage
from elastic_moe.control.rebalance import Rebalancer
from elastic_moe.control.speeds import SpeedRule
from elastic_moe.control.vote import Wishes
from elastic_moe.data.prepare import Prepared
from elastic_moe.data.shards import TokenShard
from elastic_moe.errors import GroupAborted, UserError
from elastic_moe.model.params import param_specs
from elastic_moe.model.residual.connections import warm_up_kernels
from elastic_moe.model.transformer import Transformer
from elastic_moe.optim.muon import arithmetic
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.parallel.collectives.backend import GroupMember
from elastic_moe.parallel.collectives.choice import GpuCollectives
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.collectives.store import Rendezvous
from elastic_moe.parallel.experts import experts_of
from elastic_moe.plan.shares import Batching
from elastic_moe.plan.state.units import build_units
from elastic_moe.run_dir import FAULTS, checkpoint_root
from elastic_moe.run_log import logging_of_run
from elastic_moe.runtime.allocator import give_back, keep
from elastic_moe.runtime.batches import MicroBatches
from elastic_moe.runtime.by_speed import BySpeed
from elastic_moe.runtime.checkpoints import ShardWriter
from elastic_moe.runtime.coordinator_client import CoordinatorClient
from elastic_moe.runtime.durable import DurableCheckpoints
from elastic_moe.runtime.evaluate import Evaluator
from elastic_moe.runtime.faults import Faults
from elastic_moe.runtime.initial import InitialWeights
from elastic_moe.runtime.local_state import LocalState
from elastic_moe.runtime.log_handler import logging_to
from elastic_moe.runtime.places import localised
from elastic_moe.runtime.reconfigure import Reconfigured, Reconfigurer
from elastic_moe.runtime.reporter import Reporter
from elastic_moe.runtime.saver import Saver
from elastic_moe.runtime.session import ContextBuilder, GenerationContext
from elastic_moe.runtime.state import verify
from elastic_moe.runtime.step import StepRunner
from elastic_moe.runtime.training_loop import Rebalance, TrainingLoop
from elastic_moe.runtime.warm_planner import warm_up as warm_up_planner
from elastic_moe.types import INTERRUPTED, NOT_WHOLE, SAVED, Origin, View


class Worker:
    """One worker's life.

    Args:
        config: the run's configuration.
        prepared: token shards and tokenizer.
        client: the connection to the coordinator, started.
        token: shared secret of the run.
    """

    def __init__(self, config: TrainConfig, prepared: Prepared, client: CoordinatorClient, token: str) -> None:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device is cuda, and a worker sees no GPU: set cluster.gpus_per_worker=1, or device=cpu.")
        self._config, self._client, self._token = config, client, token
        on_cpu = config.device == "cpu" or not torch.cuda.is_available()
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="bf16" if config.precision == "bf16" else "no")
        self._products = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self._device = accelerator.device
        self._gpu_collectives, self._told = GpuCollectives(config.cluster.collectives, self._device), ""
        specs = param_specs(config.model, config.optim.name, config.optim.base_width)
        self._units = build_units(specs, config.model.max_unit_elements)
        self._model = Transformer(config.model, None).to(self._device)
        if config.elastic.reproducible:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it on GPUs
            torch.use_deterministic_algorithms(True)
        self._faults, self._rank = Faults(config.faults, Path(config.run.dir) / FAULTS), -1
        self._local = local = LocalState.empty(config.optim.spike)
        shape = (config.model.num_moe_layers, config.model.num_experts)
        batches = MicroBatches(config.data, self._device, config.elastic.reproducible)
        train, val = TokenShard.open(prepared.train_path), TokenShard.open(prepared.val_path)

        def autocast() -> AbstractContextManager[None]:
            return accelerator.autocast()

        self._runner = StepRunner(config, self._model, train, batches, self._fault, autocast)
        evaluator = Evaluator(self._model, val, batches, autocast, self._device)
        self._builder = ContextBuilder(
            self._units,
            self._model,
            self._runner.gradients.tensors,
            config.model.num_moe_layers,
            Batching(config.data.global_batch, config.data.micro_batch, whole=config.elastic.reproducible),
            self._products,
            config.seed if config.reduce_precision == "bf16" else None,
        )
        self._reconfigurer = Reconfigurer(
            config,
            self._units,
            shape,
            local,
            lambda vote: self._runner.roll_forward(local, vote),
            DurableCheckpoints(checkpoint_root(config), config.checkpoint.wait_s, client.event),
            InitialWeights(config.model, specs, config.seed),
            self._fault,
        )
        self._writer = ShardWriter(checkpoint_root(config), client)
        self._reporter = Reporter(client, config.balance.log_every_steps, shape)
        self._saver = Saver(config, local, self._writer, self._reporter, lambda: client.inbox.save_step)
        self._loop = TrainingLoop(
            config,
            prepared.tokenizer_path,
            local,
            self._runner,
            evaluator,
            self._saver,
            self._reporter,
            self._fault,
        )

    def run(self) -> dict[str, int | str]:
        """Train until the run's last step is committed, the run is stopped, or this worker is released.

        Raises:
            Evicted: the coordinator no longer counts this worker as a member.
            CoordinatorLost: it was not heard for `elastic.hold_s`.
        """
        warm_up_kernels(self._config.model, self._device, self._products)
        warm_up_planner(lambda reason: self._client.event({"event": "planner_compiles", "reason": reason}))
        self._client.ready()
        try:
            return {"ended": self._generations(), "committed": self._local.committed}
        finally:
            self._writer.close()

    def _generations(self) -> str:
        """Live through one generation after another. Returns why this worker is done."""
        generation = 0
        while (message := self._client.wait_view(generation, self._config.elastic.hold_s)) is not None:
            generation = message.view.generation
            rank = message.view.rank_of(self._client.worker)
            if rank is None:
                self._client.left()
                break
            try:
                if message.hold:
                    self._hold(message, rank)
                    continue
                ended = self._run_generation(message, rank)
            except GroupAborted as error:
                self._client.suspect(generation, str(error))  # of a hold, it is stale
                self._check_gpu()
                continue
            if ended:
                return ended
        return "released"

    def _check_gpu(self) -> None:
        """Raises what CUDA says if this process has lost its GPU: no later call to it succeeds, so the worker ends."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).query()

    def _fault(self, step: int, phase: str) -> None:
        self._faults.at(self._rank, step, phase)

    def _run_generation(self, message: ViewMessage, rank: int) -> str:
        """Live through one generation. Returns why the worker is done, or "" when a newer view is to be entered."""
        view, client, abort = message.view, self._client, AbortSignal()
        started = time.perf_counter()
        group = self._join(message, rank, abort)
        try:
            self._choose_collectives(view, group)
            formed_s = time.perf_counter() - started
            context, rebalance, by_speed, result = self._enter(view, group)
            self._reporter.entered(context, self._local, result, formed_s, time.perf_counter() - started)

            def wishes() -> Wishes:
                client.lease.hold(abort, self._config.elastic.hold_s)
                return Wishes(client.superseded(view.generation), client.stop_requested, self._saver.wishes())

            ended = self._loop.train(context, wishes, rebalance, by_speed)
            if ended:
                client.finished()
            return ended
        finally:
            group.close()

    def _join(self, message: ViewMessage, rank: int, abort: AbortSignal) -> Group:
        """From now on live in a view or a hold, until `abort` is set: the group of its members."""
        view = message.view
        self._rank, completed = rank, [0]
        self._client.begin_view(view, abort.set, lambda: (self._local.committed + 1, completed[0]))
        member = GroupMember(view.generation, rank, view.world_size)
        rendezvous = Rendezvous(*message.store, self._token, self._config.elastic.form_timeout_s)
        return Group(member, rendezvous, abort, completed, device=self._device)

    def _choose_collectives(self, view: View, group: Group) -> None:
        """Take NCCL for tensors on GPUs where all members can; collective. One line tells when that changes."""
        sentence = self._gpu_collectives.join(group)
        if sentence not in ("", self._told) and group.rank == view.active_ranks[0]:
            self._reporter.event("collectives", self._local.committed, reason=sentence)
        self._told = sentence or self._told

    def _hold(self, message: ViewMessage, rank: int) -> None:
        """Save the committed step together with the other members of a hold, if they have all of its state."""
        outcome = INTERRUPTED
        try:
            group = self._join(message, rank, AbortSignal())
            try:
                roles_RU, decision = self._reconfigurer.agree(group, only_whole=True)
                whole = bool(roles_RU.any(axis=0).all())
                if whole and decision.committed > 0:
                    patience_s = self._config.elastic.hold_s
                    self._saver.save_held(group, roles_RU, lambda: self._client.inbox.check_heard(patience_s))
                outcome = SAVED if whole or decision.committed <= 0 else NOT_WHOLE
            finally:
                group.close()
        finally:
            self._client.outbox.add(HeldMessage(message.view.generation, outcome))

    def _enter(self, view: View, group: Group) -> tuple[GenerationContext, Rebalance, BySpeed, Reconfigured]:
        """Take this worker's place in a view: state, experts, and the weights to compute with; collective."""
        config = self._config
        self._model.experts = None  # the memory of the last view's copies is free before this one's are made
        self._builder.leave()
        give_back()
        self._verify_state()
        result = self._reconfigurer.enter(view, group)
        give_back()
        if result.source != "peers":
            self._local.records.clear()  # of steps that no longer count
            self._client.inbox.recorded = -1
            self._client.outbox.forget_recorded(None)
        ownership, placement, speeds = result.ownership, result.placement, result.speeds
        self._model.experts = experts = experts_of(
            group,
            placement,
            config.model,
            self._device,
            speeds.rows,
            self._runner.grid,
            round(config.balance.dispatch_gib * 2**30),
            config.balance.by_node,
        )
        experts.exact_times = config.balance.by_speed
        balancer = Rebalancer(
            config.balance, view, self._units, config.elastic.redundancy, placement, ownership, speeds
        )
        context = self._builder.build(view, group, experts, result.held, ownership, placement, speeds)
        context.exchanger.publish(frozen=True)
        rebalance = Rebalance(balancer, self._builder, self._reconfigurer, self._local, self._reporter)
        rule = SpeedRule(view, context.batching, speeds, config.balance.by_speed, result.straggles)
        return context, rebalance, BySpeed(rule, balancer, self._local, self._reporter), result

    def _verify_state(self) -> None:
        """Find state that has changed at rest; it counts as not held, so the view brings it from its twin."""
        verify(self._local.holdings)
        for held in self._local.holdings:
            if held.damaged:
                units = [self._units[unit].name for unit in sorted(held.damaged)]
                reason = "it does not match its checksum, or no copy is known to be right"
                self._reporter.event("state_damaged", self._local.committed, units=units, reason=reason)


def run_worker(
    config: TrainConfig,
    find: Callable[[], tuple[str, int] | None],
    token: str,
    node: str,
    prepared: Prepared,
    worker: str,
    run: str = "",
    origin: Origin | None = None,
) -> dict[str, int | str]:
    """Be one worker of a run until it ends. Ray Train's workers call it, and so do plain processes without Ray.

    Args:
        config: the run's configuration.
        find: returns the coordinator's address, or None while there is no coordinator.
        token: shared secret of the run.
        node: fault domain of this process.
        prepared: token shards and tokenizer on the coordinator's node, see `places`.
        worker: unique id of this life of the process.
        run: name of the run in its log; "": that of its directory.
        origin: when and where it was placed; None: when this process began, on a node of no known kind.

    Returns:
        `committed`: last committed step, -1 without state; `ended`: "finished", "stopped" or "released".

    Raises:
        Evicted: this worker was removed from the run and must not go on.
    """
    elastic = config.elastic
    set_timeout(config.checkpoint.timeout_s)
    if config.threads:
        torch.set_num_threads(config.threads)
    keep()
    client = CoordinatorClient(
        find, token, worker, node, os.getpid(), elastic.slots_per_worker, elastic.heartbeat_s, elastic.lease_s
    )
    origin = origin or Origin(psutil.Process().create_time())
    client.start(_updates_on(config), origin.placed_s, origin.node_kind)
    made: list[Worker] = []

    def where() -> tuple[int, int]:
        return client.inbox.generation, max(0, made[0]._local.committed) if made else 0

    try:
        with (
            logging_of_run(config.run.log_format, run or Path(config.run.dir).name, where),
            logging_to(client.event, node),
        ):
            if not client.inbox.wait_welcome(elastic.hold_s):
                return {"ended": "released", "committed": -1}
            config, prepared = localised(config, prepared, token, node, lambda: client.inbox.welcome, client.event)
            made.append(Worker(config, prepared, client, token))
            return made[0].run()
    except Exception as error:
        client.left(f"{type(error).__name__}: {error}".splitlines()[0])  # the last message: what follows does not count
        raise
    finally:
        client.close()


def _updates_on(config: TrainConfig) -> str:
    """Where this worker updates its state, and by which arithmetic: workers that say the same get the same bits."""
    on_gpu = config.device != "cpu" and config.elastic.state_on == "device" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    return arithmetic(device) if config.optim.name == "muon" else device.type
