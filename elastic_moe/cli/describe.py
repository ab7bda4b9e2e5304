"""Size of a model and memory of its workers, without allocating them: `elastic-moe describe model=NAME ...`.

Takes the keys of `elastic-moe train`. It uses the model, `data.micro_batch`, `data.seq_len`, `precision`, the number of
workers, `elastic.redundancy`, `elastic.spare_slots` and `cluster.worker_memory_gib`. Parameters are counted exactly, on
the meta device. Bytes of weights, gradients and optimizer state are those of the runtime (DESIGN.md, section 3).
Activations and the buffers of the exchange are estimates, and marked so; they are not needed at the same time. What the
interpreter, its libraries and Ray take comes on top, in any worker.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_moe.cli.activations import activation_bytes
from elastic_moe.config.build import start_workers
from elastic_moe.config.schema import ModelConfig, TrainConfig
from elastic_moe.errors import UserError
from elastic_moe.model.attention.compressed import layer_kind
from elastic_moe.model.params import dense_product_numel, param_specs
from elastic_moe.plan.batch_sizes import RunLength
from elastic_moe.plan.placement import copies_of, expected_nodes
from elastic_moe.plan.state.buckets import bucket_elements, vector_bytes

GIB = 1 << 30
MOST_WORKERS = 1 << 20
FP32 = 4
PROCESS_BYTES = 0.35 * GIB  # private memory of a worker of a tiny model: interpreter, torch, Ray's client


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, trained or not.

    Attributes:
        total: all of them.
        embedding: the input embedding.
        dense: those every worker computes with.
        dense_products: those of them that are in matrices of products only.
        expert: those of one routed expert.
        experts: those of all routed experts.
        active: those that compute a token, without the input embedding (as papers count) and multi-token prediction.
        mtp: those of the multi-token prediction, part of the total.
        state: numbers kept of all: weights, moments, and reduced gradients.
    """

    total: int
    embedding: int
    dense: int
    dense_products: int
    expert: int
    experts: int
    active: int
    mtp: int
    state: int


def count(cfg: ModelConfig, optimizer: str = "adamw") -> Counts:
    """Exact parameter counts, from the meta device. `optimizer`: as `optim.name`."""
    specs = param_specs(cfg, optimizer)
    total = sum(s.numel for s in specs)
    experts = sum(s.numel for s in specs if s.expert is not None)
    embedding = cfg.vocab_size * cfg.hidden_size
    expert = 3 * cfg.hidden_size * cfg.expert_hidden
    mtp = sum(s.numel for s in specs if s.name.startswith("mtp."))
    tables = sum(s.numel for s in specs if not s.rule.published_each_step)
    mtp_dense = sum(s.numel for s in specs if s.name.startswith("mtp.") and s.expert is None)
    routed = (cfg.num_layers - cfg.num_dense_layers) * cfg.experts_per_token * expert
    active = total - experts - embedding - mtp_dense - tables + routed
    state = sum(s.numel * (len(s.rule.fields) + s.rule.has_gradient) for s in specs)
    products = dense_product_numel(cfg)
    return Counts(total, embedding, total - experts, products, expert, experts, active, mtp, state)


def attention_flops(cfg: ModelConfig, seq_len: int) -> float:
    """FLOPs of scores and values per token, forward, at the mean number of positions seen."""
    total = 0.0
    for layer in range(cfg.num_layers):
        if cfg.attention == "csa":
            seen = min(cfg.window, seq_len / 2)
            kind = layer_kind(cfg, layer)
            if kind == "hca":
                seen += seq_len / 2 / cfg.hca_rate
            elif kind == "csa":
                entries = seq_len / 2 / cfg.csa_rate
                seen += min(cfg.index_topk, entries)
                total += 2 * cfg.index_heads * cfg.index_dim * entries
            total += 4 * cfg.num_heads * cfg.head_dim * seen
        else:
            widths = 2 * cfg.head_dim
            if cfg.attention == "mla":
                widths = cfg.head_dim + cfg.rope_dim + cfg.value_dim
            total += 2 * cfg.num_heads * widths * seq_len / 2
    return total


