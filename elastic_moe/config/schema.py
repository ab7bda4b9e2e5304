"""The configuration as typed values. Defaults live here; YAML overrides them; nothing reads a DictConfig past `build`.

Keyword-only dataclasses on a write-once base (frozen ones fail to compose in OmegaConf 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class Sealed:
    """Write-once base: after `seal()` an assignment raises AttributeError."""

    def seal(self) -> None:
        """Refuse further assignments, here and in nested configurations."""
        for value in vars(self).values():
            if isinstance(value, Sealed):
                value.seal()
        object.__setattr__(self, "_sealed", True)

    def __setattr__(self, key: str, value: Any) -> None:
        if getattr(self, "_sealed", False):
            raise AttributeError(f"configuration is sealed: cannot set {key}")
        object.__setattr__(self, key, value)


@dataclass(kw_only=True)
class ModelConfig(Sealed):
    """Shape of the MoE transformer. Sources of the terms: the files of elastic_moe/model."""

    vocab_size: int = 2048  # tokens in the vocabulary; the tokenizer's size replaces it
    end_token: int = -1  # id that ends a document; the tokenizer's replaces it; -1: none
    hidden_size: int = 128  # width of the hidden state
    num_layers: int = 4  # transformer layers, the dense ones included
    norm_eps: float = 1e-6  # epsilon of RMSNorm
    init_std: float = 0.02  # standard deviation of the initial weights
    init_from: str = ""  # directory of a Hugging Face checkpoint: its shape and weights are taken
    document_mask: bool = False  # tokens of a packed sequence see their own document only
    recompute: str = "none"  # made again for the backward pass: none, selective, full (layers), n (n layers at once)
    stream_segment: int = 0  # with streams: sub-layers for which they are kept once; 0: by recompute; -1: the best n
    fused: str = "auto"  # kernels of mHC

    attention: str = "gqa"  # grouped-query, multi-head latent, or compressed sparse attention
    num_heads: int = 4  # attention heads
    num_kv_heads: int = 2  # gqa: heads of keys and values
    head_dim: int = 32  # gqa and csa: a head's width; mla: its part without positions
    rope_dim: int = 16  # mla, csa: a head's part with positions
    value_dim: int = 32  # mla: width of a head's values
    query_latent: int = 0  # mla, csa: width of the queries' latent; 0: none
    kv_latent: int = 64  # mla: width of the latent of keys and values
    qk_norm: bool = False  # gqa: normalise queries and keys
    attention_bias: bool = False  # biases in the projections of attention
    output_bias: bool = True  # gqa: with attention_bias, the output projection has one too
    rope_theta: float = 10000.0  # base of the rotary embedding
    rope_fraction: float = 1.0  # gqa: part of a head's width that is rotated
    rope_interleave: bool = True  # mla: rotate pairs (2i, 2i + 1); false: (i, i + d/2)
    rope_factor: float = 1.0  # YaRN: context extension; 1: none
    rope_original_len: int = 4096  # YaRN: length before extension
    rope_beta_fast: float = 32.0  # YaRN: rotations above which a dimension is not interpolated
    rope_beta_slow: float = 1.0  # YaRN: rotations below which a dimension is interpolated
    rope_mscale: float = 0.0  # YaRN: scale of attention; 0: not given
    rope_mscale_all_dim: float = 0.0  # YaRN: scale of attention over all dimensions; 0: not given
    layer_kinds: list[str] = field(default_factory=list[str])  # csa: "sliding", "csa" or "hca" per layer; []: V4-Pro's
    window: int = 128  # csa: tokens seen uncompressed
    csa_rate: int = 4  # csa: tokens per compressed entry in csa layers
    hca_rate: int = 128  # csa: tokens per compressed entry in hca layers
    compress_theta: float = 160000.0  # csa: rotary base of csa and hca layers
    index_heads: int = 4  # csa: heads of the indexer
    index_dim: int = 32  # csa: width of an indexer's head
    index_topk: int = 512  # csa: compressed entries that a query selects
    index_loss_weight: float = 1.0  # csa: weight of the indexer's loss
    output_groups: int = 2  # csa: groups of heads in the output projection
    output_latent: int = 64  # csa: width of each group's latent in the output projection

    num_dense_layers: int = 1  # leading layers with a dense feed-forward
    dense_hidden: int = 384  # inner width of a dense feed-forward
    num_experts: int = 16  # routed experts per MoE layer
    experts_per_token: int = 4  # routed experts that compute each token
    expert_hidden: int = 64  # inner width of an expert
    num_shared_experts: int = 1  # experts that compute every token
    router_score: str = "sigmoid"  # function from the router's logits to scores
    normalize_gates: bool = True  # gates of a token's experts sum to routed_scaling
    routed_scaling: float = 1.0  # factor of the routed experts' output
    num_groups: int = 1  # node-limited routing: groups of experts
    groups_per_token: int = 1  # node-limited routing: groups that a token may use
    num_hash_layers: int = 0  # leading MoE layers whose experts follow from the token id
    swiglu_limit: float = 0.0  # clamp of the SwiGLU's inputs; 0: none
    bias_update_speed: float = 0.001  # change of the router's balancing bias per step; 0: none
    seq_balance_weight: float = 0.0001  # weight of the balance loss within a sequence
    router_z_loss: float = 0.0  # weight of the squared log-sum-exp of the routers' logits (ST-MoE: 0.001)
    z_loss: float = 0.0  # weight of the squared log-sum-exp of the head's logits (PaLM: 0.0001)
    logits_gib: float = 0.0625  # logits of a micro-batch formed at once, in GiB; more come in chunks; 0: no limit

    residual: str = "plain"  # residual connections: plain, hyper-connections, or manifold-constrained hyper-connections
    num_streams: int = 4  # hc, mhc: residual streams
    sinkhorn_iters: int = 20  # mhc: Sinkhorn iterations
    mix_eps: float = 0.0  # mhc: added where transformers adds hc_eps; 0 as in the paper
    readout: str = "mean"  # hc, mhc: how the streams become one hidden state

    mtp_depth: int = 0  # 1: predict the token after the next one too
    mtp_weight: float = 0.3  # weight of the loss of multi-token prediction
    mtp_late_weight: float = 0.1  # the same late in the run
    mtp_switch: float = 0.67  # fraction of run.steps after which the late weight holds

    max_unit_elements: int = 262144  # larger tensors are cut into row blocks of about this many elements

    @property
    def num_moe_layers(self) -> int:
        """MoE layers, that of the multi-token prediction included."""
        return self.num_layers - self.num_dense_layers + self.mtp_depth

    @property
    def rotated_dim(self) -> int:
        """gqa: channels of a head that are rotated."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def has_streams(self) -> bool:
        return self.residual != "plain"


