"""Every key of a run's records, declared once: metrics.jsonl, events.jsonl and experts.jsonl.

The reference in README.md of this folder, the JSON schemas that a test applies to a real run, the metrics of a cluster
(`exported.py`), the titles in the report and the units that trackers are given are made from these declarations. A key
that is written and not declared here fails that test.
"""

from __future__ import annotations

from collections.abc import Mapping

from elastic_moe.control.causes import CAUSES
from elastic_moe.control.goodput import TIME_CAUSES
from elastic_moe.control.speeds import PHASES as PHASES_OF_WORK
from elastic_moe.metrics.declaration import Event, Key

PHASES = {
    "compute": "forward and backward pass, with the exchanges of the experts and the waiting in them",
    "reduce": "gradients to their primaries, waiting included",
    "mirror": "reduced gradients to the mirrors",
    "vote": "the all-reduce that commits the step",
    "apply": "the update, and comparing copies of the state",
    "publish": "new weights to the ranks that compute with them, and changes of placement",
}
"""Phases of a step, in order, and their meaning. A GPU's work counts where the rank waits for it."""

STEP_KEYS = (
    Key("step", "integer", "steps", "The committed step, counted from 1."),
    Key("loss", "number or null", "nats per token", "Cross-entropy, mean over the tokens of the global batch."),
    Key("tokens", "integer", "tokens", "Targets of the global batch that count in the loss."),
    Key("lr", "number", "", "Learning rate of this step's update."),
    Key("grad_norm", "number or null", "", "Global norm of the gradient of the mean loss, before clipping."),
    Key("generation", "integer", "", "Generation of the view that committed the step."),
    Key("world_size", "integer", "", "Number of active ranks of that view; a draining rank does not count."),
    Key("step_s", "number", "s", "Duration of the step on the rank that reports it."),
    Key("tokens_per_s", "number", "tokens/s", "`tokens` over `step_s`."),
    Key("balance", "number", "", "Time of the mean rank for its expert rows over the slowest one's; 1 is perfect."),
    Key("layer_balance", "list of numbers", "", "The same for each MoE layer."),
    Key("layer_max_load", "list of numbers", "", "For each MoE layer: tokens of its most loaded expert over the mean."),
    Key("cross_node_rows", "integer", "rows", "Token rows that were dispatched to an expert on another node."),
    Key("imbalance_s", "number", "s", "Idle time of the mean rank: others had more rows for their experts.", True),
    Key("straggler_s", "number", "s", "Idle time of the mean rank: others were slower with their share.", True),
    Key("held_s", "number", "s", "Time since the step before in which a checkpoint held training up.", True),
    *(Key(f"{phase}_s", "number", "s", f"On that rank: {meaning}.", True) for phase, meaning in PHASES.items()),
    Key("data_s", "number", "s", "On that rank: waiting for the batch's tokens, part of `compute_s`.", True),
    Key("time", "number", "s", "Wall clock at the commit, since the Unix epoch."),
    Key("skipped", "boolean", "", "The step had no update, because a gradient was not finite, or of a spike.", True),
    Key("gain_forward", "number or null", "", "With residual streams: forward gain of the composite map.", True),
    Key("gain_backward", "number or null", "", "With residual streams: largest backward gain of that map.", True),
    Key("gain_backward_min", "number or null", "", "With residual streams: smallest backward gain of that map.", True),
    Key("mtp_loss", "number or null", "nats per token", "With multi-token prediction: its cross-entropy.", True),
    Key("z_loss", "number or null", "", "With `model.z_loss`: mean squared log-sum-exp of the head's logits.", True),
    Key("router_z_loss", "number or null", "", "With `model.router_z_loss`: the same of the routers' logits.", True),
    Key("index_loss", "number or null", "nats per token", "With sparse attention: loss of its indexers.", True),
)
"""The keys of metrics.jsonl."""

GOODPUT_KEYS = (
    Key("time", "number", "s", "Wall clock, since the Unix epoch."),
    Key("step", "integer", "steps", "Step that was committed last."),
    Key(
        "worker_s",
        "object",
        "s",
        "Seconds of workers so far, by cause, over all starts of the run.",
        keys=tuple(Key(cause, "number", "s", meaning) for cause, meaning in TIME_CAUSES.items()),
    ),
    Key("total_s", "number", "s", "Their sum: seconds of all workers, each from its placement to its end."),
    Key("goodput", "number", "", "Share of `training` in it."),
    Key("ettr", "number", "", "Effective training time ratio: share of `training`, `imbalance` and `stragglers`."),
    Key("failures", "integer", "", "Workers that died or were evicted, and starts that were cut off."),
    Key(
        "mttr_s", "number or null", "s", "Mean time to recover: from the last step before a failure until steps go on."
    ),
    Key("mtbf_s", "number or null", "s", "Mean time between failures, while at least one worker lives."),
    Key("node_s", "object of numbers", "s", "Seconds in which nodes of each kind had a worker of the run."),
    Key("cost", "number or null", "", "The price of these seconds by `cluster.price_per_hour`; null: not known."),
)
"""The keys of goodput.jsonl."""

