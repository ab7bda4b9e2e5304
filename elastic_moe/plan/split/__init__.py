"""Split of a step's tokens over the copies of their experts."""

from elastic_moe.plan.split.split import (
    RankSplit,
    of_rank,
    positive_speeds,
    slowest_times,
    split_for_rank,
    split_tokens,
)
from elastic_moe.plan.split.whole import split_whole

__all__ = [
    "RankSplit",
    "of_rank",
    "positive_speeds",
    "slowest_times",
    "split_for_rank",
    "split_tokens",
    "split_whole",
]
