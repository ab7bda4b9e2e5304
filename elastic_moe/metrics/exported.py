"""The metrics that a cluster's Prometheus sees of a run: names, kinds, units, meanings and tags, declared once.

What a record or an event has, has its unit and meaning from `schema.py`. Names follow Ray Train's: snake_case, the
unit at the end, and its tags `ray_train_run_name` and `ray_train_run_id`, so that a panel joins them with Ray's own.
Terms of the experts' balance are those of the field: MaxVio (https://arxiv.org/abs/2408.15664, equation 4) and
Megatron-LM's overload factor. The table in README.md of this folder and the Grafana dashboard are made from this list.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_moe.control.causes import CAUSES, DEATH, EVICTION, START
from elastic_moe.control.goodput import TIME_CAUSES
from elastic_moe.metrics.schema import EVENT_KINDS, GOODPUT_KEYS, STEP_KEYS, Key

PREFIX = "elastic_moe"  # of every name; Ray puts its own before it
RUN_NAME, RUN_ID = "ray_train_run_name", "ray_train_run_id"  # tags of every metric
RANK, ACTOR = "ray_train_worker_world_rank", "ray_train_worker_actor_id"  # tags of a worker's own metrics
GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"

RUNNING, WAITING, PAUSED, FINISHED, FAILED = PHASES = ("running", "waiting", "paused", "finished", "failed")
LEFT = "left"  # a worker that has ended as planned
_TIMES_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


@dataclass(frozen=True)
class Exported:
    """One metric.

    Attributes:
        name: without prefixes.
        kind: GAUGE, COUNTER or HISTOGRAM.
        unit: as in `schema.Key`.
        meaning: one sentence.
        tag: its own tag beside those of the run; "" for none.
        values: all values of that tag.
        workers: every worker process exports it for itself, with the tags RANK and ACTOR.
        buckets: upper bounds, of a histogram.
    """

    name: str
    kind: str
    unit: str
    meaning: str
    tag: str = ""
    values: tuple[str, ...] = ()
    workers: bool = False
    buckets: tuple[float, ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        """Keys of all its tags."""
        own = (RANK, ACTOR) if self.workers else (self.tag,) if self.tag else ()
        return (RUN_NAME, RUN_ID, *own)

    @property
    def series(self) -> str:
        """Its name in Prometheus; a histogram has this name with _bucket, _sum and _count."""
        return f"ray_{PREFIX}_{self.name}{'_total' if self.kind == COUNTER else ''}"


def _key(keys: tuple[Key, ...], name: str) -> Key:
    return next(key for key in keys if key.name == name)


def _of_step(name: str, kind: str = GAUGE, buckets: tuple[float, ...] = ()) -> Exported:
    key = _key(STEP_KEYS, name)
    return Exported(name, kind, key.unit, key.meaning, buckets=buckets)


def _of_event(name: str, event: str, key: str, meaning: str = "", kind: str = GAUGE) -> Exported:
    """A key of an event, with its unit; with its meaning too, unless that needs the event's to be understood."""
    found = _key(next(one for one in EVENT_KINDS if one.name == event).keys, key)
    return Exported(name, kind, found.unit, meaning or found.meaning)


def _of_goodput(name: str) -> Exported:
    key = _key(GOODPUT_KEYS, name)
    return Exported(name, GAUGE, key.unit, key.meaning)


_TRAINING = tuple(map(_of_step, ("step", "loss", "lr", "grad_norm", "tokens_per_s")))
_EXPERTS = tuple(map(_of_step, ("balance", "cross_node_rows")))
FROM_RECORDS = (*_TRAINING, *_EXPERTS)
"""Gauges with the value that the newest record has under their name."""

