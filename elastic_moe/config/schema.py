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

    vocab_size: int = 2048  # overwritten by the tokenizer's size
    end_token: int = -1  # id that ends a document; overwritten by the tokenizer's
    hidden_size: int = 128
    num_layers: int = 4
    norm_eps: float = 1e-6
    init_std: float = 0.02
    init_from: str = ""  # directory of a Hugging Face checkpoint: its shape and weights are taken
    document_mask: bool = False  # tokens of a packed sequence see their own document only
    recompute: int = 0  # with streams: 0 keeps them all, n keeps every n-th sub-layer's, -1 the paper's best n
    fused: str = "auto"  # mHC kernels: "auto", "off", "compile", "triton"

    attention: str = "gqa"  # "gqa", "mla", "csa"
    num_heads: int = 4
    num_kv_heads: int = 2  # gqa
    head_dim: int = 32  # gqa and csa: a head's width; mla: its part without positions
    rope_dim: int = 16  # mla, csa: a head's part with positions
    value_dim: int = 32  # mla
    query_latent: int = 0  # mla, csa; 0: none
    kv_latent: int = 64  # mla
    qk_norm: bool = False  # gqa
    attention_bias: bool = False
    rope_theta: float = 10000.0
    rope_interleave: bool = True  # mla: rotate pairs (2i, 2i + 1); false: (i, i + d/2)
    rope_factor: float = 1.0  # YaRN: context extension; 1: none
    rope_original_len: int = 4096  # YaRN: length before extension
    rope_beta_fast: float = 32.0  # YaRN
    rope_beta_slow: float = 1.0  # YaRN
    rope_mscale: float = 0.0  # YaRN; 0: not given
    rope_mscale_all_dim: float = 0.0  # YaRN; 0: not given
    layer_kinds: list[str] = field(
        default_factory=list[str]
    )  # csa: "sliding", "csa" or "hca" per layer; empty: V4-Pro's
    window: int = 128  # csa: tokens seen uncompressed
    csa_rate: int = 4
    hca_rate: int = 128
    compress_theta: float = 160000.0  # csa: rotary base of csa and hca layers
    index_heads: int = 4
    index_dim: int = 32
    index_topk: int = 512
    index_loss_weight: float = 1.0
    output_groups: int = 2  # csa
    output_latent: int = 64  # csa: per group

    num_dense_layers: int = 1  # leading layers with a dense feed-forward
    dense_hidden: int = 384
    num_experts: int = 16
    experts_per_token: int = 4
    expert_hidden: int = 64
    num_shared_experts: int = 1
    router_score: str = "sigmoid"  # "sigmoid", "sqrtsoftplus", "softmax"
    normalize_gates: bool = True  # gates of a token's experts sum to routed_scaling
    routed_scaling: float = 1.0
    num_groups: int = 1  # node-limited routing: groups of experts,
    groups_per_token: int = 1  # and how many of them a token may use
    num_hash_layers: int = 0  # leading MoE layers whose experts follow from the token id
    swiglu_limit: float = 0.0  # clamp of the SwiGLU's inputs; 0: none
    bias_update_speed: float = 0.001
    seq_balance_weight: float = 0.0001

    residual: str = "plain"  # "plain", "hc", "mhc"
    num_streams: int = 4  # hc, mhc
    sinkhorn_iters: int = 20  # mhc
    mix_eps: float = 0.0  # mhc: added where transformers adds hc_eps; 0 as in the paper
    readout: str = "mean"  # hc, mhc: streams -> hidden, "mean" or "learned"

    mtp_depth: int = 0  # 1: predict the token after the next one too
    mtp_weight: float = 0.3
    mtp_late_weight: float = 0.1
    mtp_switch: float = 0.67  # fraction of run.steps after which the late weight holds

    max_unit_elements: int = 262144  # larger tensors are cut into row blocks of about this many elements

    @property
    def num_moe_layers(self) -> int:
        """MoE layers, that of the multi-token prediction included."""
        return self.num_layers - self.num_dense_layers + self.mtp_depth

    @property
    def has_streams(self) -> bool:
        return self.residual != "plain"


