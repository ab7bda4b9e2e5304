"""Tokenizers give every text back, and a text that spells the end token does not end a document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from elastic_moe.data.tokenizer import (
    END,
    BpeTokenizer,
    BytesTokenizer,
    TextTokenizer,
    load_tokenizer,
    read_tokenizer_file,
)
from elastic_moe.errors import UserError

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "class A:\n    pass\n" * 20]
BPE = BpeTokenizer.train(TEXTS, 300)


@pytest.fixture(params=["bpe", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    return BPE if request.param == "bpe" else BytesTokenizer()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bpe_round_trip(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(text: str) -> None:
    assert BytesTokenizer().decode(BytesTokenizer().encode(text)) == text


def test_saved_tokenizer_is_the_same(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    text = f"def g(é):\r\n\treturn '{END}'\0 ☃"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.encode_batch([text, ""]) == [tokenizer.encode(text), []]
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.vocab_size, loaded.end_id) == (tokenizer.vocab_size, tokenizer.end_id)


def test_end_token_only_from_end_id(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(f"a{END}b")
    assert tokenizer.end_id not in ids
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end_id]) == "a"


def test_bpe_learns_and_respects_the_limit() -> None:
    assert 257 < BPE.vocab_size <= 300
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_small_vocabulary_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"data\.vocab_size"):
        BpeTokenizer.train(TEXTS, 100)


@pytest.mark.parametrize("content", [None, "", "{", '{"kind": "other"}'])
def test_damaged_tokenizer_is_a_user_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(path)


def test_another_models_tokenizer(tmp_path: Path) -> None:
    """A tokenizer.json keeps its own end token, on the way into a run directory and out again."""
    source = tmp_path / "source"
    source.mkdir()
    hub = HubTokenizer(models.BPE())
    hub.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hub.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<stop>"], initial_alphabet=alphabet, show_progress=False
    )
    hub.train_from_iterator(["some text, and some more text"] * 5, trainer=trainer)
    hub.save(str(source / "tokenizer.json"))
    with pytest.raises(UserError, match="no end-of-text token"):
        read_tokenizer_file(source / "tokenizer.json")
    (source / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    tokenizer = read_tokenizer_file(source / "tokenizer.json")
    assert tokenizer.end_id == hub.token_to_id("<stop>") == 1
    tokenizer.save(tmp_path / "kept.json")
    again = load_tokenizer(tmp_path / "kept.json")
    assert again.end_id == 1
    assert again.decode(again.encode("some naïve text")) == "some naïve text"
    assert isinstance(again, BpeTokenizer)
    again.export(tmp_path)
    assert read_tokenizer_file(tmp_path / "tokenizer.json").end_id == 1


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        read_tokenizer_file(tmp_path / "tokenizer.json")


def test_truncation_padding_and_holes_of_a_file(tmp_path: Path) -> None:
    """Truncation and padding saved in the file are switched off, and ids may have holes."""
    BpeTokenizer.train(["some text " * 50], 280).save(tmp_path / "tokenizer.json")
    hub = HubTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    hub.enable_truncation(4)
    hub.enable_padding(length=64)
    content = json.loads(hub.to_str())
    content["model"]["vocab"]["unused"] = 1299
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = read_tokenizer_file(tmp_path / "tokenizer.json")
    assert tokenizer.vocab_size == 1300
    text = "some text " * 9
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [len(ids) for ids in tokenizer.encode_batch(["a", text])] == [1, len(tokenizer.encode(text))]
