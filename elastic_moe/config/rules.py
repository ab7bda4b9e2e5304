"""Ranges and cross-key rules of the configuration, one line each. A setting that is allowed but doubtful gives a note.

The alignment of 4 elements is torch's: `grouped_mm` wants rows of 16 bytes, which are 4 fp32 or 8 bf16 values.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from elastic_moe.config.data_rules import check_data
from elastic_moe.config.model_rules import check_attention, check_groups, check_recompute
from elastic_moe.config.pace import pace
from elastic_moe.config.paths import check_paths
from elastic_moe.config.recipe_rules import check_recipe
from elastic_moe.config.renamed import renamed_value
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError

FAULT_PHASES = ("compute", "reduce", "mirror", "vote", "apply", "publish", "committed", "transfer", "confirm")

CHOICES: dict[str, tuple[str, ...]] = {
    "precision": ("fp32", "bf16"),
    "reduce_precision": ("fp32", "bf16"),
    "device": ("auto", "cpu", "cuda"),
    "run.resume": ("never", "auto"),
    "run.log_format": ("text", "json"),
    "run.objective": ("val_loss", "loss", "tokens_per_s"),
    "model.attention": ("gqa", "mla", "csa"),
    "model.router_score": ("sigmoid", "sqrtsoftplus", "softmax"),
    "model.residual": ("plain", "hc", "mhc"),
    "model.readout": ("mean", "learned"),
    "model.fused": ("auto", "off", "compile", "triton"),
    "data.dedup": ("off", "exact", "near"),
    "optim.name": ("adamw", "muon"),
    "optim.schedule": ("cosine", "constant", "wsd", "steps"),
    "optim.decay_shape": ("linear", "sqrt", "cosine"),
    "elastic.state_on": ("device", "host"),
    "optim.spike": ("off", "skip", "rollback", "stop"),
    "cluster.kind": ("auto", "local", "simulated", "address"),
    "cluster.collectives": ("auto", "gloo", "nccl"),
    "tracking.backend": ("wandb", "tensorboard", "mlflow", "trackio", "off"),
    "sweep.goal": ("min", "max"),
    "sweep.early_stopping": ("off", "asha"),
    "tracking.wandb": ("auto", "online", "offline", "off"),
}

AT_LEAST_ONE = """
    run.steps model.vocab_size model.hidden_size model.num_layers model.num_heads model.num_kv_heads model.head_dim
    model.num_experts model.experts_per_token model.expert_hidden model.dense_hidden model.max_unit_elements
    model.rope_dim model.value_dim model.kv_latent model.rope_original_len model.window model.csa_rate
    model.hca_rate model.index_heads model.index_dim model.index_topk model.output_groups model.output_latent
    model.num_groups model.groups_per_token model.num_streams model.sinkhorn_iters data.seq_len data.global_batch
    data.micro_batch elastic.min_workers checkpoint.keep balance.home_every_steps balance.payback_steps
    cluster.workers cluster.nodes cluster.workers_per_node
""".split()

AT_LEAST_ZERO = """
    seed threads run.log_every_s run.eval_every_steps run.eval_sequences run.sample_tokens model.num_dense_layers
    model.num_shared_experts model.bias_update_speed model.seq_balance_weight
    model.router_z_loss model.z_loss model.logits_gib model.init_std model.query_latent
    model.rope_mscale model.rope_mscale_all_dim model.index_loss_weight model.num_hash_layers model.swiglu_limit
    model.mix_eps model.mtp_depth model.mtp_weight model.mtp_late_weight model.mtp_switch data.max_bytes
    data.processes data.batch_ramp data.batch_ramp_steps data.batch_ramp_tokens
    optim.max_skipped optim.warmup_steps optim.warmup_tokens optim.base_width
    optim.min_lr_ratio optim.weight_decay elastic.max_workers elastic.redundancy
    elastic.spare_slots elastic.slots_per_worker elastic.join_settle_s elastic.drain_deadline_s
    elastic.wait_below_min_s elastic.max_faults elastic.check_every_steps checkpoint.every_steps
    checkpoint.keep_every_steps checkpoint.every_minutes checkpoint.wait_s
    balance.every_steps balance.home_moves balance.dispatch_gib
    balance.log_every_steps cluster.cpus_per_worker cluster.gpus_per_worker cluster.nodes_timeout_s
    faults.kill_worker_at_step faults.kill_rank sweep.max_concurrent sweep.max_workers sweep.retries sweep.rung_steps
    sweep.workers sweep.priority sweep.min_gain
""".split()

ABOVE_ZERO = """
    model.routed_scaling model.rope_theta model.rope_fraction model.norm_eps model.rope_factor model.rope_beta_fast
    model.rope_beta_slow model.compress_theta cluster.worker_memory_gib optim.lr optim.eps optim.grad_clip
    optim.decay_fraction
    elastic.heartbeat_s elastic.heartbeat_timeout_s elastic.lease_s elastic.hold_s elastic.hang_timeout_s
    elastic.form_timeout_s balance.window checkpoint.timeout_s
