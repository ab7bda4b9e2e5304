"""What `generate` prints: characters as soon as they are whole, and all of the text in the end."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.cli.generate import main, pieces
from elastic_moe.config.schema import ModelConfig
from elastic_moe.data.tokenizer import BytesTokenizer
from elastic_moe.errors import UserError
from elastic_moe.saved import SavedModel, load_model


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


def test_a_prompt_that_is_not_utf_8_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere", "--prompt", b"caf\xe9".decode(errors="surrogateescape")]) == 2
    assert capsys.readouterr().err == "elastic_moe: --prompt is not valid UTF-8.\n"


def test_weights_that_are_not_finite_are_a_sentence() -> None:
    cfg = ModelConfig(vocab_size=8, hidden_size=8, num_layers=2, num_experts=2, experts_per_token=1)
    saved = SavedModel(cfg, lambda spec: torch.full(spec.shape, float("nan")), None, 8, "step 1 of x")
    with pytest.raises(UserError, match=r"step 1 of x: .* has values that are not finite"):
        load_model(saved)