SUMMARY_KEYS = (
    Key("outcome", "string", "", "`finished`, `stopped` or `failed`."),
    Key("reason", "string", "", "Cause of the outcome, as a sentence; empty for `finished`."),
    Key("step", "integer", "steps", "Step that was committed last."),
    Key("steps", "integer", "steps", "Steps of the whole run."),
    Key("loss", "number or null", "nats per token", "Of the last step; null: there is none."),
    Key("val_loss", "number or null", "nats per token", "Newest validation loss; null: there is none."),
    Key("tokens", "integer", "tokens", "Targets of all steps that count."),
    Key("generations", "integer", "", "Views that committed a step."),
    Key("world_size", "integer", "", "Active ranks of the last step."),
    *(key for key in GOODPUT_KEYS if key.name not in ("time", "step")),
)
"""The keys of summary.json, one object that every end of a start writes anew."""

COMMON_KEYS = (
    Key("time", "number", "s", "Wall clock when the event was recorded, since the Unix epoch."),
    Key("event", "string", "", "Kind of the event."),
    Key("generation", "integer", "", "Generation of the view at that time; 0 before the first one.", True),
    Key("step", "integer", "steps", "Step that was committed last, or that the event is about."),
    Key("worker", "string", "", "Id of the worker that the event is about, or that reports it.", True),
    Key("node", "string", "", "Node of that worker.", True),
    Key("pid", "integer", "", "Process id of that worker on its node.", True),
    Key("reason", "string", "", "Cause of the event, as a sentence.", True),
)
"""The keys that an event of events.jsonl and experts.jsonl may have whatever its kind."""

_ESTIMATE = (
    Key("gain_s", "number", "s", "Time a step is to become shorter by."),
    Key("steps", "integer", "steps", "Steps over which the gain is counted."),
    Key("cost_s", "number", "s", "Time the change is to take, once."),
    Key("moved_bytes", "integer", "bytes", "State that the busiest receiver fetches."),
    Key("balance_before", "number", "", "Balance of the old placement under the present load."),
    Key("balance_after", "number", "", "Balance of the new placement under the same load."),
)
_IN_A_ROW = Key("in_a_row", "integer", "steps", "Steps up to this one without an update between them.")
_UNITS = Key("units", "list of strings", "", "Names of the units.")
_ORIGIN = (
    Key("placed_s", "number", "s", "Wall clock at which it was placed on its node; 0: not known.", True),
    Key("node_kind", "string", "", "Market type and node group of its node, as far as they are known.", True),
)
_ONE_WORKER = (
    Key("rank", "integer", "", "Rank of the worker in its view."),
    Key("workers", "list of strings", "", "The worker."),
    Key("nodes", "list of strings", "", "Its node."),
)
_STRAGGLER = (
    *_ONE_WORKER,
    Key("factor", "number", "", "Its time for equal work over that of the others."),
    Key("phase", "string", "", f"Where it loses most: {', '.join(PHASES_OF_WORK)}."),
)