TRAINING = (
    *_TRAINING,
    _of_step("step_s", HISTOGRAM, _TIMES_S),
    _of_step("tokens", COUNTER),
    Exported("steps", COUNTER, "steps", "Committed steps, those included that were made again."),
    Exported("skipped_steps", COUNTER, "steps", "Steps without an update: a gradient was not finite, or of a spike."),
    Exported("planned_steps", GAUGE, "steps", "Steps of the whole run."),
    Exported("step_age_s", GAUGE, "s", "Time since the newest step was committed; it grows while the run waits."),
    _of_event("val_loss", "evaluated", "val_loss", "Newest validation loss."),
)
MEMBERSHIP = (
    Exported("phase", GAUGE, "", "1 for the present phase of the run, 0 for the others.", "phase", PHASES),
    Exported("generation", GAUGE, "", "Generation of the newest view; 0 before the first."),
    Exported("world_size", GAUGE, "", "Active ranks that make steps; 0 while the run waits."),
    Exported("workers", GAUGE, "", "Living workers, members of the view or not."),
    Exported("wanted_workers", GAUGE, "", "Workers that Ray is asked for: the largest number, or an operator's."),
    Exported("missing_workers", GAUGE, "", "Wanted workers that are not there."),
    Exported(
        "ended_workers",
        COUNTER,
        "",
        "Workers that are gone: dead, removed because they were silent or hung, or ended as planned.",
        "cause",
        (DEATH, EVICTION, LEFT),
    ),
)
RECOVERIES = (
    Exported(
        "recoveries",
        COUNTER,
        "",
        "Views after the first that were entered, by their gravest cause.",
        "cause",
        tuple(cause for cause in CAUSES if cause != START),
    ),
    Exported("recovery_s", HISTOGRAM, "s", "Time from such a view's publication until steps go on.", buckets=_TIMES_S),
    _of_event("lost_steps", "entered", "lost_steps", kind=COUNTER),
)
GOODPUT = (
    Exported(
        "worker_time_s", GAUGE, "s", _key(GOODPUT_KEYS, "worker_s").meaning, tag="cause", values=tuple(TIME_CAUSES)
    ),
    *map(_of_goodput, ("goodput", "ettr", "mttr_s", "mtbf_s", "failures", "cost")),
)
EXPERTS = (
    *_EXPERTS,
    Exported(
        "max_vio", GAUGE, "", "MaxVio, mean over the MoE layers: tokens of the busiest expert over the mean, - 1."
    ),
    Exported("max_vio_worst_layer", GAUGE, "", "The same of the worst layer."),
    Exported("avg_overload_factor", GAUGE, "", "Mean over the MoE layers: rows of the busiest rank over the mean."),
    Exported("max_overload_factor", GAUGE, "", "The same of the worst layer."),
    Exported("dead_experts", GAUGE, "", "Experts without a token in the newest record of the loads, all layers."),
    Exported("expert_moves", COUNTER, "", "Copies and homes of experts that came to a rank because of the load."),
)
CHECKPOINTS = (
    Exported("checkpoint_step", GAUGE, "steps", "Step of the newest durable checkpoint; 0: there is none."),
    Exported("checkpoint_age_s", GAUGE, "s", "Time since that checkpoint was complete; without one, of this start."),
    Exported("checkpoint_lag_steps", GAUGE, "steps", "Committed steps that it does not have."),
    _of_event("checkpoint_bytes", "checkpoint", "bytes", "Size of the newest checkpoint's files."),
    Exported("checkpoint_s", HISTOGRAM, "s", "Time from a step's commit to its complete checkpoint.", buckets=_TIMES_S),
    Exported("checkpoints", COUNTER, "", "Durable checkpoints that were completed."),
    Exported("checkpoint_failures", COUNTER, "", "Durable checkpoints that were not written, or not removed."),
)
WORKER_MEMORY = Exported("worker_memory_bytes", GAUGE, "bytes", "Resident memory of a worker process.", workers=True)
WORKER_DEVICE_MEMORY = Exported(
    "worker_device_memory_bytes", GAUGE, "bytes", "Memory that torch holds on a worker's GPU; 0: none.", workers=True
)
COORDINATOR_MEMORY = Exported("coordinator_memory_bytes", GAUGE, "bytes", "Resident memory of the coordinator process.")
MEMORY = (WORKER_MEMORY, WORKER_DEVICE_MEMORY, COORDINATOR_MEMORY)

GROUPS = {
    "Training": TRAINING,
    "Membership": MEMBERSHIP,
    "Recoveries": RECOVERIES,
    "Goodput": GOODPUT,
    "Experts": EXPERTS,
    "Checkpoints": CHECKPOINTS,
    "Memory": MEMORY,
}
EXPORTED = tuple(metric for group in GROUPS.values() for metric in group)
"""All of them."""
