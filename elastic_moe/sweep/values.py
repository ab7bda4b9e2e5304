"""What `${hydra:...}` means in a configuration before Hydra runs its job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


@contextmanager
def hydra_values(config: DictConfig) -> Iterator[None]:
    """While this lasts, interpolations such as `${hydra:job.num}` find the `hydra` node of this configuration."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def without_hydra(config: DictConfig) -> DictConfig:
    """The configuration without its `hydra` node."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
