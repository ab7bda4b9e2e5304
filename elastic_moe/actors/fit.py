"""Makes the trainer of a run, and runs it to its end. Where its controller dies, another one takes over the workers.

The workers are detached (`actors/kept.py`) and train on without a controller. The coordinator decides about the
training, so what is missing meanwhile is only the replacement of workers that end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError
from ray.train import RunConfig, ScalingConfig

from elastic_moe.actors.cluster import max_workers, resources_per_worker
from elastic_moe.actors.controller import ElasticTrainer
from elastic_moe.actors.link import LAST_SAVE_MARGIN_S, CoordinatorLink, Finder, train_names
from elastic_moe.actors.worker import train_function
from elastic_moe.config.schema import TrainConfig
from elastic_moe.data.prepare import Prepared
from elastic_moe.run_dir import RAY

DEATHS = 3  # controllers that may die one after another without a step between them
PATIENCE_S = 60.0  # for the coordinator's answer
POLL_S = 0.05


def make_trainer(config: TrainConfig, prepared: Prepared, name: str) -> ElasticTrainer:
    """The trainer of a run whose coordinator was started under this name.

    Ray Train shows `train_loop_config` to whoever sees its dashboard, so the run's token is not in it.
    """
    names = train_names(name, config.run.dir)
    return ElasticTrainer(
        train_function,
        train_loop_config={"config": config, "find": Finder(name), "prepared": prepared},
        coordinator=name,
        names=names,
        last_save_s=config.elastic.hang_timeout_s + LAST_SAVE_MARGIN_S,
        first_limit=config.sweep.workers,
        scaling_config=ScalingConfig(
            num_workers=max_workers(config),
            use_gpu=config.cluster.gpus_per_worker > 0,
            resources_per_worker=resources_per_worker(config.cluster),
        ),
        run_config=RunConfig(name=names.name, storage_path=str(Path(config.run.dir) / RAY)),
    )


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def fit(make: Callable[[], ElasticTrainer], link: CoordinatorLink, tell: Callable[[str], None] = _tell) -> None:
    """Train until the run is over.

    Args:
        make: makes a trainer; it is called again for every controller.
        link: to the run's coordinator, for this call alone.
        tell: prints a line.

    Raises:
        ActorDiedError: `DEATHS` controllers have died without a step between them, or Ray has been shut down.
        Exception: the error that ended the run.
    """
    died, step = 0, -1
    while True:
        try:
            make().fit()
            return
        except ActorDiedError:
            if not ray.is_initialized():
                raise
            status = _answer(link)
            died = died + 1 if status.get("step", -1) == step else 1
            step = status.get("step", -1)
            if died >= DEATHS:
                raise
            tell("the Ray Train controller died: the workers train on, and another one takes over")


def _answer(link: CoordinatorLink) -> dict[str, Any]:
    """A status that the coordinator gave after this call; {} if it gives none in time."""
    link.forget()
    deadline_s = time.monotonic() + PATIENCE_S
    while not (status := link.poll()) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    return status
