"""Duplicates: which documents are left out, and that it does not depend on parts or processes."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_moe.config.schema import DataConfig
from elastic_moe.data.dedup import BANDS, ROWS, first_of_each, near_prints
from elastic_moe.data.prepare import Prepared, prepare

WORDS = [f"word{i}" for i in range(5000)]


def text(rng: random.Random, length: int = 120) -> str:
    return " ".join(rng.choices(WORDS, k=length))


def changed(rng: random.Random, one: str, count: int) -> str:
    """A text with so many of its words replaced."""
    words = one.split()
    for place in rng.sample(range(len(words)), count):
        words[place] = "other"
    return " ".join(words)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    return path


def prepared_of(corpus: Path, cache: Path, **changes: Any) -> Prepared:
    values = {"corpus": str(corpus), "tokenizer": "bytes", "seq_len": 16, "val_fraction": 0.1, "processes": 2}
    return prepare(DataConfig(**(values | changes)), cache)


def documents_of(prepared: Prepared) -> list[str]:
    found: list[str] = []
    for shard in (prepared.train, prepared.val):
        tokens, _ = shard.batch(range(shard.num_samples(1)), 1)
        found += bytes(i if i < 256 else 0 for i in tokens[:, 0].tolist()).decode().split("\0")
    return found


@pytest.mark.parametrize("part_bytes", [1 << 24, 30_000])
def test_exact_duplicates(part_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_moe.data.corpus.PART_BYTES", part_bytes)
    monkeypatch.setattr("elastic_moe.data.corpus.WHOLE_BYTES", 0)
    rng = random.Random(1)
    own = [text(rng) for _ in range(300)]
    texts = own + [changed(rng, one, 1) for one in own[:20]] + own[:100] + own[:50]
    corpus = write(tmp_path / "a.jsonl", texts)
    prepared = prepared_of(corpus, tmp_path / "a", dedup="exact")
    assert "320 documents, 150 duplicates left out" in prepared.summary
    assert sorted(set(documents_of(prepared)) - {""}) == sorted(texts[:320])
    one = prepared_of(corpus, tmp_path / "b", dedup="exact", processes=1)
    assert one.digest == prepared.digest
    alone = prepared_of(write(tmp_path / "a.jsonl", texts[:320]), tmp_path / "c")
    assert sorted(documents_of(alone)) == sorted(documents_of(prepared))


def test_near_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_moe.data.corpus.PART_BYTES", 30_000)
    monkeypatch.setattr("elastic_moe.data.corpus.WHOLE_BYTES", 0)
    rng = random.Random(2)
    own = [text(rng) for _ in range(200)]
    near = [changed(rng, one, 1).upper() for one in own]  # 5 of 116 shingles differ: 0.92 are shared
    far = [changed(rng, one, 30) for one in own[:50]]  # fewer than half are shared
    prepared = prepared_of(write(tmp_path / "a.jsonl", own + near + far), tmp_path / "a", dedup="near")
    kept = set(documents_of(prepared))
    assert len(set(own) - kept) <= 1  # the last document lies in no sample of one token
    assert len(kept & set(near)) <= 2
    assert len(kept & set(far)) >= 48


def test_how_often_two_texts_meet() -> None:
    """Against the formula 1 - (1 - s^8)^14, for shares s of the shingles."""
    rng = random.Random(3)
    for count, low, high in ((0, 1, 1), (1, 0.99, 1), (5, 0.6, 0.95), (12, 0.0, 0.3), (60, 0.0, 0.0)):
        met, expected = 0, 0.0
        for _ in range(100):
            one = text(rng, 200)
            other = changed(rng, one, count)
            shingles = [{tuple(t.split()[i : i + 5]) for i in range(196)} for t in (one, other)]
            share = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
            expected += (1 - (1 - share**ROWS) ** BANDS) / 100
            met += bool((near_prints(io.StringIO(one))[0] == near_prints(io.StringIO(other))[0]).any())
        assert low <= met / 100 <= high
        assert met / 100 == pytest.approx(expected, abs=0.15)


def test_short_texts() -> None:
    prints = [near_prints(io.StringIO(one))[0].tolist() for one in ("", "one", "one two", "ONE  two\n", "two one")]
    assert prints[2] == prints[3]
    assert len({tuple(one) for one in prints}) == 4


@pytest.mark.parametrize("seed", range(20))
def test_connected_documents_are_one_cluster(seed: int) -> None:
    """Against a search that follows every connection."""
    rng = np.random.default_rng(seed)
    bands = [rng.integers(0, 25, 40, dtype=np.uint64) for _ in range(3)]
    seen: set[int] = set()
    first = []
    for start in range(40):
        first.append(start not in seen)
        waiting = [start] if start not in seen else []
        while waiting:
            one = waiting.pop()
            seen.add(one)
            waiting += [o for o in range(40) if o not in seen and any(band[o] == band[one] for band in bands)]
    assert first_of_each(bands).tolist() == first


def test_no_documents() -> None:
    assert first_of_each([np.zeros(0, np.uint64)]).tolist() == []
