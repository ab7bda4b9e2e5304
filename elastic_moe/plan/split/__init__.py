"""How the tokens of a step are split over the replicas of their experts."""

from elastic_moe.plan.split.split import RankSplit, of_rank, slowest_times, split_for_rank, split_tokens, split_whole

__all__ = ["RankSplit", "of_rank", "slowest_times", "split_for_rank", "split_tokens", "split_whole"]
