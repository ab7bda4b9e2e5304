"""Blocks side by side: ours against transformers' with the same weights, and mHC against the plain residual.

Both sides run in turn, forward and backward, for many rounds in one process. The result is the median of the ratios of
neighbouring passes, and its spread. A block is a whole layer: norms, attention, router, routed and shared experts.
transformers runs with its defaults: SDPA attention and its own choice of expert kernels.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.attention.context import AttentionContext
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.hf.checkpoint import load_model
from elastic_moe.model.residual.connections import Segments
from elastic_moe.model.transformer import Transformer
from scripts.benchmarks import common

SHAPE_KEYS = ("family", "hidden", "experts", "expert_hidden", "experts_per_token")
SHAPES = {
    "v3-16": ("deepseek_v3", 512, 16, 256, 2),
    "v3-64": ("deepseek_v3", 512, 64, 256, 6),
    "qwen3-16": ("qwen3_moe", 512, 16, 256, 2),
    "qwen3-64": ("qwen3_moe", 512, 64, 256, 6),
    "qwen3-128-narrow": ("qwen3_moe", 512, 128, 96, 8),
}
SEQ_LEN = 512


def oracle(family: str, hidden: int, experts: int, width: int, chosen: int) -> Any:
    """One MoE layer of transformers, as a whole model of one layer and a small vocabulary."""
    import transformers

    torch.manual_seed(0)
    common_sizes = {
        "vocab_size": 128, "hidden_size": hidden, "num_hidden_layers": 1, "intermediate_size": 4 * width,
        "moe_intermediate_size": width, "num_attention_heads": hidden // 64, "num_experts_per_tok": chosen,
        "norm_topk_prob": True, "max_position_embeddings": 4096,
    }  # fmt: skip
    if family == "deepseek_v3":
        config = transformers.DeepseekV3Config(
            **common_sizes, num_key_value_heads=None, n_routed_experts=experts, n_group=1, topk_group=1,
            n_shared_experts=1, first_k_dense_replace=0, q_lora_rank=hidden // 2, kv_lora_rank=hidden // 4,
            qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, num_mtp_layers=0,
        )  # fmt: skip
        return transformers.DeepseekV3ForCausalLM(config)
    config = transformers.Qwen3MoeConfig(
        **common_sizes, num_key_value_heads=max(1, hidden // 256), head_dim=64, num_experts=experts
    )
    return transformers.Qwen3MoeForCausalLM(config)


Step = Callable[[], float]


def measured(x: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor], parameters: list[torch.Tensor]) -> Step:
    """One forward and backward pass, in seconds. Gradients are kept allocated, as a trainer keeps them."""
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)

    def step() -> float:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        _synchronize(x)
        started = time.perf_counter()
        forward(x).backward(grad)
        _synchronize(x)
        return time.perf_counter() - started

    return step


def _synchronize(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def compare(first: Step, second: Step, rounds: int) -> dict[str, Any]:
    """Time both in turn; each ratio is of two neighbouring passes."""
    first(), second()
    pairs = [(first(), second()) for _ in range(rounds)]
    ratios = sorted(b / a for a, b in pairs)
    return {
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
        "seconds_median": [statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)],
        "rounds": rounds,
    }


def against_transformers(
    name: str, dtype: torch.dtype, device: torch.device, batch: int, rounds: int
) -> dict[str, Any]:
    """Theirs over ours: above 1 means that ours is faster."""
    family, hidden, experts, width, chosen = SHAPES[name]
    theirs = oracle(family, hidden, experts, width, chosen)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        cfg, model, local = load_model(directory, seq_balance_weight=0.0)
    theirs, model, local = (m.to(device=device, dtype=dtype) for m in (theirs, model, local))
    if family == "deepseek_v3":
        theirs.model.layers[0].mlp.gate.e_score_correction_bias.data = torch.zeros(experts, device=device)
    x = (
        torch.randn((batch, SEQ_LEN, hidden), generator=torch.Generator().manual_seed(0))
        .to(device, dtype)
        .requires_grad_()
    )
    tokens = torch.zeros((batch, SEQ_LEN), dtype=torch.int64, device=device)
    positions = torch.arange(SEQ_LEN, device=device)[None].expand(batch, -1)
    rotary = theirs.model.rotary_emb(x, positions)
    block = model.layers[0]

    def ours_forward(t: torch.Tensor) -> torch.Tensor:
        return block(t, tokens, AttentionContext(cfg, SEQ_LEN, device), Segments(cfg, device), local).x

    def theirs_forward(t: torch.Tensor) -> torch.Tensor:
        out = theirs.model.layers[0](t, position_embeddings=rotary, attention_mask=None, position_ids=positions)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        difference = float((ours_forward(x) - theirs_forward(x)).abs().max() / theirs_forward(x).abs().max())
    local.direct = True  # as the trainer does
    for parameter in local.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ours = measured(x, ours_forward, [*block.parameters(), *local.parameters()])
    other = measured(x, theirs_forward, list(theirs.model.layers[0].parameters()))
    return {
        "block": name, "dtype": str(dtype).removeprefix("torch."), "relative_difference": difference,
        "shape": dict(zip(SHAPE_KEYS, SHAPES[name], strict=True)),
        "attention": theirs.config._attn_implementation, "experts": theirs.config._experts_implementation,
        **compare(ours, other, rounds),
    }  # fmt: skip


def mhc_cost(
    hidden: int, dtype: torch.dtype, device: torch.device, fused: str, batch: int, rounds: int
) -> dict[str, Any]:
    """mHC over the plain residual, for two whole layers of latent attention and experts at this width."""
    steps = []
    for residual in ("plain", "mhc"):
        cfg = ModelConfig(
            vocab_size=128, hidden_size=hidden, num_layers=2, num_dense_layers=0, attention="mla",
            num_heads=hidden // 128, head_dim=128, rope_dim=64, value_dim=128, kv_latent=512, num_experts=16,
            experts_per_token=4, expert_hidden=hidden // 2, num_shared_experts=1, residual=residual, fused=fused,
            seq_balance_weight=0.0,
        )  # fmt: skip
        local = LocalExperts(cfg)
        model = Transformer(cfg, local)
        model.initialize(0)
        model, local = model.to(device=device, dtype=dtype), local.to(device=device, dtype=dtype)
        shape = (batch, SEQ_LEN, hidden) if residual == "plain" else (batch, SEQ_LEN, cfg.num_streams, hidden)
        local.direct = True
        for parameter in local.parameters():
            parameter.grad = torch.zeros_like(parameter)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
        tokens = torch.zeros((batch, SEQ_LEN), dtype=torch.int64, device=device)

        def forward(
            t: torch.Tensor,
            model: Transformer = model,
            cfg: ModelConfig = cfg,
            local: LocalExperts = local,
            tokens: torch.Tensor = tokens,
        ) -> torch.Tensor:
            context, segments = AttentionContext(cfg, SEQ_LEN, device), Segments(cfg, device)
            for block in model.layers:
                t = block(t, tokens, context, segments, local).x
            return t

        steps.append(measured(x, forward, [*model.layers.parameters(), *local.parameters()]))
    return {"hidden": hidden, "dtype": str(dtype).removeprefix("torch."), "fused": fused, **compare(*steps, rounds)}


def main() -> int:
    parser = common.arguments("model", __doc__ or "")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="blocks whose name contains this, or mhc")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="as many as a CPU worker has by default")
    parser.add_argument("--sequences", type=int, default=2, help=f"of {SEQ_LEN} tokens")
    parser.add_argument("--fused", default="off,compile", help="forms of mHC's kernels")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = 2 if options.quick else options.rounds
    device = torch.device(options.device)

    def body() -> dict[str, Any]:
        blocks, costs = [], []
        for name in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                if options.only in name:
                    blocks.append(against_transformers(name, dtype, device, options.sequences, rounds))
                    found = blocks[-1]
                    common.say(f"{name} {found['dtype']}: ours is {found['ratio_median']:.2f} times as fast")
        if options.only in ("", "mhc"):
            for hidden in (1024,) if options.quick else (1024, 2560):
                for dtype in (torch.float32, torch.bfloat16):
                    for fused in options.fused.split(","):
                        costs.append(mhc_cost(hidden, dtype, device, fused, options.sequences, rounds))
                        found = costs[-1]
                        common.say(
                            f"mHC at {hidden}, {found['dtype']}, {fused}: {found['ratio_median']:.3f} times plain"
                        )
        machine = common.machine() | {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
        return {
            "benchmark": "model", "machine": machine, "threads": torch.get_num_threads(),
            "tokens": options.sequences * SEQ_LEN,
            "theirs_over_ours": blocks, "mhc_over_plain": costs,
        }  # fmt: skip

    return common.run(body, options.json)


if __name__ == "__main__":
    sys.exit(main())
