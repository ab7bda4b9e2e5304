"""Text from a trained model: `elastic-moe generate CHECKPOINT --prompt TEXT`.

CHECKPOINT is a run directory, one of its checkpoints, or a Hugging Face directory. The whole model is loaded into this
process, on the GPU where there is one. Keys and values are cached (for latent attention: the latents), so a token costs
one position.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence

from elastic_moe.data.tokenizer import TextTokenizer
from elastic_moe.errors import UserError
from elastic_moe.model.sampling import generate
from elastic_moe.saved import load_model, open_model


def pieces(shown: str, prompt: Sequence[int], continued: Iterable[int], tokenizer: TextTokenizer) -> Iterator[str]:
    """The text of tokens as they come, after `shown`. A character of several tokens waits for the last of them."""
    tokens, text = list(prompt), shown
    for token in continued:
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    if text.startswith(shown) and text != shown:  # ended within a character
        yield text[len(shown) :]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 and one sentence for what cannot be done."""
    parser = argparse.ArgumentParser(prog="elastic-moe generate", description="Continue a text with a trained model.")
    parser.add_argument("checkpoint", help="a run directory, one of its checkpoints, or a Hugging Face directory")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-tokens", type=_positive, default=128)
    parser.add_argument("--temperature", type=_temperature, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top-p", type=_probability, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest one if not given")
    options = parser.parse_args(arguments)
    try:
        if any("\ud800" <= character <= "\udfff" for character in options.prompt):
            raise UserError("--prompt is not valid UTF-8.")
        saved = open_model(options.checkpoint, options.step)
        if saved.tokenizer is None:
            raise UserError(f"{options.checkpoint} has no tokenizer.json.")
        prompt = saved.tokenizer.encode(options.prompt) or [saved.tokenizer.end_id]
        model = load_model(saved)
    except UserError as error:
        print(f"elastic_moe: {error}", file=sys.stderr)
        return 2
    settings = (options.max_tokens, options.temperature, options.top_p, options.seed, saved.tokenizer.end_id)
    print(options.prompt, end="", flush=True)
    for text in pieces(
        options.prompt, prompt, generate(model, saved.cfg.num_layers, prompt, *settings), saved.tokenizer
    ):
        print(text, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
