"""Tokenizers: byte-level BPE, trained on the corpus or read from a file, and plain bytes for the smallest runs.

Both are lossless on every text, so no corpus has unknown tokens. Both have one extra token that ends a document. Tokens
of another trainer may have no tokenizer here: then their ids are all that is known.
Byte-level BPE is that of GPT-2 (Radford et al. 2019, section 2.2), as implemented in the `tokenizers` library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HubTokenizer

from elastic_moe.config.schema import ModelConfig
from elastic_moe.errors import UserError

END = "<|end|>"
TOKENIZER_FILE = "tokenizer.json"  # beside a model of Hugging Face, and in the cache of prepared corpora
MIN_BPE_VOCAB = 257  # the 256 bytes and the end token
USUAL_ENDS = ("<|endoftext|>", "<｜end▁of▁sentence｜>", "<|im_end|>", "</s>", "<eos>")
KINDS = ("bpe", "bytes", "ids")  # values of data.tokenizer that are no path
_BYTES_FORMAT = '{"kind": "bytes"}'


class TextTokenizer(Protocol):
    """Interface of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """As `encode_batch`, in arrays of a type that holds the vocabulary."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def save(self, path: str | Path) -> None: ...


class BytesTokenizer:
    """UTF-8 bytes as tokens 0 to 255; 256 ends a document."""

    vocab_size = 257
    end_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        Path(path).write_text(_BYTES_FORMAT, encoding="utf-8")


class IdsTokenizer:
    """Ids without a meaning, 0 to `vocab_size` - 1. As text they are numbers with spaces between them; none ends."""

    end_id = -1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split() if word.isdecimal() and int(word) < self.vocab_size] or [0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        return [np.array(self.encode(text), np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps({"kind": "ids", "vocab_size": self.vocab_size}), encoding="utf-8")


class BpeTokenizer:
    """Byte-level BPE around a `tokenizers.Tokenizer`, trained here or taken from another model.

    Args:
        tokenizer: the tokenizer; it must have the token `end`.
        end: text of the token that ends a document.
    """

    def __init__(self, tokenizer: HubTokenizer, end: str = END) -> None:
        self._tokenizer, self._end = tokenizer, end
        # If the corpus contains the end token's text, that text is encoded as text and ends no document.
        self._tokenizer.encode_special_tokens = True
        end_id = tokenizer.token_to_id(end)
        assert end_id is not None, f"tokenizer has no {end} token"
        self._end_id: int = end_id
        tokenizer.no_truncation()  # both may be saved in a file, and would drop text or train on padding
        tokenizer.no_padding()
        self._vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have holes

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Train on the texts. The vocabulary is smaller than `vocab_size` if the texts have too few distinct pairs.

        Raises:
            UserError: the vocabulary cannot hold all bytes.
        """
        if vocab_size < MIN_BPE_VOCAB:
            raise UserError(
                f"data.vocab_size={vocab_size} is too small for byte-level BPE; use at least {MIN_BPE_VOCAB}"
            )
        tokenizer = HubTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer=trainer)
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def end_id(self) -> int:
        return self._end_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self._encoded(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        return [np.array(one.ids, np.uint32) for one in self._encoded(texts)]

    def _encoded(self, texts: Sequence[str]) -> list[Encoding]:
        try:
            return self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception, where it has no token for what it does not know
            raise UserError(f"data.tokenizer cannot encode some of the text: {error}") from error

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def save(self, path: str | Path) -> None:
        text = self._tokenizer.to_str(pretty=True)  # its own `save` raises no OSError
        if self._end != END:
            text = json.dumps({"kind": "hub", "end": self._end, "tokenizer": self._tokenizer.to_str()})
        Path(path).write_text(text, encoding="utf-8")

    def export(self, directory: Path) -> None:
        """Write the files from which `transformers` makes a tokenizer."""
        self._tokenizer.save(str(directory / TOKENIZER_FILE))
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._end}
        (directory / "tokenizer_config.json").write_text(json.dumps(described, indent=1), encoding="utf-8")


def tokenizer_path(path: str | Path) -> Path:
    """The `tokenizer.json` that a path names: itself, or that of a directory, as for `AutoTokenizer`."""
    path = Path(path).expanduser()
    return path / TOKENIZER_FILE if path.is_dir() else path


def read_tokenizer_file(path: str | Path) -> BpeTokenizer:
    """Read a `tokenizer.json` of Hugging Face, or that of a directory.

    The end token is the one that the `tokenizer_config.json` beside it names, or else one of the usual end tokens.

    Raises:
        UserError: the file cannot be read, or no end token is found.
    """
    path = tokenizer_path(path)
    try:
        tokenizer = HubTokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.tokenizer: {path} is not a tokenizer: {reason}") from error
    beside = path.with_name("tokenizer_config.json")
    try:
        named = json.loads(beside.read_text(encoding="utf-8")).get("eos_token") if beside.is_file() else None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"data.tokenizer: {beside} is not a JSON object") from error
    if isinstance(named, dict):
        named = named.get("content")
    for end in (named, END, *USUAL_ENDS):
        if end and isinstance(end, str) and tokenizer.token_to_id(end) is not None:
            return BpeTokenizer(tokenizer, end)
    raise UserError(f"data.tokenizer: {path} has no end-of-text token; name one as eos_token in {beside.name}")


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Read a tokenizer written by `save`.

    Raises:
        UserError: the file is missing or is no tokenizer.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.strip() == _BYTES_FORMAT:
            return BytesTokenizer()
        wrapped = json.loads(text)
        if wrapped.get("kind") == "hub":
            return BpeTokenizer(HubTokenizer.from_str(wrapped["tokenizer"]), wrapped["end"])
        if wrapped.get("kind") == "ids":
            return IdsTokenizer(int(wrapped["vocab_size"]))
        return BpeTokenizer(HubTokenizer.from_str(text))
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise UserError(f"the tokenizer {path} is damaged; delete its directory and start again") from error


def with_tokenizer(cfg: ModelConfig, tokenizer: TextTokenizer) -> ModelConfig:
    """Fill in the vocabulary size and the end token of a model from its tokenizer.

    Raises:
        UserError: the weights to start from have no row for some of the tokenizer's tokens.
    """
    if not cfg.init_from:
        return replace(cfg, vocab_size=tokenizer.vocab_size, end_token=tokenizer.end_id)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(
            f"data.tokenizer has {tokenizer.vocab_size} tokens, and the model of model.init_from has only "
            f"{cfg.vocab_size}: use its own tokenizer.json, or a smaller data.vocab_size."
        )
    return replace(cfg, end_token=tokenizer.end_id)