EVENT_KINDS = (
    Event(
        "started",
        "A coordinator begins: of a new start of the run, or in place of one that was lost.",
        (Key("restarted", "boolean", "", "It takes the place of one that was lost; the workers may live."),),
    ),
    Event("worker_connected", "A worker has registered with the coordinator.", _ORIGIN),
    Event("worker_ready", "A worker has loaded its program and can enter a view."),
    Event("worker_disconnected", "The connection of a worker has closed; it may come back."),
    Event("worker_lost", "A worker has died, or its connection has closed and it did not come back."),
    Event("worker_evicted", "A worker was removed because it made no progress or gave no sign."),
    Event(
        "worker_readmitted",
        "A worker that had been removed without proof of its death is back, with its state.",
        _ORIGIN,
    ),
    Event("worker_set_aside", "A worker that others do not reach, or with which no view forms, waits outside."),
    Event("members_in_doubt", "Members give no sign, and their state may be the last: the run waits for them."),
    Event("node_backoff", "Workers of a node die before they make a step: its next ones have to wait."),
    Event("planner_compiles", "A worker compiles the planner, which no process of its machine has done before."),
    Event("files_served", "A worker does not see files of the coordinator's node, and gets them from there."),
    Event("collectives", "Tensors on GPUs travel over another library from now on; the sentence says which and why."),
    Event("worker_released", "A worker is no longer needed and may end."),
    Event("worker_left", "A released or drained worker has ended as planned."),
    Event("worker_finished", "A worker has done its part of the last step."),
    Event("suspect", "A worker reports that a collective failed, the first one in a view."),
    Event("drain", "A worker is asked to hand over its state before its node goes."),
    Event("adopted", "A restarted coordinator has taken over the view of the living workers."),
    Event("pause", "Too few workers are left, or an operator asked for it: no step is made, and the state is saved."),
    Event("resume", "An operator ended a pause."),
    Event("scale", "An operator asked for another number of workers."),
    Event("checkpoint_asked", "A checkpoint outside of the usual order was asked for."),
    Event("wish_unkept", "What an operator asked for cannot be kept for a coordinator that is started again."),
    Event("stop", "The end of the run was asked for."),
    Event("finished", "The run has ended as it should."),
    Event("failed", "The run has ended because it cannot go on."),
    Event(
        "view",
        "The coordinator has published a membership.",
        (
            Key("planned", "boolean", "", "Whether the old view stays valid until the members agree at a vote."),
            Key("cause", "string", "", f"The reason in one word: {', '.join(CAUSES)}.", True),
            Key("world_size", "integer", "", "Number of active ranks of the view."),
            Key("members", "list of strings", "", "Ids of its workers, by rank."),
        ),
    ),
    Event(
        "entered",
        "Every part of the state has an owner in the new view, and steps go on.",
        (
            Key("world_size", "integer", "", "Number of active ranks of the view."),
            Key("source", "string", "", "Origin of the state: `peers`, `checkpoint` or `initialisation`."),
            Key("lost_steps", "integer", "steps", "Committed steps that have to be made again."),
            Key("skipped_batches", "integer", "batches", "Left out of the data so far (`optim.spike=rollback`)."),
            Key("rolled_forward", "integer", "ranks", "Ranks that applied the last vote only now."),
            Key("moved_bytes", "integer", "bytes", "State that the reporting rank received."),
            Key("form_s", "number", "s", "Time to form the process group."),
            Key("reconfigure_s", "number", "s", "Time from the view's arrival to its state, forming included."),
            Key("total_s", "number", "s", "Time from the view's publication to this event."),
        ),
    ),
    Event(
        "rolled_back",
        "The run goes on from a checkpoint or from the start; later records were set aside in `metrics.tN.jsonl`.",
        (Key("lost_steps", "integer", "steps", "Records that were set aside."),),
    ),
    Event(
        "timeline",
        "The run went back to this step, and a new timeline begins there. No checkpoint is deleted for it.",
        (
            Key("timeline", "integer", "", "Number of the new timeline, counted from 1."),
            Key("abandoned", "list of integers", "steps", "Later steps that have a checkpoint, whole or not."),
        ),
    ),
    Event(
        "run_changed",
        "This start goes on with other values of keys that the losses depend on.",
        (Key("changes", "list of strings", "", "The keys, each as `key: old -> new`."),),
    ),
    Event("records_dropped", "Steps have no record: the coordinator was away for longer than workers keep them."),
    Event("records_damaged", "Damaged lines of a file of records were moved to a file that ends in `.damaged`."),
    Event(
        "checkpoint",
        "A durable checkpoint is complete.",
        (
            Key("shards", "integer", "", "Files of the checkpoint, its manifest not counted."),
            Key("bytes", "integer", "bytes", "Size of these files."),
            Key("manifest_s", "number", "s", "Time to write the manifest."),
        ),
    ),
    Event("checkpoint_damaged", "A checkpoint is damaged; the run goes on from an older one."),
    Event("checkpoint_skipped", "A checkpoint was not written, since an older one still was; a newer one follows."),
    Event("storage_unavailable", "The checkpoints cannot be read; the run holds until they can."),
    Event("checkpoint_failed", "A durable checkpoint was not written, or not removed; training goes on."),
    Event(
        "evaluated",
        "The validation loss was measured.",
        (
            Key("val_loss", "number or null", "nats per token", "Mean over the first `run.eval_sequences` sequences."),
            Key("val_losses", "object of numbers", "nats per token", "With a mixture: of each corpus.", True),
            Key("eval_s", "number", "s", "Duration of the evaluation."),
        ),
    ),
    Event(
        "not_finite",
        "A step was committed without an update, because a gradient was not finite.",
        (
            Key("workers", "list of strings", "", "Whose own loss or gradients were not finite; none: only a sum was."),
            Key("nodes", "list of strings", "", "Nodes of these workers."),
            _IN_A_ROW,
        ),
    ),
    Event(
        "loss_spike",
        "A step was committed without an update, because its loss or gradient norm was far above those before.",
        (Key("loss", "number", "nats", "Of the step."), Key("grad_norm", "number", "", "Of the step."), _IN_A_ROW),
    ),
    Event("worker_faulty", "A worker leaves because its numbers alone, or its state, were wrong too often."),
    Event(
        "state_repaired",
        "Copies of state on one worker were wrong, and were replaced by right ones before they were used.",
        (*_ONE_WORKER, _UNITS),
    ),
    Event(
        "state_damaged",
        "State of this worker changed at rest. Entering a view, it takes right copies from others.",
        (_UNITS,),
    ),
    Event(
        "state_unclear",
        "Copies of state differ and nobody can tell the right one: the run goes back to the newest checkpoint.",
        (
            Key("workers", "list of strings", "", "The workers that hold these copies."),
            Key("nodes", "list of strings", "", "Their nodes."),
            _UNITS,
        ),
    ),
    Event(
        "speeds",
        "Measured speeds have changed the shares of the ranks, from the next step on.",
        (
            Key("shares", "list of integers", "sequences", "Of each rank in a batch."),
            Key("sequences", "list of numbers", "", "Speed of each rank outside of the routed experts; 1: the mean."),
            Key("rows", "list of numbers", "", "Speed of each rank in the routed experts; 1 is the mean."),
            Key("gain_s", "number", "s", "Time by which a step is to become shorter."),
        ),
    ),
    Event("straggler", "A worker takes clearly longer than others for equal work, for some time.", _STRAGGLER),
    Event("straggler_recovered", "A worker that was a straggler is none any more.", _STRAGGLER),
    Event("sample_failed", "The text at the end of the run could not be written; the run has finished all the same."),
    Event(
        "sample",
        "The trained model has written a text.",
        (
            Key("text", "string", "", "Prompt and continuation."),
            Key("sample_s", "number", "s", "Time that it took.", True),
        ),
    ),
    Event(
        "rebalanced",
        "The placement was changed for the load some steps ago, and the outcome is now known.",
        (
            Key("expected", "object", "", "Estimate on which the decision rested.", keys=_ESTIMATE),
            Key(
                "measured",
                "object",
                "",
                "Outcome until the next decision.",
                keys=(
                    Key("gain_s", "number", "s", "Time that the experts of a step became shorter by."),
                    Key("switch_s", "number", "s", "Time that a change of placement takes, running mean."),
                    Key("steps", "integer", "steps", "Steps that were measured."),
                ),
            ),
        ),
    ),
)
"""The events of events.jsonl."""

