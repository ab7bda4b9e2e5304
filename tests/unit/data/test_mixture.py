"""Several corpora in one preparation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic_moe.config.build import build
from elastic_moe.config.schema import DataConfig
from elastic_moe.data.prepare import prepare
from elastic_moe.data.tokenizer import load_tokenizer
from elastic_moe.errors import UserError


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[str, str]:
    for name, letter, lines in (("a", "a", 4000), ("b", "b", 3000)):
        (tmp_path / name).mkdir()
        for index in range(3):
            (tmp_path / name / f"{index}.txt").write_text(f"{letter * 30}\n" * lines)
    return str(tmp_path / "a"), str(tmp_path / "b")


def config_of(mixture: dict[str, float], **changes: Any) -> DataConfig:
    return DataConfig(**({"mixture": mixture, "tokenizer": "bytes", "seq_len": 16, "val_fraction": 0.1} | changes))


@pytest.mark.parametrize("part_bytes", [0, 40_000])
def test_each_corpus_has_its_span(
    part_bytes: int, corpora: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if part_bytes:
        monkeypatch.setattr("elastic_moe.data.corpus.PART_BYTES", part_bytes)
        monkeypatch.setattr("elastic_moe.data.corpus.WHOLE_BYTES", 0)
    a, b = corpora
    prepared = prepare(config_of({b: 1.0, a: 3.0}), tmp_path / "cache")
    for shard in (prepared.train, prepared.val):
        assert [name for name, _ in shard.spans] == [a, b]
        assert sum(size for _, size in shard.spans) == len(shard)
        first, last = shard.samples(16)
        tokens, _ = shard.batch(range(first + last), 16)
        text = load_tokenizer(prepared.tokenizer_path).decode
        assert set(text(tokens[:first].ravel())) == {"a", "\n"}
        assert set(text(tokens[first:].ravel())) == {"b", "\n"}
    sizes = [size + own for (_, size), (_, own) in zip(prepared.train.spans, prepared.val.spans, strict=True)]
    assert sizes == [3 * (4000 * 31 + 1), 3 * (3000 * 31 + 1)]
    assert "6 files read" in prepared.summary
    other = prepare(config_of({a: 1.0, b: 9.0}), tmp_path / "cache")
    assert other == prepared, "weights and their order are no matter of the tokens"


def test_a_limit_holds_for_each_corpus(
    corpora: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_moe.data.corpus.PART_BYTES", 40_000)
    monkeypatch.setattr("elastic_moe.data.corpus.WHOLE_BYTES", 0)
    prepared = prepare(config_of(dict.fromkeys(corpora, 1.0), max_bytes=100_000), tmp_path / "cache")
    for (_, size), (_, own) in zip(prepared.train.spans, prepared.val.spans, strict=True):
        assert 100_000 <= size + own < 105_000


def test_duplicates_across_corpora_stay_in_the_first(corpora: tuple[str, str], tmp_path: Path) -> None:
    a, b = corpora
    (Path(b) / "9.txt").write_text((Path(a) / "0.txt").read_text())
    prepared = prepare(config_of(dict.fromkeys(corpora, 1.0), dedup="exact"), tmp_path / "cache")
    assert "2 documents, 5 duplicates left out" in prepared.summary


def test_a_corpus_without_validation_text_is_named(corpora: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("few words")
    with pytest.raises(UserError, match=r"data\.mixture: train text of .*c\.txt has 10 tokens, too few"):
        prepare(config_of({corpora[0]: 1.0, str(tmp_path / "c.txt"): 1.0}), tmp_path / "cache")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mixture": {"stdlib": 0.0}}, r"data\.mixture must have weights above 0, not 0\.0 for 'stdlib'"),
        (
            {"mixture": {"stdlib": 1e-7, "/tmp": 1.0}},
            r"shares of at least 9\.53674e-07 each, and 1e-07 for 'std",
        ),
        ({"mixture": {"stdlib": 1e308, "/tmp": 1e308}}, r"data\.mixture must have shares"),
        ({"mixture": {"/tmp": 1.0, "/tmp/../tmp/": 2.0}}, r"names one corpus as /tmp and as /tmp/\.\./tmp/: give it"),
        ({"mixture": {"/no/such": 1.0}}, r"data\.mixture names '/no/such', which does not exist"),
        ({"mixture": {"stdlib": 1.0}, "corpus": "/tmp"}, r"data\.mixture takes the place of data\.corpus"),
    ],
)
def test_bad_mixtures_are_a_sentence(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build({"data": data})
