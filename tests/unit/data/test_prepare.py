"""Preparation is idempotent, atomic, complete, and names the key of what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_moe.config.schema import DataConfig
from elastic_moe.data.corpus import list_files
from elastic_moe.data.pieces import Piece, ValidationSplit, read_pieces
from elastic_moe.data.prepare import Prepared, default_cache_root, prepare
from elastic_moe.data.shards import TokenShard
from elastic_moe.data.tokenizer import load_tokenizer
from elastic_moe.errors import UserError

LINES = [f"line {i} of a small corpus\n" for i in range(2000)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("".join(LINES))
    return path


def config_of(corpus: Path | str, **changes: object) -> DataConfig:
    values = {"corpus": str(corpus), "tokenizer": "bytes", "seq_len": 32, "val_fraction": 0.1} | changes
    return DataConfig(**values)  # type: ignore[arg-type]


def text_of(prepared: Prepared, shard: TokenShard) -> str:
    tokens, targets = shard.batch(range(shard.num_samples(1)), 1)
    ids = [*tokens[:, 0].tolist(), int(targets[-1, 0])]
    return load_tokenizer(prepared.tokenizer_path).decode(ids)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_line_is_in_exactly_one_shard(corpus: Path, tmp_path: Path, tokenizer: str) -> None:
    prepared = prepare(config_of(corpus, tokenizer=tokenizer, vocab_size=300), tmp_path / "cache")
    train, val = (text_of(prepared, shard).splitlines() for shard in (prepared.train, prepared.val))
    assert sorted(train + val) == sorted(line.rstrip("\n") for line in LINES)
    assert 0.05 < len(val) / len(LINES) < 0.15
    positions = [int(line.split()[1]) for line in val]
    assert min(positions) < 500  # from all parts of the corpus
    assert max(positions) > 1500


def test_second_call_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    first = prepare(config_of(corpus), tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert prepare(config_of(corpus, seq_len=64), tmp_path / "cache") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(first.train_path).parent.name]


def test_changed_corpus_is_prepared_anew(corpus: Path, tmp_path: Path) -> None:
    first = prepare(config_of(corpus), tmp_path / "cache")
    corpus.write_text("".join(LINES) + "one more\n")
    assert prepare(config_of(corpus), tmp_path / "cache") != first


@pytest.mark.parametrize("name", ["train.bin", "val.json", "tokenizer.json"])
def test_damaged_cache_is_rebuilt(corpus: Path, tmp_path: Path, name: str) -> None:
    prepared = prepare(config_of(corpus), tmp_path / "cache")
    good = Path(prepared.train_path).read_bytes()
    path = Path(prepared.train_path).parent / name
    path.write_bytes(path.read_bytes()[:-3])
    assert prepare(config_of(corpus), tmp_path / "cache") == prepared
    assert Path(prepared.train_path).read_bytes() == good
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_failed_preparation_leaves_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("elastic_moe.data.encode.TokenShardWriter.append", full)
        with pytest.raises(UserError, match="No space left"):
            prepare(config_of(corpus), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert prepare(config_of(corpus), tmp_path / "cache").vocab_size == 257


def test_directory_with_pattern_skips_binary_files(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    (root / "sub").mkdir(parents=True)
    (root / "b.md").write_text("b" * 3000)
    (root / "sub" / "a.md").write_text("a" * 3000)
    (root / "c.txt").write_text("c" * 3000)
    (root / "d.md").write_bytes(b"\0\1\2")
    assert [file.name for file in list_files(config_of(root, pattern="*.md")).files] == ["b.md", "sub/a.md"]


def test_max_bytes_bounds_the_text(corpus: Path) -> None:
    config = config_of(corpus, max_bytes=5000)
    text = "".join(piece.text for piece in read_pieces(list_files(config).files, config.max_bytes, 700))
    assert 5000 - 1 <= len(text) < 5100
    assert "".join(LINES).startswith(text)


def test_stdlib_is_python_source_without_tests() -> None:
    files = list_files(DataConfig(max_bytes=0)).files
    names = [file.name for file in files]
    assert "asyncio/events.py" in names
    assert names == sorted(names)
    assert not any("site-packages" in name or "test" in name.split("/")[:-1] for name in names)
    assert sum(file.size for file in files) > 2_000_000


def test_dealer_keeps_the_fraction() -> None:
    split = ValidationSplit(0.1)
    dealt = [split.is_val(Piece("x" * 10, ends=True)) for _ in range(1000)]
    assert abs(sum(dealt) - 100) <= 1
    assert not dealt[0]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"corpus": "/nonexistent/corpus"}, "data.corpus"),
        ({"tokenizer": "words"}, "data.tokenizer"),
        ({"val_fraction": 0.0}, "data.val_fraction"),
        ({"seq_len": 1_000_000}, "data.corpus"),
        ({"seq_len": 20_000}, "data.val_fraction"),
    ],
)
def test_bad_configuration_names_its_key(corpus: Path, tmp_path: Path, changes: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=key):
        prepare(config_of(**({"corpus": corpus} | changes)), tmp_path / "cache")  # type: ignore[arg-type]


def test_empty_corpora(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"data\.pattern"):
        prepare(config_of(empty), tmp_path / "cache")
    (empty / "nothing.txt").touch()
    with pytest.raises(UserError, match=r"data\.corpus"):
        prepare(config_of(empty), tmp_path / "cache")


def test_cache_root(tmp_path: Path) -> None:
    assert default_cache_root(DataConfig(), tmp_path / "runs" / "a") == tmp_path / "runs" / ".cache"
    assert default_cache_root(DataConfig(cache_dir=str(tmp_path)), "x") == tmp_path
