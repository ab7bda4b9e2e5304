"""How many sequences each batch has: always `data.global_batch`, or a ramp up to it.

A small batch costs fewer tokens per update while the gradient is large against its noise (McCandlish et al., arXiv
1812.06162, section 2), and DeepSeek-V3 raises its batch from 3072 to 15360 sequences over the first 469B tokens (arXiv
2412.19437, section 4.2). The batch grows in stages of `data.micro_batch` sequences, each for about as many steps, or
for about as many tokens, as the others. The sizes are a pure function of the batch's number, and the batches take
consecutive parts of the data. So neither the membership nor a resume changes which samples a step takes.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

from elastic_moe.config.schema import DataConfig, TrainConfig


class BatchSizes:
    """Sizes of the batches 0, 1, 2, ..., and where in the data they begin; step s, from 1, has batch s - 1.

    Args:
        data: `global_batch`, `micro_batch`, `seq_len`, and the keys `batch_ramp*`.
    """

    def __init__(self, data: DataConfig) -> None:
        self._seq_len = data.seq_len
        self._first: list[int] = []  # batch of each stage
        self._sizes: list[int] = []
        for first, size in _stages(data):
            if self._first and self._first[-1] == first:  # a stage without a batch
                self._first.pop()
                self._sizes.pop()
            self._first.append(first)
            self._sizes.append(size)
        self._starts = [0]  # first sequence of each stage
        for stage, size in enumerate(self._sizes[:-1]):
            self._starts.append(self._starts[-1] + size * (self._first[stage + 1] - self._first[stage]))

    def size(self, batch: int) -> int:
        """Sequences of a batch."""
        return self._sizes[bisect_right(self._first, batch) - 1]

    def start(self, batch: int) -> int:
        """Position of its first sequence in the endless sequence of epochs: the sequences of all batches before it."""
        stage = bisect_right(self._first, batch) - 1
        return self._starts[stage] + (batch - self._first[stage]) * self._sizes[stage]

    def tokens_through(self, step: int) -> int:
        """Tokens of the steps 1, 2, ..., `step`, if no batch is left out."""
        return self.start(step) * self._seq_len

    def steps_left(self, step: int, total: int) -> float:
        """The rest of a run of `total` steps after `step`, in steps of the size of this one."""
        return (self.start(total) - self.start(step)) / self.size(max(step - 1, 0))

    @property
    def ramp_steps(self) -> int:
        """Steps before the first one of full size; 0 without a ramp."""
        return self._first[-1]


@dataclass(frozen=True)
class RunLength:
    """The steps of a run, and the sizes of their batches."""

    steps: int
    sizes: BatchSizes = field(default_factory=lambda: BatchSizes(DataConfig()))

    @classmethod
    def of(cls, config: TrainConfig) -> RunLength:
        """The length of a configured run."""
        return cls(config.run.steps, BatchSizes(config.data))

    def left(self, step: int) -> float:
        """What is left after a step, in steps of its size: an estimate of the time left needs no more."""
        return self.sizes.steps_left(step, self.steps)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.sizes.tokens_through(self.steps)


def _stages(data: DataConfig) -> list[tuple[int, int]]:
    """(first batch, size) of each stage, the last one of full size; stages without a batch are among them."""
    if not data.batch_ramp:
        return [(0, data.global_batch)]
    sizes = list(range(data.batch_ramp, data.global_batch, data.micro_batch))
    firsts = [0]
    for stage, size in enumerate(sizes, start=1):
        if data.batch_ramp_tokens:
            lasts = -(-data.batch_ramp_tokens // (len(sizes) * size * data.seq_len))
            firsts.append(firsts[-1] + lasts)
        else:
            firsts.append(-(-stage * data.batch_ramp_steps // len(sizes)))
    return list(zip(firsts, [*sizes, data.global_batch], strict=True))
