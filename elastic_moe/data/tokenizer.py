"""Tokenizers: byte-level BPE trained on the corpus itself, and plain bytes for the smallest runs.

Both are lossless on any text, so that no corpus has unknown tokens, and both have one extra token that ends a
document. Byte-level BPE is GPT-2's (Radford et al. 2019, section 2.2); the implementation is the `tokenizers`
library.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from elastic_moe.errors import UserError

END = "<|end|>"
MIN_BPE_VOCAB = 257  # the 256 bytes and the end token
_BYTES_FORMAT = '{"kind": "bytes"}'


class TextTokenizer(Protocol):
    """What the rest of the program knows of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

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

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        Path(path).write_text(_BYTES_FORMAT, encoding="utf-8")


class BpeTokenizer:
    """Byte-level BPE around a `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: HubTokenizer) -> None:
        self._tokenizer = tokenizer
        # The text of the end token in a corpus is text: it must not end a document.
        self._tokenizer.encode_special_tokens = True
        end_id = tokenizer.token_to_id(END)
        assert end_id is not None, f"tokenizer has no {END} token"
        self._end_id: int = end_id

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Train on the texts. The vocabulary is smaller than asked for when the texts have too few distinct pairs.

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
        return self._tokenizer.get_vocab_size()

    @property
    def end_id(self) -> int:
        return self._end_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def save(self, path: str | Path) -> None:
        self._tokenizer.save(str(path))


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Read a tokenizer written by `save`.

    Raises:
        UserError: the file is missing or is no tokenizer.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        return BytesTokenizer() if text.strip() == _BYTES_FORMAT else BpeTokenizer(HubTokenizer.from_str(text))
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise UserError(f"the tokenizer {path} is damaged; delete its directory and start again") from error
