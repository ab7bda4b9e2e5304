"""One worker process of a run: the training loop, and the way from one generation to the next.

The loop is the only one over steps. It makes steps in the current view until a newer view is agreed at a vote or a peer is lost, enters the
newest view, and goes on from the committed step; the process, its imports and its state stay.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from elastic_moe.config.schema import TrainConfig
from elastic_moe.control.messages import ViewMessage
from elastic_moe.control.vote import VoteResult
from elastic_moe.data.prepare import Prepared
from elastic_moe.data.shards import TokenShard
from elastic_moe.data.tokenizer import load_tokenizer
from elastic_moe.errors import GroupAborted, UserError
from elastic_moe.model.backend import TrainableExperts
from elastic_moe.model.hf.checkpoint import HFCheckpoint
from elastic_moe.model.init import init_param
from elastic_moe.model.params import param_specs
from elastic_moe.model.residual.connections import warm_up_kernels
from elastic_moe.model.transformer import Transformer
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.parallel.collectives.backend import GroupMember
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.collectives.store import Rendezvous
from elastic_moe.parallel.expert_parallel import ExpertParallel
from elastic_moe.plan.placement import Placement
from elastic_moe.plan.state.units import build_units
from elastic_moe.run_dir import FAULTS, checkpoint_root
from elastic_moe.runtime.checkpoints import CheckpointStorage, ShardWriter
from elastic_moe.runtime.coordinator_client import CoordinatorClient
from elastic_moe.runtime.exchange.exchanger import ComputeTensors, Exchanger, Layout
from elastic_moe.runtime.faults import Faults
from elastic_moe.runtime.rebalance import Change, Rebalancer, moves_between
from elastic_moe.runtime.reconfigure import Entered, enter_view, take_over
from elastic_moe.runtime.state import HeldState
from elastic_moe.runtime.step import GenerationContext, Progress, StepResult, StepRunner, share_of_batch
from elastic_moe.runtime.warm_planner import warm_up as warm_up_planner
from elastic_moe.types import ParamSpec, View


def first_values(config: TrainConfig) -> Callable[[ParamSpec], torch.Tensor]:
    """Where a run begins: the weights of `model.init_from`, and what those lack (or all) by seed and name.

    A large tensor is asked for block by block, so the last one read is kept.
    """
    opened: list[HFCheckpoint] = []
    last: dict[str, torch.Tensor] = {}

    def value(spec: ParamSpec) -> torch.Tensor:
        if spec.name not in last:
            if config.model.init_from and not opened:
                opened.append(HFCheckpoint(config.model.init_from, config.model))
            read = opened[0].read(spec) if opened else None
            last.clear()
            last[spec.name] = init_param(spec, config.seed) if read is None else read
        return last[spec.name]

    return value


class Worker:
    """One worker's life.

    Args:
        config: the run's configuration.
        prepared: token shards and tokenizer.
        line: the connection to the coordinator, started.
    """

    def __init__(self, config: TrainConfig, prepared: Prepared, line: CoordinatorClient) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self._config, self._prepared, self._line = config, prepared, line
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device is cuda, and a worker sees no GPU: set cluster.gpus_per_worker=1, or device=cpu.")
        self._accelerator = Accelerator(
            cpu=config.device == "cpu" or not torch.cuda.is_available(),
            mixed_precision="bf16" if config.precision == "bf16" else "no",
        )
        self._device = self._accelerator.device
        specs = param_specs(config.model)
        self._specs = {spec.name: spec for spec in specs}
        self._units = build_units(specs, config.model.max_unit_elements)
        self._shape = (config.model.num_moe_layers, config.model.num_experts)
        self._model = Transformer(config.model, None).to(self._device)
        if config.elastic.reproducible:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it on GPUs
            torch.use_deterministic_algorithms(True)
        self._faults = Faults(config.faults, Path(config.run.dir) / FAULTS)
        self._rank = -1
        self._stepper = StepRunner(
            config,
            self._model,
            TokenShard.open(prepared.train_path),
            TokenShard.open(prepared.val_path),
            self._fault,
            self._accelerator.autocast,
            self._device,
        )
        self._progress = Progress()
        self._holdings: list[HeldState] = []
        self._storage = CheckpointStorage(checkpoint_root(config))
        self._writer = ShardWriter(checkpoint_root(config), line)
        self._saved_step = -1
        self._load: tuple[np.ndarray, int] | None = (
            None  # tokens of every expert since the last record, and over how many steps
        )

    def run(self) -> dict[str, float | int]:
        """Train until the run's last step is committed, the run is stopped, or this worker is released.

        Raises:
            Evicted: the coordinator no longer counts this worker as a member.
        """
        warm_up_kernels(
            self._config.model, self._device, torch.bfloat16 if self._config.precision == "bf16" else torch.float32
        )
        warm_up_planner()
        self._line.ready()
        generation = 0
        try:
            while True:
                message = self._line.wait_view(generation)
                if message is None:
                    return self._summary("released")
                generation = message.view.generation
                rank = message.view.rank_of(self._line.worker)
                if rank is None:
                    self._line.left()
                    return self._summary("released")
                try:
                    ended = self._run_generation(message, rank)
                except GroupAborted as error:
                    self._line.suspect(generation, str(error))
                    continue
                if ended:
                    return self._summary(ended)
        finally:
            self._writer.close()

    def _fault(self, step: int, phase: str) -> None:
        self._faults.at(self._rank, step, phase)

    def _summary(self, ended: str) -> dict[str, float | int]:
        return {"committed": self._progress.committed, "ended": ended}  # type: ignore[dict-item]

    def _run_generation(self, message: ViewMessage, rank: int) -> str:
        """Live through one generation. Returns why the worker is done, or "" when a newer view is to be entered."""
        view = message.view
        abort = AbortSignal()
        self._rank = rank
        completed = [0]
        self._line.begin_view(view, abort.set, lambda: (self._progress.committed + 1, completed[0]))
        started = time.perf_counter()
        member = GroupMember(view.generation, rank, view.world_size)
        rendezvous = Rendezvous(*message.store, self._config.elastic.form_timeout_s)
        group = Group(member, rendezvous, abort, completed, device=self._device)
        try:
            formed_s = time.perf_counter() - started
            session, entered, balancer = self._enter(message, group)
            info = {
                "step": self._progress.committed,
                "source": entered.source,
                "lost_steps": entered.lost_steps,
                "rolled_forward": entered.rolled_forward,
                "moved_bytes": entered.moved_bytes,
                "form_s": formed_s,
                "reconfigure_s": time.perf_counter() - started,
            }
            self._line.entered(view.generation, info if rank == view.active_ranks[0] else None)
            if rank == view.active_ranks[0]:
                for record in self._progress.records:
                    self._line.record(record)
                self._report_placement(session, "membership", None, entered.placement)
            return self._train(session, message, balancer)
        finally:
            group.close()

    def _enter(self, message: ViewMessage, group: Group) -> tuple[GenerationContext, Entered, Rebalancer]:
        view, config = message.view, self._config
        entered = enter_view(
            config,
            self._specs,
            self._units,
            view,
            group,
            self._progress,
            self._holdings,
            lambda held, vote: self._stepper.commit(held, self._progress, vote),
            self._storage,
            self._shape,
            self._fault,
            first_values(config),
        )
        if entered.source != "peers":
            self._progress.records.clear()
        grid = self._stepper.grid
        limit = round(config.balance.dispatch_gib * 2**30)
        experts = ExpertParallel(
            group,
            entered.placement,
            config.model,
            self._device,
            [m.speed for m in view.members],
            grid,
            limit,
            config.balance.by_node,
        )
        self._model.experts = experts
        balancer = Rebalancer(
            config.balance, view, self._units, config.elastic.redundancy, entered.placement, entered.ownership
        )
        session = self._session(view, group, experts, balancer, entered.held)
        session.exchanger.publish(frozen=True)
        return session, entered, balancer

    def _session(
        self, view: View, group: Group, experts: TrainableExperts, balancer: Rebalancer, held: HeldState
    ) -> GenerationContext:
        """The schedule of exchanges for the present placement."""
        config = self._config
        layout = Layout(self._units, view, group.rank, balancer.ownership, balancer.placement)
        dense = {name: p.data for name, p in self._model.named_parameters()} | dict(self._model.named_buffers())
        layers = range(self._shape[0])
        weights = ComputeTensors(dense, [tuple(t.data for t in experts.slot_params(i)) for i in layers])
        gradients = ComputeTensors(self._stepper.gradients.tensors, [experts.slot_grads(i) for i in layers])
        exchanger = Exchanger(layout, weights, gradients, held, group)
        experts.before_experts = exchanger.wait_expert_weights
        whole = config.data.micro_batch if self._stepper.grid is not None else 1
        shares = share_of_batch(layout, config.data.global_batch, whole)
        return GenerationContext(group.rank, layout, group, experts, exchanger, held, shares)

    def _rebalance(self, session: GenerationContext, vote: VoteResult, balancer: Rebalancer) -> GenerationContext:
        """Change the placement where that pays; collective where homes move. Every rank decides alike."""
        change = balancer.propose(vote)
        leads = session.rank == session.layout.view.active_ranks[0]
        if leads:
            for record in balancer.finished:
                self._line.event(record)
        balancer.finished.clear()
        if change is None:
            return session
        started = time.perf_counter()
        step, group, held = self._progress.committed, session.group, session.held
        before = balancer.placement
        balancer.adopted(change)
        if change.ownership is not None:
            held, _ = take_over(
                group,
                self._units,
                change.ownership,
                change.transfers,
                self._progress,
                self._holdings,
                self._fault,
                step,
            )
        session.experts.adopt(change.placement)
        new = self._session(session.layout.view, group, session.experts, balancer, held)
        if leads:
            self._report_placement(session, "load", before, change.placement, change)
        return replace(new, switch_s=time.perf_counter() - started)

    def _report_load(self) -> None:
        """Tokens of every expert, summed over `balance.log_every_steps` steps."""
        every, vote = self._config.balance.log_every_steps, self._progress.vote
        if not every or vote is None:
            return
        load_LE, steps = self._load if self._load is not None else (0.0, 0)
        self._load = load_LE + vote.load_LE, steps + 1
        if vote.step % every == 0:
            load = self._load[0].astype(int).tolist()
            self._line.event({"event": "expert_load", "step": vote.step, "steps": steps + 1, "load": load})
            self._load = None

    def _report_placement(
        self,
        session: GenerationContext,
        cause: str,
        before: Placement | None,
        after: Placement,
        change: Change | None = None,
    ) -> None:
        """Record the ranks of the experts, and the cause of the change."""
        members = session.layout.view.members
        record = {
            "event": "placement",
            "step": self._progress.committed,
            "generation": session.layout.view.generation,
            "cause": cause,
            "ranks": [[m.worker, m.node] for m in members] if before is None else None,
            "shape": list(self._shape),
            "moves": moves_between(before, after),
            "expected": change.estimate if change else None,
            "layers": change.layers if change else None,
        }
        self._line.event({key: value for key, value in record.items() if value is not None})

    def _train(self, session: GenerationContext, message: ViewMessage, balancer: Rebalancer) -> str:
        config, progress, line = self._config, self._progress, self._line
        leads = session.rank == session.layout.view.active_ranks[0]
        stop = False
        while progress.committed < config.run.steps and not stop:
            outcome = self._stepper.train_step(
                session,
                progress,
                lambda: (line.superseded(message.view.generation), line.stop_requested),
                lambda session, vote: self._rebalance(session, vote, balancer),
            )
            session = outcome.session
            self._committed(session, outcome, leads)
            self._faults.at(session.rank, progress.committed, "committed")
            stop = outcome.stop
            if outcome.reconfigure:
                return ""
        return self._finish(session, leads, stop)

    def _committed(self, session: GenerationContext, outcome: StepResult, leads: bool) -> None:
        """What follows a commit: the record, a checkpoint, an evaluation."""
        config, step = self._config, self._progress.committed
        if leads:
            self._line.record(outcome.record)
            self._report_load()
        last = step == config.run.steps or outcome.stop
        if last or (config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0):
            self._save(session)
        every = config.run.eval_every_steps
        if not outcome.reconfigure and every and step % every == 0:
            self._evaluate(session, leads)

    def _save(self, session: GenerationContext) -> None:
        step, generation = self._progress.committed, session.layout.view.generation
        owned = session.layout.ownership.owned(session.rank).tolist()
        self._writer.save(step, f"g{generation:05d}-r{session.rank:05d}", session.held, owned, generation)
        self._saved_step = step

    def _evaluate(self, session: GenerationContext, leads: bool) -> None:
        started = time.perf_counter()
        loss = self._stepper.evaluate(session)
        self._progress.evaluated = self._progress.committed
        if leads:
            took = time.perf_counter() - started
            self._line.event({"event": "evaluated", "step": self._progress.committed, "val_loss": loss, "eval_s": took})

    def _finish(self, session: GenerationContext, leads: bool, stopped: bool) -> str:
        """The end of a run: checkpoint, last evaluation, sample; every part may be repeated after a failure."""
        config, progress = self._config, self._progress
        session.exchanger.wait_expert_weights()
        if self._saved_step != progress.committed:
            self._save(session)
        if not stopped:
            if progress.evaluated != progress.committed:
                self._evaluate(session, leads)
            if config.run.sample_tokens:
                tokenizer = load_tokenizer(self._prepared.tokenizer_path)
                prompt = tokenizer.encode(config.run.sample_prompt)
                tokens = self._stepper.sample(session, prompt, config.run.sample_tokens, config.seed)
                if leads:
                    self._line.event({"event": "sample", "step": progress.committed, "text": tokenizer.decode(tokens)})
        self._writer.drain()
        session.group.barrier()
        self._line.finished()
        return "stopped" if stopped else "finished"


def run_worker(
    config: TrainConfig,
    find: Callable[[], tuple[str, int] | None],
    token: str,
    node: str,
    prepared: Prepared,
    worker: str,
) -> dict[str, float | int]:
    """Be one worker of a run, until it ends. The train function of a Ray Train worker, and of the tests' plain processes.

    Args:
        config: the run's configuration.
        find: returns the coordinator's address, or None while there is no coordinator.
        token: shared secret of the run.
        node: fault domain of this process.
        prepared: token shards and tokenizer, readable from this node.
        worker: unique id of this life of the process.

    Returns:
        `committed`: last committed step; `ended`: "finished", "stopped" or "released".

    Raises:
        Evicted: this worker was removed from the run and must not go on.
    """
    line = CoordinatorClient(
        find, token, worker, node, os.getpid(), config.elastic.slots_per_worker, config.elastic.heartbeat_s
    )
    line.start()
    try:
        return Worker(config, prepared, line).run()
    finally:
        line.close()
