"""Which steps of a run are saved, and whose checkpoints stay. Pure."""

from __future__ import annotations

from elastic_moe.config.schema import TrainConfig
from elastic_moe.optim.schedule import last_stable_step
from elastic_moe.plan.batch_sizes import BatchSizes


class SaveSteps:
    """The same on every worker and on the coordinator, because it depends on the configuration alone."""

    def __init__(self, config: TrainConfig) -> None:
        self._every, self._stay_every = config.checkpoint.every_steps, config.checkpoint.keep_every_steps
        saves = self._every or self._stay_every or config.checkpoint.every_minutes
        total, tokens_through = config.run.steps, BatchSizes(config.data).tokens_through
        self._stable = last_stable_step(total, config.optim, tokens_through) if saves else 0

    def due(self, step: int) -> bool:
        """Whether a step is saved without anybody's wish."""
        return self.stays(step) or (self._every > 0 and step % self._every == 0)

    def stays(self, step: int) -> bool:
        """Whether its checkpoint is kept for good: at every `checkpoint.keep_every_steps`, and before a decay."""
        return step > 0 and (step == self._stable or (self._stay_every > 0 and step % self._stay_every == 0))