@dataclass(kw_only=True)
class DataConfig(Sealed):
    corpus: str = "stdlib"  # text or tokens: a file, directory or URL; "stdlib": the source of Python's own library
    mixture: dict[str, float] = field(default_factory=dict[str, float])  # +data.mixture={PATH:WEIGHT}: several corpora
    pattern: str = "*"  # files of a directory
    text_field: str = ""  # JSONL and tables: field or column with the text; "": text or content
    max_bytes: int = 0  # bytes of text that are read of a corpus; 0: all of it, of stdlib the first 8 MB
    dedup: str = "off"  # exact or near duplicates of documents are left out
    tokenizer: str = "bpe"  # "bpe", "bytes", a tokenizer.json, or its directory; "ids": the corpus holds tokens
    vocab_size: int = 2048  # bpe: tokens in the trained vocabulary; ids: their number
    seq_len: int = 128  # tokens per sequence
    global_batch: int = 32  # sequences per step, whatever the world size
    batch_ramp: int = 0  # sequences of the first step; the batch then grows to global_batch; 0: no ramp
    batch_ramp_steps: int = 0  # steps before the batch has its full size
    batch_ramp_tokens: int = 0  # instead of batch_ramp_steps: tokens before the batch has its full size
    micro_batch: int = 8  # sequences per forward pass on one worker
    val_fraction: float = 0.02  # part of the text that is kept for evaluation
    cache_dir: str = ""  # directory of tokenized text; "": .cache beside the run directories
    processes: int = 0  # processes that prepare a corpus; 0: one for each processor


def paper_steps() -> list[str]:
    """`optim.lr_steps` as the mHC paper trains (arXiv 2512.24880, Table 5)."""
    return ["0.8:0.316", "0.9:0.1"]