def training_flops(cfg: ModelConfig, seq_len: int) -> float:
    """FLOPs per token, forward and backward: six per parameter in a product, attention, multi-token prediction."""
    counts = count(cfg)
    mtp = 0.0
    if cfg.mtp_depth:
        own = counts.mtp - cfg.num_experts * counts.expert + cfg.experts_per_token * counts.expert
        mtp = own + cfg.vocab_size * cfg.hidden_size + attention_flops(cfg, seq_len) / cfg.num_layers / 2
    return 6 * (counts.active + mtp) + 3 * attention_flops(cfg, seq_len)


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest worker; the last two are estimates, and are not needed at the same time."""

    weights: float
    gradients: float
    state: float
    exchange: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.state + max(self.exchange, self.activations)


def slots_per_layer(config: TrainConfig, workers: int) -> int:
    """Expert slots of a worker per MoE layer: an even share of the copies, and the spare ones."""
    ranks_N = expected_nodes(config, workers)
    copies = copies_of(config, ranks_N)
    even = -(-config.model.num_experts * copies.number // (min(ranks_N) if copies.in_nodes else workers))
    wanted = min(even + config.elastic.spare_slots, config.model.num_experts)
    return min(wanted, config.elastic.slots_per_worker or wanted)


def memory(config: TrainConfig, workers: int, counts: Counts | None = None) -> Memory:
    """Memory of the fullest of so many workers. One that is alone computes with its state: `exchange.one_memory`."""
    cfg, counts = config.model, counts or count(config.model, config.optim.name)
    elsewhere = config.elastic.state_on == "host" and config.device != "cpu"
    if workers == 1 and not config.elastic.reproducible and not elsewhere:
        return Memory(0.0, 0.0, FP32 * counts.state, 0.0, activation_bytes(config, workers))
    slots = slots_per_layer(config, workers) * cfg.num_moe_layers * counts.expert
    computed, size = counts.dense + slots, 2 if config.precision == "bf16" else FP32
    narrow = FP32 - size  # bytes that an element in products takes less, as a copy
    copies = min(1 + config.elastic.redundancy, workers)
    in_place = 0 if elsewhere or config.elastic.reproducible else counts.experts / workers  # part of the state's
    return Memory(
        weights=FP32 * computed - narrow * (counts.dense_products + slots),
        gradients=FP32 * (computed - in_place),
        state=FP32 * counts.state * copies / workers,
        exchange=_exchange_bytes(config, workers, counts, slots),
        activations=activation_bytes(config, workers),
    )


def _exchange_bytes(config: TrainConfig, workers: int, counts: Counts, slots: int) -> float:
    """Bytes that a rank sends and receives at once: the largest of reduction, mirroring and publication.

    `slots`: elements of the experts that it computes with. Each of the three goes by buckets (`plan/state/buckets.py`).
    """
    others = workers - 1
    copies = slots * workers / counts.experts if counts.experts else 1.0
    owned, owned_dense, owned_experts = (n / workers for n in (counts.total, counts.dense, counts.experts))
    mirrored = min(config.elastic.redundancy, others) * owned
    gathered = owned_dense * others + owned_experts * (copies - 1)  # elements of what its units are computed with
    computed = counts.dense - owned_dense + slots - owned_experts  # of what others own
    moved = owned_dense * max(others, 1) + owned_experts * max(copies - 1, config.elastic.redundancy, 1)
    buckets = max(1, -(-moved // bucket_elements(workers)))
    wide = 2 * FP32 if config.elastic.reproducible else FP32
    narrow = (2 if config.precision == "bf16" else FP32) / FP32  # nearly all that is published
    return max(wide * (gathered + computed), FP32 * narrow * (gathered + computed), FP32 * 2 * mirrored) / buckets


def _saved_bytes(workers: int, counts: Counts) -> float:
    """Bytes of the copy of its units that a worker writes from: state without gradients."""
    return FP32 * (counts.state - counts.total) / workers


def at_change(config: TrainConfig, workers: int, counts: Counts | None = None) -> float:
    """Most bytes of a worker while one of so many dies and is replaced.

    The others then train without it, with more of the state, and that is more than a change itself needs: the new state
    is the old one with what arrives, and one bucket in each direction.
    """
    counts = counts or count(config.model, config.optim.name)
    if workers == 1:
        return memory(config, 1, counts).total
    fewer = memory(config, workers - 1, counts)
    dense = 2 * FP32 * counts.dense
    moving = fewer.state + dense + 2 * FP32 * bucket_elements(workers) + vector_bytes(int(fewer.state))
    return max(fewer.total, memory(config, workers, counts).total, moving)


def smallest(config: TrainConfig, limit: float) -> int | None:
    """The smallest number of workers whose fullest one fits into so many bytes; None when none does."""
    low, high, counts = 0, 1, count(config.model, config.optim.name)
    while memory(config, high, counts).total > limit:
        low, high = high, 2 * high
        if high > MOST_WORKERS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory(config, middle, counts).total > limit else (low, middle)
    return high


def report(config: TrainConfig) -> str:
    """The description as text."""
    cfg, counts = config.model, count(config.model, config.optim.name)
    workers, seq_len = start_workers(config), config.data.seq_len
    held, limit = memory(config, workers, counts), config.cluster.worker_memory_gib * GIB
    fits = smallest(config, limit)
    at_least = f"{fits} workers" if fits else "no number of workers: each one holds more than that in any case"
    mtp = f" ({_number(counts.mtp)} of them predict the token after the next)" if counts.mtp else ""
    routed = f"{cfg.num_moe_layers} layers of {cfg.num_experts} with {_number(counts.expert)} each"
    flops = f"{_number(training_flops(cfg, seq_len))} forward and backward"
    batch = f"{config.data.micro_batch} sequences of {seq_len}"
    slots = f"{slots_per_layer(config, workers)} expert slots per layer" if held.weights else "those of the state"
    length = RunLength.of(config)
    ramp = length.sizes.ramp_steps
    grows = f", {config.data.batch_ramp} at first, all from step {ramp + 1:,} on" if ramp else ""
    sequences = f"{config.data.global_batch} sequences of {seq_len}{grows}"
    lines = [
        ("parameters", f"{_number(counts.total)}{mtp}"),
        ("  active per token", f"{_number(counts.active)} without the input embedding ({_number(counts.embedding)})"),
        ("  routed experts", f"{_number(counts.experts)}: {routed}"),
        ("  on every worker", _number(counts.dense)),
        ("FLOPs per token", f"{flops}, at {seq_len} tokens per sequence"),
        ("tokens of the run", f"{_number(length.tokens)}: {length.steps:,} steps of {sequences}"),
        (f"memory per worker, {workers} of them", f"{held.total / GIB:,.2f} GiB"),
        ("  weights", f"{held.weights / GIB:,.2f} GiB ({slots})"),
        ("  gradients", f"{held.gradients / GIB:,.2f} GiB"),
        ("  owned and mirrored state", f"{held.state / GIB:,.2f} GiB (redundancy {config.elastic.redundancy})"),
        ("  exchange, about", f"{held.exchange / GIB:,.2f} GiB"),
        ("  activations, about", f"{held.activations / GIB:,.2f} GiB ({batch}, recompute {cfg.recompute})"),
        ("  interpreter, libraries, on top", f"{PROCESS_BYTES / GIB:,.2f} GiB, in host memory"),
        ("  more while a checkpoint is written", f"{_saved_bytes(workers, counts) / GIB:,.2f} GiB"),
        ("  at most while one of them is away", f"{at_change(config, workers, counts) / GIB:,.2f} GiB"),
        (f"fits into {config.cluster.worker_memory_gib:g} GiB with", at_least),
    ]  # fmt: skip
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _number(value: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}" if value < 1e15 else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 and one sentence for a bad configuration."""
    from elastic_moe.cli.compose import BAD_CONFIG, check, register_schema
    from elastic_moe.cli.key_help import show_help

    register_schema()
    overrides = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(overrides):
        show_help("describe", "Count a model's parameters, FLOPs and memory per worker, without allocating either.")
        return 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (config,) = check(overrides)
    except UserError as error:
        print(f"elastic_moe: {error}", file=sys.stderr)
        return BAD_CONFIG
    print(report(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