EXPERT_KINDS = (
    Event(
        "placement",
        "Experts have other slots from this step on.",
        (
            Key("cause", "string", "", "`membership`: a new view; `load`: the placement was changed within a view."),
            Key("ranks", "list of [string, string]", "", "With `membership`: worker and node of each rank.", True),
            Key("shape", "[integer, integer]", "", "Number of MoE layers, and of experts in each."),
            Key(
                "moves",
                "list of [integer x 4]",
                "",
                "Layer, expert, rank, and 1 for a copy that came, -1 for a copy that went, 2 for a home that came.",
            ),
            Key("expected", "object", "", "With `load`: estimate on which the decision rested.", True, _ESTIMATE),
            Key(
                "layers",
                "object of [number, number]",
                "",
                "With `load`: for each layer that changes, expected time of the slowest rank before and after; "
                "1 is the mean.",
                True,
            ),
        ),
    ),
    Event(
        "expert_load",
        "Tokens of every expert over some steps.",
        (
            Key("steps", "integer", "steps", "Steps that were counted, up to and with `step`."),
            Key("load", "list of lists of integers", "tokens", "For each MoE layer, tokens of each expert."),
        ),
    ),
)
"""The records of experts.jsonl; they have the keys of events."""


def units() -> Mapping[str, str]:
    """Unit of every numeric key of a step's record that has one, for trackers and titles."""
    return {key.name: key.unit for key in STEP_KEYS if key.unit}