""".split()

MULTIPLE_OF_4 = "model.hidden_size model.head_dim model.expert_hidden model.dense_hidden".split()


def start_workers(config: TrainConfig) -> int:
    """Number of workers that the cluster starts with."""
    cluster = config.cluster
    return cluster.nodes * cluster.workers_per_node if cluster.kind == "simulated" else cluster.workers


def check_rules(config: TrainConfig, inputs: bool = True) -> list[str]:
    """Raise UserError for the first rule broken; return notes about settings that are allowed but doubtful.

    Args:
        config: the configuration.
        inputs: the corpus and the tokenizer have to be there.
    """
    _check_ranges(config, "")
    for key in ("optim.beta1", "optim.beta2", "optim.momentum"):
        _need(config, key, lambda value: 0 <= value < 1, "from 0 to below 1")
    _need(config, "seed", lambda value: value < 2**63, "below 2^63")
    for key in ("optim.min_lr_ratio", "optim.decay_fraction"):
        _need(config, key, lambda value: value <= 1, "at most 1")
    _need(config, "data.val_fraction", lambda value: 0 < value <= 0.5, "above 0 and at most 0.5")
    _need(config, "elastic.redundancy", lambda value: value <= 2, "0, 1 or 2")
    _need(config, "data.vocab_size", lambda value: 256 < value <= 2**31 - 1, "above 256, the number of byte tokens")
    _need(
        config,
        "cluster.object_store_gib",
        lambda value: value * 1024 >= 75,
        "at least 0.0733 (75 MiB), Ray's lower bound",
    )
    _need(
        config, "cluster.price_per_hour", lambda value: all(p >= 0 for p in value.values()), "prices of at least 0 each"
    )
    _need(config, "data.pattern", lambda value: bool(value.strip()), "a pattern of file names, such as *.txt")
    _need(
        config,
        "run.dir",
        lambda value: bool(value.strip()) and "://" not in value,
        "the path of a directory (checkpoint.dir may be an object store's)",
    )
    copies = config.balance.copies
    if copies not in ("auto", "all", "node") and not (copies.isdecimal() and int(copies)):
        raise UserError(f"balance.copies must be auto, all, node or a number of at least 1, not {copies!r}.")
    check_paths(config)
    step = 8 if config.precision == "bf16" else 4
    for key in MULTIPLE_OF_4:
        _need(config, key, lambda value: value % step == 0, f"a multiple of {step} in {config.precision}")
    _check_model(config)
    _check_elastic(config)
    check_data(config.data, inputs)
    scheme = re.match(r"([a-z0-9]+)://", config.checkpoint.dir)
    if scheme and scheme[1] not in ("file", "s3", "gs"):
        raise UserError(
            f"checkpoint.dir must be a path or a file://, s3:// or gs:// URI, not {config.checkpoint.dir!r}."
        )
    _check_faults(config)
    _check_sweep(config)
    if config.optim.spike == "rollback" and not config.checkpoint.every_steps and not config.checkpoint.every_minutes:
        raise UserError(
            "optim.spike=rollback goes back to checkpoints: set checkpoint.every_steps or checkpoint.every_minutes."
        )
    if config.cluster.collectives == "nccl" and config.device == "cpu":
        raise UserError("cluster.collectives=nccl is for GPUs and device is cpu: set device=cuda, or collectives=auto.")
    return check_recipe(config) + _notes(config)


def check_model_rules(config: TrainConfig) -> None:
    """Raise UserError for the first rule that `model` alone breaks, whatever it is trained with."""
    _check_ranges(config, "model.")
    _check_model(config)


def _check_ranges(config: TrainConfig, begin: str) -> None:
    """Check the choices and ranges of the keys that begin so."""
    for key, choices in CHOICES.items():
        if key.startswith(begin):
            if note := renamed_value(key, _get(config, key)):
                raise UserError(note)
            _need(config, key, lambda value, choices=choices: value in choices, "one of " + ", ".join(choices))
    for keys, low in ((AT_LEAST_ONE, 1), (AT_LEAST_ZERO, 0)):
        for key in keys:
            if key.startswith(begin):
                _need(config, key, lambda value, low=low: value >= low, f"at least {low}")
    for key in ABOVE_ZERO:
        if key.startswith(begin):
            _need(config, key, lambda value: value > 0, "greater than 0")


def _get(config: TrainConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _need(config: TrainConfig, key: str, holds: Callable[[Any], bool], what: str) -> None:
    value = _get(config, key)
    if not holds(value):
        raise UserError(f"{key} must be {what}, not {value!r}.")


def _check_model(config: TrainConfig) -> None:
    model = config.model
    if model.experts_per_token > model.num_experts:
        raise UserError(
            f"model.experts_per_token ({model.experts_per_token}) must not exceed model.num_experts "
            f"({model.num_experts})."
        )
    if model.num_dense_layers >= model.num_layers:
        raise UserError(
            f"model.num_dense_layers ({model.num_dense_layers}) must be below model.num_layers ({model.num_layers}), "
            "so that at least one layer has experts."
        )
    if model.num_hash_layers > model.num_layers - model.num_dense_layers:
        raise UserError(
            f"model.num_hash_layers ({model.num_hash_layers}) must not exceed the "
            f"{model.num_layers - model.num_dense_layers} layers with experts."
        )
    _need(config, "model.mtp_depth", lambda value: value <= 1, "0 or 1")
    _need(config, "model.mtp_switch", lambda value: value <= 1, "at most 1")
    _need(config, "model.rope_factor", lambda value: value >= 1, "at least 1")
    _need(config, "model.end_token", lambda value: value >= -1, "a token id, or -1")
    _need(config, "model.stream_segment", lambda value: value >= -1, "-1, 0 or a number of sub-layers")
    check_recompute(model)
    check_groups(model)
    check_attention(model)


def _check_elastic(config: TrainConfig) -> None:
    elastic, start = config.elastic, start_workers(config)
    if elastic.max_workers and elastic.min_workers > elastic.max_workers:
        raise UserError(
            f"elastic.min_workers ({elastic.min_workers}) must not exceed elastic.max_workers ({elastic.max_workers})."
        )
    if elastic.max_workers and start > elastic.max_workers:
        raise UserError(
            f"elastic.max_workers ({elastic.max_workers}) must be 0 or at least the {start} workers that the cluster "
            "starts with."
        )
    if not elastic.max_workers and elastic.min_workers > start:
        raise UserError(
            f"elastic.min_workers ({elastic.min_workers}) must not exceed the {start} workers that the cluster starts "
            "with, unless elastic.max_workers allows more."
        )
    if elastic.slots_per_worker and elastic.slots_per_worker * start < config.model.num_experts:
        raise UserError(
            f"elastic.slots_per_worker ({elastic.slots_per_worker}) times {start} workers is less than "
            f"model.num_experts ({config.model.num_experts}): allow more slots or start more workers."
        )
    if elastic.heartbeat_timeout_s <= pace(elastic.heartbeat_s, max(start, elastic.max_workers)):
        raise UserError(
            f"elastic.heartbeat_timeout_s ({elastic.heartbeat_timeout_s}) must be longer than elastic.heartbeat_s "
            f"({elastic.heartbeat_s}), and than the pace of heartbeats of so many workers."
        )
    if elastic.lease_s <= elastic.heartbeat_timeout_s:
        raise UserError(
            f"elastic.lease_s ({elastic.lease_s}) must be longer than elastic.heartbeat_timeout_s "
            f"({elastic.heartbeat_timeout_s})."
        )
    if elastic.hold_s <= elastic.lease_s:
        raise UserError(
            f"elastic.hold_s ({elastic.hold_s}) must be longer than elastic.lease_s ({elastic.lease_s}), after which a "
            "worker begins to wait."
        )
    if config.reduce_precision == "bf16" and config.elastic.reproducible:
        raise UserError(
            "reduce_precision=bf16 rounds by who computed a gradient, and elastic.reproducible=true needs sums that do "
            "not depend on it: set one of them."
        )


def _check_faults(config: TrainConfig) -> None:
    faults = config.faults
    if faults.kill_worker_at_step and faults.kill_rank >= start_workers(config):
        raise UserError(
            f"faults.kill_rank ({faults.kill_rank}) must be below the {start_workers(config)} workers that the cluster "
            "starts with."
        )
    for entry in faults.inject:
        match = re.fullmatch(r"(\d+):(\d+):(\w+)(:stop)?", entry)
        if not match or match[3] not in FAULT_PHASES:
            raise UserError(
                f"faults.inject must list rank:step:phase or rank:step:phase:stop with a phase of "
                f"{', '.join(FAULT_PHASES)}, not {entry!r}."
            )


def _check_sweep(config: TrainConfig) -> None:
    _need(config, "sweep.rung_factor", lambda value: value >= 2, "at least 2")
    _need(config, "sweep.min_gain", lambda value: value <= 1, "at most 1")
    if config.sweep.early_stopping == "asha" and config.run.objective == "val_loss" and not config.run.eval_every_steps:
        raise UserError(
            "sweep.early_stopping=asha compares run.objective=val_loss during the run: set run.eval_every_steps, or "
            "run.objective=loss."
        )
    if 0 < config.sweep.max_workers < config.elastic.min_workers:
        raise UserError(
            f"sweep.max_workers ({config.sweep.max_workers}) must be 0 or at least elastic.min_workers "
            f"({config.elastic.min_workers})."
        )


def _notes(config: TrainConfig) -> list[str]:
    notes: list[str] = []
    model = config.model
    layers = model.num_layers + model.mtp_depth
    if model.recompute.isdecimal() and int(model.recompute) > layers:
        notes.append(
            f"model.recompute ({model.recompute}) is more than the {layers} layers: all are recomputed at once."
        )
    if config.elastic.redundancy >= start_workers(config):
        notes.append(
            f"elastic.redundancy ({config.elastic.redundancy}) needs more than the {start_workers(config)} workers "
            "that the cluster starts with; state has fewer living copies until others join."
        )
    if config.device == "cuda" and config.cluster.gpus_per_worker == 0:
        notes.append("device is cuda and cluster.gpus_per_worker is 0: Ray will not give each worker a GPU of its own.")
    return notes
