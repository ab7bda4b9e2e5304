"""The fingerprint of a run: the keys that shape its model, and those that its losses depend on.

A start that continues a run is compared with it. Another shape cannot be continued. Another value of the other keys
changes the run, which is told and allowed. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from elastic_moe.config.schema import ModelConfig, TrainConfig

# Keys of the model that its state on disk depends on; the condition says for which attention they count.
SHAPE = """
    vocab_size hidden_size num_layers attention num_heads num_dense_layers dense_hidden num_experts expert_hidden
    num_shared_experts num_hash_layers residual mtp_depth max_unit_elements
""".split()
SHAPE_OF_ATTENTION = {
    "gqa": "num_kv_heads head_dim qk_norm attention_bias output_bias".split(),
    "mla": "head_dim rope_dim value_dim query_latent kv_latent attention_bias".split(),
    "csa": """
        head_dim rope_dim query_latent layer_kinds csa_rate hca_rate index_heads index_dim output_groups output_latent
    """.split(),
}
SHAPE_OF_STREAMS = "num_streams readout".split()
_NOT_TOLD = {
    "data.cache_dir", "data.processes", "model.end_token", "model.init_from", "model.fused", "model.recompute",
    "model.stream_segment", "model.logits_gib",
}  # fmt: skip
# Keys by which the text is found and read: where the tokens are the same, their values do not matter.
_OF_TEXT = tuple(f"data.{name}:" for name in "corpus pattern text_field max_bytes dedup".split())
_SINGLE = ("seed", "precision", "reduce_precision")


@dataclass(frozen=True, slots=True)
class Comparison:
    """A start beside the run that it continues, as `key: old -> new`.

    Attributes:
        impossible: keys of another shape or tokenizer: the state on disk does not fit.
        changed: keys that change the run from here on.
    """

    impossible: tuple[str, ...]
    changed: tuple[str, ...]


def shape_keys(model: ModelConfig) -> list[str]:
    """Keys that the model's state on disk depends on."""
    names = SHAPE + SHAPE_OF_ATTENTION[model.attention] + (SHAPE_OF_STREAMS if model.has_streams else [])
    names = names + (["experts_per_token"] if model.num_hash_layers else [])  # the width of the hash layers' tables
    return [f"model.{name}" for name in names]


def fingerprint(config: TrainConfig, digests: Mapping[str, str]) -> dict[str, Any]:
    """The fingerprint of a configuration.

    Args:
        config: the configuration; its vocabulary size is that of the tokenizer.
        digests: digest of the tokenizer (`tokenizer`) and of the token shards (`data`), as far as they are known.
    """
    keys = {name: getattr(config, name) for name in _SINGLE} | {"run.steps": config.run.steps}
    for group in ("model", "data", "optim"):
        node = getattr(config, group)
        keys |= {f"{group}.{item.name}": _plain(getattr(node, item.name)) for item in fields(node)}
    return {"keys": keys, "shape": [*shape_keys(config.model), "optim.name"]} | dict(digests)


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Comparison:
    """Compare the fingerprint of a run with that of a start; a key that one of them lacks is passed over."""
    shape = set(old.get("shape", ())) | set(new.get("shape", ()))
    differing = list(_differing(old.get("keys", {}), new.get("keys", {})))
    impossible = [text for key, text in differing if key in shape]
    changed = [text for key, text in differing if key not in shape and key not in _NOT_TOLD]
    if _differs(old, new, "tokenizer") and not any(text.startswith("model.vocab_size") for text in impossible):
        impossible.append("data.tokenizer: another vocabulary")
    if _differs(old, new, "data"):
        changed.append("data: another text")
    elif old.get("data") and new.get("data"):
        changed = [text for text in changed if not text.startswith(_OF_TEXT)]
    return Comparison(tuple(impossible), tuple(changed))


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in new.items():
        if key in old and old[key] != value:
            yield key, f"{key}: {old[key]} -> {value}"


def _differs(old: Mapping[str, Any], new: Mapping[str, Any], key: str) -> bool:
    return bool(old.get(key) and new.get(key) and old[key] != new[key])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): one for name, one in cast("Mapping[Any, Any]", value).items()}
    return [str(item) for item in cast("list[Any]", value)] if isinstance(value, list) else value
