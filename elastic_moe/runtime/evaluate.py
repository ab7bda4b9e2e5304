"""Validation loss and sampled text of the sharded model. Both are collective."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch

from elastic_moe.data.shards import TokenShard
from elastic_moe.model.sampling import pick
from elastic_moe.model.transformer import Transformer
from elastic_moe.plan.shares import fastest_split, slices_of
from elastic_moe.runtime.batches import MicroBatches
from elastic_moe.runtime.session import GenerationContext

TEMPERATURE = 0.8
TOP_P = 0.95


class Evaluator:
    """Runs the model forward, without gradients.

    Args:
        model: the compute model, whose expert backend belongs to the current generation.
        val: the validation shard.
        batches: makes micro-batches.
        autocast: context manager factory for mixed precision.
        device: of the model.
    """

    def __init__(
        self,
        model: Transformer,
        val: TokenShard,
        batches: MicroBatches,
        autocast: Callable[[], AbstractContextManager[object]],
        device: torch.device,
    ) -> None:
        self._model, self._val, self._batches = model, val, batches
        self._autocast, self._device = autocast, device

    @torch.no_grad()
    def losses(self, context: GenerationContext, num_sequences: int, seq_len: int) -> dict[str, float]:
        """Mean validation loss per token in nats, by the name of each corpus; "" without a mixture.

        Of each corpus the first `num_sequences` sequences of its validation text are taken.
        """
        samples = self._val.samples(seq_len)
        totals_C2 = torch.zeros((len(samples), 2), dtype=torch.float64)
        begin = 0
        for count, total_2 in zip(samples, totals_C2, strict=True):
            ids = np.arange(begin, begin + min(num_sequences, count), dtype=np.int64)
            shares = slices_of(fastest_split(len(ids), context.speeds.sequences))
            share = self._val.batch(ids[shares[context.rank]], seq_len)
            for inputs, targets in self._batches.of(share, shares):
                with self._autocast():
                    out = self._model.loss(inputs, targets)
                total_2 += torch.tensor([float(out.ce_sum), float(out.num_tokens)], dtype=torch.float64)
            begin += count
        context.group.all_reduce(totals_C2)
        names = [name for name, _ in self._val.spans] or [""]
        return {name: float(total[0] / total[1]) for name, total in zip(names, totals_C2, strict=True)}

    @torch.no_grad()
    def sample(
        self, context: GenerationContext, prompt: list[int], num_tokens: int, seq_len: int, seed: int
    ) -> list[int]:
        """Generate text. The first active rank holds it; the others take part in the all-to-alls.

        Args:
            context: the current generation.
            prompt: first tokens.
            num_tokens: tokens to generate.
            seq_len: tokens that the model sees at most.
            seed: of the random choices.

        Returns:
            Prompt and generated tokens on the first active rank, the prompt elsewhere.
        """
        tokens = list(prompt)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(num_tokens):
            seen = torch.tensor([tokens[-seq_len:]] if context.leads else [], dtype=torch.int64)
            seen = seen.reshape(1 if context.leads else 0, -1 if context.leads else 1).to(self._device)
            with self._autocast():
                logits = self._model(seen)
            if context.leads:
                tokens.append(pick(logits[0, -1], TEMPERATURE, TOP_P, generator))
        return tokens