@dataclass(kw_only=True)
class OptimConfig(Sealed):
    name: str = "adamw"  # muon: for the matrices of the layers, with the same learning rate; the rest stays AdamW's
    lr: float = 2e-3  # highest learning rate
    base_width: int = 0  # model.hidden_size for which lr and model.init_std were found; scales both; 0: as they are
    min_lr_ratio: float = 0.1  # last learning rate over the highest
    warmup_steps: int = 20  # steps in which the learning rate rises from 0
    warmup_tokens: int = 0  # instead of warmup_steps: tokens in which the learning rate rises; 0: warmup_steps holds
    schedule: str = "cosine"  # learning rate after the warm-up; wsd: stays and decays at the end; steps: by lr_steps
    decay_fraction: float = 0.2  # wsd: last part of the run's tokens, in which the learning rate decays
    decay_shape: str = "sqrt"  # wsd: form of the decay; sqrt: 1 - sqrt(x)
    lr_steps: list[str] = field(default_factory=paper_steps)  # steps: "fraction of the run:factor of lr", in order
    beta1: float = 0.9  # AdamW: decay of the first moment
    beta2: float = 0.95  # AdamW: decay of the second moment
    eps: float = 1e-8  # AdamW: added to the denominator
    weight_decay: float = 0.1  # decoupled weight decay
    momentum: float = 0.95  # Muon: decay of the momentum
    spike: str = "off"  # what follows a step whose loss or gradient norm is 6 deviations above the last 128
    max_skipped: int = 50  # steps in a row without an update that end the run; 0: no limit
    grad_clip: float = 1.0  # largest norm of the gradient; larger ones are scaled down


@dataclass(kw_only=True)
class ElasticConfig(Sealed):
    min_workers: int = 1  # fewer workers than this wait for others
    max_workers: int = 0  # most workers; 0: the number the cluster starts with
    redundancy: int = 1  # living mirrors of every unit: 0, 1 or 2
    state_on: str = "device"  # master weights and optimizer state lie on what computes; host, for CPUs beside GPUs
    reproducible: bool = False  # losses equal bit for bit at every world size; shares are whole micro-batches
    spare_slots: int = 1  # expert slots per worker and layer beyond an even share
    slots_per_worker: int = 0  # hard limit per MoE layer; 0: no limit
    heartbeat_s: float = 0.5  # seconds between two heartbeats of a worker; more above 500 workers
    heartbeat_timeout_s: float = 6.0  # silence of a worker before it is removed
    lease_s: float = 30.0  # a worker that hears nothing of the coordinator for so long commits no further step
    hold_s: float = 1800.0  # a worker that hears nothing of the coordinator for so long ends
    hang_timeout_s: float = 120.0  # no progress of the main thread while others wait for it
    join_settle_s: float = 0.5  # wait this long for more joiners before admitting them together
    drain_deadline_s: float = 30.0  # used when a drain notice names no deadline
    wait_below_min_s: float = 3600.0  # give up after waiting this long below min_workers
    check_every_steps: int = 50  # steps between two comparisons of the copies of each unit, by checksums; 0: none
    max_faults: int = 3  # steps in which a worker alone is not finite, or is repaired, before it leaves; 0: no limit
    form_timeout_s: float = 20.0  # forming the groups of a view


@dataclass(kw_only=True)
class BalanceConfig(Sealed):
    copies: str = "auto"  # of each expert: a number, all: on each worker, node: on each node, auto: to move fewer bytes
    every_steps: int = 1  # steps between two looks at the experts' load; 0: placement follows the membership only
    window: float = 3.0  # steps over which the load that is planned for is averaged
    home_moves: int = 1  # homes per MoE layer that one look may move where the gain pays for their bytes
    home_every_steps: int = 20  # steps between two looks at homes
    payback_steps: int = 50  # steps for which a moved home is taken to be of use
    dispatch_gib: float = 1.0  # largest rows of one layer on a rank, in GiB; more come in chunks; 0: no limit
    by_speed: bool = False  # measured speeds of the workers set their shares of a batch and of the experts' rows
    by_node: bool = False  # tokens between nodes go in one message per pair of nodes, not one per pair of workers
    log_every_steps: int = 10  # steps that a record of the experts' loads covers, more in a long run; 0: none


@dataclass(kw_only=True)
class CheckpointConfig(Sealed):
    every_steps: int = 50  # steps between two checkpoints; 0: not by steps
    every_minutes: float = 0.0  # longest time between two checkpoints, in minutes; 0: no limit
    keep: int = 3  # newest checkpoints that are kept
    keep_every_steps: int = 0  # steps between two checkpoints that stay for good; 0: only the one before a decay (wsd)
    dir: str = ""  # a path or s3:// or gs:// URI; "": <run.dir>/checkpoints
    timeout_s: float = 60.0  # longest silence of the storage within one call, which is then given up
    wait_s: float = 600.0  # longest wait for a storage that fails, at a resume and for the last checkpoint