@dataclass(kw_only=True)
class DataConfig(Sealed):
    corpus: str = "stdlib"  # "stdlib", or a text file or directory
    pattern: str = "*"  # files of a directory
    max_bytes: int = 8_000_000  # 0: all of it
    tokenizer: str = "bpe"  # "bpe", "bytes", or a tokenizer.json
    vocab_size: int = 2048
    seq_len: int = 128
    global_batch: int = 32  # sequences per step, whatever the world size
    micro_batch: int = 8  # sequences per forward pass on one worker
    val_fraction: float = 0.02
    cache_dir: str = ""  # "": beside the run directories, in .cache


@dataclass(kw_only=True)
class OptimConfig(Sealed):
    lr: float = 2e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 20
    schedule: str = "cosine"  # "cosine", "constant"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0


@dataclass(kw_only=True)
class ElasticConfig(Sealed):
    min_workers: int = 1
    max_workers: int = 0  # 0: the number the cluster starts with
    redundancy: int = 1  # living mirrors of every unit: 0, 1 or 2
    reproducible: bool = False  # losses equal bit for bit at every world size; shares are whole micro-batches
    spare_slots: int = 1  # expert slots per worker and layer beyond an even share
    slots_per_worker: int = 0  # hard limit per MoE layer; 0: no limit
    heartbeat_s: float = 0.5
    heartbeat_timeout_s: float = 6.0  # silence of a worker before it is evicted
    hang_timeout_s: float = 120.0  # no progress of the main thread while others wait for it
    join_settle_s: float = 0.5  # wait this long for more joiners before admitting them together
    drain_deadline_s: float = 30.0  # used when a drain notice names no deadline
    wait_below_min_s: float = 3600.0  # give up after waiting this long below min_workers
    form_timeout_s: float = 20.0  # forming the groups of a view


@dataclass(kw_only=True)
class BalanceConfig(Sealed):
    every_steps: int = 1  # steps between two looks at the experts' load; 0: placement changes with the membership only
    window: float = 3.0  # steps over which the load that is planned for is averaged
    home_moves: int = 1  # homes per MoE layer that one look may move where the gain pays for their bytes
    home_every_steps: int = 20  # steps between two looks at homes
    payback_steps: int = 50  # steps for which a moved home is taken to be of use
    dispatch_gib: float = 1.0  # most that the rows of one layer take on a rank before they come in chunks; 0: no limit
    by_node: bool = False  # tokens between nodes go in one message per pair of nodes, not one per pair of workers
    log_every_steps: int = 10  # steps that a record of the experts' loads covers; 0: none


@dataclass(kw_only=True)
class CheckpointConfig(Sealed):
    every_steps: int = 50  # 0: only at the end
    keep: int = 3
    dir: str = ""  # "": <run.dir>/checkpoints; a path or s3:// or gs:// URI


@dataclass(kw_only=True)
class RunConfig(Sealed):
    dir: str = "runs/default"
    steps: int = 200
    resume: str = "never"  # "never" or "auto"
    eval_every_steps: int = 50  # 0: only at the end
    eval_sequences: int = 64
    sample_tokens: int = 64  # 0: no sample
    sample_prompt: str = "def "
    overwrite: bool = False  # allow starting anew in a run directory that has a run


@dataclass(kw_only=True)
class ClusterConfig(Sealed):
    kind: str = "local"  # "local", "simulated", "address"
    workers: int = 4  # workers to start with (local, address)
    nodes: int = 2  # simulated
    workers_per_node: int = 2  # simulated
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    address: str = ""  # "": RAY_ADDRESS
    object_store_gib: float = 0.1
    worker_memory_gib: float = 74.5  # what a worker has; only `elastic_moe.describe` asks
    dashboard: bool = False


@dataclass(kw_only=True)
class TrackingConfig(Sealed):
    wandb: str = "auto"  # "auto": online with an account, else offline; "online", "offline", "off"
    project: str = "elastic_moe"
    name: str = ""


@dataclass(kw_only=True)
class FaultConfig(Sealed):
    """Faults a run inflicts on itself, for demonstrations and tests."""

    kill_worker_at_step: int = 0  # SIGKILL the worker of rank `kill_rank` once this step is committed; 0: never
    kill_rank: int = 1
    inject: list[str] = field(default_factory=list[str])  # "rank:step:phase", each fires once


@dataclass(kw_only=True)
class TrainConfig(Sealed):
    seed: int = 0
    precision: str = "fp32"  # "fp32" or "bf16" (autocast)
    device: str = "auto"  # "auto", "cpu", "cuda"
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
    faults: FaultConfig = field(default_factory=FaultConfig)
