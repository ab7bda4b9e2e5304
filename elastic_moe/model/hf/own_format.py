"""Models that no family of transformers can express, in a format of our own that transformers loads with custom code.

config.json has the model's shape under the names of ModelConfig (`shape`), and the tensors have our names. The code in
`remote` lies beside them. The weights of multi-token prediction are kept, so that training can go on.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from elastic_moe.config.schema import ModelConfig
from elastic_moe.errors import UserError
from elastic_moe.model.hf.families import OWN, Json

FORMAT = 1
CODE = Path(__file__).with_name("remote")
MODULE = "modeling_elastic_moe"
NO_SHAPE = set(
    """
    end_token init_from document_mask recompute fused index_loss_weight bias_update_speed seq_balance_weight mtp_weight
    mtp_late_weight mtp_switch max_unit_elements z_loss router_z_loss logits_gib stream_segment
""".split()
)  # fmt: skip - how a model is trained, and not what it is
SHAPE = [item.name for item in fields(ModelConfig) if item.name not in NO_SHAPE]


def own_config(cfg: ModelConfig, dtype: str, seq_len: int) -> dict[str, Any]:
    """Content of config.json.

    Args:
        cfg: the model's shape.
        dtype: of the weights, as torch names it without the prefix.
        seq_len: longest sequence trained on.

    Raises:
        UserError: the code in `remote` has no such attention.
    """
    if cfg.attention == "csa":
        raise UserError(
            "model.attention=csa can be exported as Hugging Face's deepseek_v4 only, which needs "
            "model.residual=mhc, model.readout=learned, model.num_dense_layers=0 and model.num_shared_experts=1."
        )
    values = asdict(cfg)
    return {
        "model_type": OWN,
        "format": FORMAT,
        "architectures": ["ElasticMoeForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODULE}.ElasticMoeConfig",
            "AutoModelForCausalLM": f"{MODULE}.ElasticMoeForCausalLM",
        },
        "dtype": dtype,
        "max_position_embeddings": max(
            seq_len, int(cfg.rope_original_len * cfg.rope_factor) if cfg.rope_factor > 1 else 0
        ),
        "tie_word_embeddings": False,
        "eos_token_id": cfg.end_token if cfg.end_token >= 0 else None,
        "bos_token_id": None,
        "shape": {name: values[name] for name in SHAPE},
    }


def own_fields(config: Json, where: str) -> dict[str, Any]:
    """Fields of ModelConfig that a config.json of ours has.

    Raises:
        UserError: it is of another version, or lacks a field of the shape, or has one that is not known.
    """
    if config.get("format") != FORMAT:
        raise UserError(f"{where}: format {config.get('format')!r} is not {FORMAT}, the one that is known here.")
    shape = dict(config["shape"])
    for name in {*shape, *SHAPE}:
        if name not in shape or name not in SHAPE:
            raise UserError(f"{where}: shape {'lacks' if name in SHAPE else 'has an unknown'} {name}.")
    return shape


def copy_code(directory: Path) -> None:
    """Put the code that transformers runs beside the weights."""
    for path in sorted(CODE.glob("*.py")):
        shutil.copy(path, directory / path.name)