@dataclass(kw_only=True)
class RunConfig(Sealed):
    dir: str = "runs/default"  # directory of the run's files
    steps: int = 200  # training steps
    resume: str = "never"  # auto: continue the run in run.dir if there is one
    eval_every_steps: int = 50  # steps between two evaluations; 0: only at the end
    eval_sequences: int = 64  # sequences of an evaluation
    sample_tokens: int = 64  # tokens of the sample text at the end; 0: no sample
    sample_prompt: str = "def "  # text that the sample continues
    log_every_s: float = 30.0  # without a terminal: seconds between two lines about the progress; 0: none
    log_format: str = "text"  # of the log's lines; json: one object a line, with level, run, generation and step
    overwrite: bool = False  # allow starting anew in a run directory that has a run
    objective: str = "val_loss"  # what a trial of a sweep returns to Hydra's sweeper; the last two over 10 steps


def no_prices() -> dict[str, float]:
    """`cluster.price_per_hour` as long as none is known."""
    return {"default": 0.0, "on-demand": 0.0, "spot": 0.0}


@dataclass(kw_only=True)
class ClusterConfig(Sealed):
    kind: str = "auto"  # auto: an existing cluster if one is named, else local, Ray in this process
    workers: int = 4  # local, address: workers to start with
    nodes: int = 2  # simulated: nodes to start with
    workers_per_node: int = 2  # simulated: workers on each node
    cpus_per_worker: float = 1.0  # CPU cores that Ray reserves for a worker
    gpus_per_worker: float = 0.0  # GPUs that Ray reserves for a worker
    collectives: str = "auto"  # library between GPUs; auto: NCCL if each worker has it and a GPU of its own, else gloo
    address: str = ""  # auto, address: address of the Ray cluster; "": RAY_ADDRESS
    object_store_gib: float = 0.1  # size of Ray's object store on a node that is started, in GiB
    worker_memory_gib: float = 74.5  # memory of a worker, in GiB; used by `elastic-moe describe` only
    dashboard: bool = False  # start Ray's dashboard
    nodes_timeout_s: float = 300.0  # address: give up after so long without a node that could hold a worker; 0: wait
    price_per_hour: dict[str, float] = field(default_factory=no_prices)  # of a node, by node group or market type


@dataclass(kw_only=True)
class TrackingConfig(Sealed):
    backend: str = "wandb"  # tracker that gets the metrics
    wandb: str = "auto"  # auto: online with an account, else offline
    project: str = "elastic_moe"  # project or experiment in the tracker
    name: str = ""  # name of the run in the tracker; "": chosen from run.dir
    group: str = ""  # group of the run in the tracker, such as a sweep


@dataclass(kw_only=True)
class SweepConfig(Sealed):
    """A sweep with `hydra/launcher=elastic`; see cluster/README.md."""

    max_concurrent: int = 0  # trials that train at once; 0: as many as the cluster has room for
    max_workers: int = 0  # workers of all trials together; 0: those the cluster has room for; more are asked of Ray
    priority: int = 0  # of a trial: higher ones get their workers first
    min_gain: float = 0.2  # more workers are given if they bring so much of a speed-up in proportion; 0: always
    retries: int = 2  # a trial is started again after so many failures in a row without a new step
    goal: str = "min"  # whether a smaller or a larger run.objective is better
    early_stopping: str = "off"  # asha: asynchronous successive halving ends trials that are behind
    rung_steps: int = 0  # asha: steps before the first comparison; 0: run.steps divided twice by sweep.rung_factor
    rung_factor: int = 3  # asha: one of so many trials passes a comparison; the next has so many times the steps
    workers: int = 0  # set by the launcher: workers that the trial begins with at most; 0: no limit


@dataclass(kw_only=True)
class FaultConfig(Sealed):
    """Faults a run inflicts on itself, for demonstrations and tests."""

    kill_worker_at_step: int = 0  # SIGKILL the worker of rank `kill_rank` once this step is committed; 0: never
    kill_rank: int = 1  # rank of the worker that is killed
    inject: list[str] = field(default_factory=list[str])  # "rank:step:phase", each fires once


@dataclass(kw_only=True)
class TrainConfig(Sealed):
    seed: int = 0  # seed of weights, data order and samples
    precision: str = "fp32"  # bf16: products and the weights in them; master weights and sums of gradients stay fp32
    reduce_precision: str = "fp32"  # bf16: gradients travel in it, rounded stochastically, and are summed in fp32
    device: str = "auto"  # auto: a GPU where there is one
    threads: int = 1  # torch threads per worker; 0: torch's default
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
