"""What `generate` prints: characters as soon as they are whole, and all of the text in the end."""

from __future__ import annotations

import pytest

from elastic_moe.cli.generate import pieces
from elastic_moe.data.tokenizer import BytesTokenizer


@pytest.mark.parametrize(
    ("continued", "expected"),
    [
        (b"bc", ["b", "c"]),
        ("b\u20acc".encode(), ["b", "\u20ac", "c"]),
        (b"\xffb", ["\ufffdb"]),
        (b"b\xe2\x82", ["b", "\ufffd"]),
        (b"", []),
    ],
)
def test_pieces(continued: bytes, expected: list[str]) -> None:
    tokenizer = BytesTokenizer()
    assert list(pieces("a", tokenizer.encode("a"), list(continued), tokenizer)) == expected
    assert "a" + "".join(expected) == (b"a" + continued).decode(errors="replace")
