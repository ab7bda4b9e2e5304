"""Choosing the next token, and generating text with a cache.

Nucleus sampling: Holtzman et al. 2019 (arXiv 1904.09751). The random draw is made on the CPU. So a seed gives the same
text on every device, as far as the logits agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from elastic_moe.model.attention.context import KVCache
from elastic_moe.model.transformer import Transformer


def pick(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Choose a token id from the logits of one position.

    Args:
        logits_V: of any float type, on any device.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: only the most likely tokens that together reach this probability can be drawn; 1 for all.
        generator: source of the random draw, on the CPU.
    """
    logits_V = logits_V.float().cpu()
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities, ids = (logits_V / temperature).softmax(dim=-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities[before >= top_p] = 0.0  # the most likely token is always kept: nothing comes before it
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


@torch.inference_mode()
def generate(
    model: Transformer,
    num_layers: int,
    prompt: Sequence[int],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    end_token: int = -1,
) -> Iterator[int]:
    """Yield the tokens that continue the prompt, until the end token or `max_tokens`.

    Args:
        model: with its experts.
        num_layers: layers of the cache.
        prompt: one token at least.
        max_tokens: the most tokens to yield.
        temperature, top_p: see `pick`.
        seed: of the random draws.
        end_token: ends the text and is not yielded; -1 for none.
    """
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(num_layers)
    tokens = list(prompt)
    device = next(model.parameters()).device
    for _ in range(max_tokens):
        logits_BSV = model(torch.tensor([tokens], device=device), cache)
        token = pick(logits_BSV[0, -1], temperature, top_p, generator)
        if token == end_token:
            return
        yield token
        tokens = [token]
