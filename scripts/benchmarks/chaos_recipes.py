"""What a soak's runs train, drawn from a seed: model, optimizer, precision, copies of experts, memory, batches.

Each setting is drawn by itself, so that settings meet that no test puts together.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

GROUPS: tuple[tuple[str, ...], ...] = (  # one of each group; its words go together
    (
        "",
        "model.residual=hc model.num_streams=2",
        "model.residual=mhc model.num_streams=2",
        "model.residual=mhc model.num_streams=2 model.readout=learned model.stream_segment=-1",
    ),
    (
        "",
        "model.attention=mla model.rope_dim=8 model.value_dim=16 model.kv_latent=16 model.query_latent=16",
        "model.attention=csa model.rope_dim=8 model.query_latent=16 model.output_latent=16 model.window=8 "
        "model.csa_rate=4 model.hca_rate=8 model.index_heads=2 model.index_dim=8 model.index_topk=4 "
        "model.layer_kinds=[csa,hca]",
    ),
    ("", "model.mtp_depth=1"),
    ("", "model.z_loss=1e-4 model.router_z_loss=1e-3"),
    ("", "model.logits_gib=1e-5"),
    ("", "model.recompute=selective", "model.recompute=full", "model.recompute=2"),
    ("optim.name=adamw", "optim.name=muon optim.lr=3e-3"),
    ("optim.schedule=cosine", "optim.schedule=wsd", "optim.schedule=steps optim.warmup_tokens=3000"),
    ("", "", "precision=bf16"),
    ("", "data.batch_ramp=4 data.batch_ramp_steps=60", "data.batch_ramp=2 data.batch_ramp_tokens=20000"),
    ("balance.copies=1", "balance.copies=2", "balance.copies=all", "balance.copies=auto", "balance.copies=node"),
    ("", "balance.by_speed=true"),
    ("", "balance.by_node=true"),
    ("", "elastic.spare_slots=1"),
    ("", "elastic.check_every_steps=1"),
)
INEXACT: tuple[tuple[str, ...], ...] = (("elastic.reproducible=false",), ("", "reduce_precision=bf16"))


@dataclass(frozen=True)
class Recipe:
    """Settings of a run.

    Attributes:
        words: overrides for the command line.
        exact: losses are the same bit for bit at every membership.
    """

    words: tuple[str, ...]
    exact: bool


def draw_recipe(seed: int) -> Recipe:
    """The recipe of a seed; three of five are exact."""
    rng = random.Random(f"recipe {seed}")
    exact = rng.random() < 0.6
    groups = GROUPS if exact else GROUPS + INEXACT
    return Recipe(tuple(word for group in groups for word in rng.choice(group).split()), exact)
