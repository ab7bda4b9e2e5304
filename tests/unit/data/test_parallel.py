"""A corpus of many parts: the tokens do not depend on who encodes them, nor on how often that was ended."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_moe.config.schema import DataConfig
from elastic_moe.data import encoder_pool
from elastic_moe.data.corpus import cut_into_parts, list_files
from elastic_moe.data.encoder_pool import EncoderPool
from elastic_moe.data.pieces import read_pieces
from elastic_moe.data.prepare import Prepared, prepare
from elastic_moe.data.shards import TokenShard
from elastic_moe.data.source_file import Part
from elastic_moe.errors import UserError

PART = 40_000
LINES = [f"line {i} of a corpus, {'äöü' * (i % 7)} {i * i}\n" for i in range(12_000)]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_moe.data.corpus.PART_BYTES", PART)
    monkeypatch.setattr("elastic_moe.data.corpus.WHOLE_BYTES", 0)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A long text, short ones, a compressed one, and lines of JSON."""
    root = tmp_path / "texts"
    root.mkdir()
    (root / "long.txt").write_text("".join(LINES))
    for index in range(9):
        (root / f"short{index}.md").write_text(f"document {index}\n" * (500 + index))
    (root / "packed.txt.gz").write_bytes(gzip.compress("".join(LINES[:3000]).encode()))
    lines = [json.dumps({"text": f"{text}second line"}) for text in LINES[:4000]]
    (root / "lines.jsonl").write_text("\n".join(lines) + "\n")
    return root


def config_of(corpus: Path, **changes: Any) -> DataConfig:
    values = {"corpus": str(corpus), "tokenizer": "bytes", "seq_len": 32, "val_fraction": 0.1, "processes": 2}
    return DataConfig(**(values | changes))


def content(prepared: Prepared) -> tuple[bytes, bytes]:
    return Path(prepared.train_path).read_bytes(), Path(prepared.val_path).read_bytes()


def documents_of(shard: TokenShard) -> list[str]:
    tokens, targets = shard.batch(range(shard.num_samples(1)), 1)
    ids = [*tokens[:, 0].tolist(), int(targets[-1, 0])]
    return "".join(map(chr, (i if i < 256 else 0 for i in ids))).encode("latin-1").decode().split("\0")


def parts_of(config: DataConfig) -> list[Part]:
    return cut_into_parts(list_files(config).files, Part(0, (), limit=config.max_bytes))


def test_parts_have_each_line_once_and_in_order(corpus: Path) -> None:
    parts = parts_of(config_of(corpus, pattern="long.txt"))
    assert len(parts) > 10
    pieces = [list(read_pieces(part.files, 0, 700)) for part in parts]
    assert "".join(piece.text for part in pieces for piece in part) == "".join(LINES)
    assert [piece.ends for part in pieces for piece in part].count(True) == 1
    assert pieces[-1][-1].ends


@pytest.mark.parametrize("tail", ["", "\n", "end without a line break"])
def test_a_line_that_is_longer_than_a_part(tail: str, tmp_path: Path) -> None:
    text = "short\n" * 3000 + "x" * (5 * PART // 2) + "\n" + "short\n" * 9000 + tail
    (tmp_path / "a.txt").write_text(text)
    parts = parts_of(config_of(tmp_path))
    read = [list(read_pieces(part.files, 0, 700)) for part in parts]
    assert "".join(piece.text for part in read for piece in part) == text
    assert [piece.ends for part in read for piece in part].count(True) == 1
    assert [] in read, "what lies within the line is no part"


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_tokens_do_not_depend_on_the_processes(corpus: Path, tmp_path: Path, tokenizer: str) -> None:
    config = config_of(corpus, tokenizer=tokenizer, vocab_size=300)
    told: list[tuple[str, int, int]] = []
    first = prepare(config, tmp_path / "a", lambda *values: told.append(values))
    again = prepare(config_of(corpus, tokenizer=tokenizer, vocab_size=300, processes=1), tmp_path / "b")
    assert content(first) == content(again)
    assert first.digest == again.digest
    encoding = [done for what, done, _ in told if what == "encoding"]
    assert encoding == sorted(encoding)
    assert encoding[-1] == told[-1][2] > 10 * PART
    assert {path.name for path in Path(first.train_path).parent.iterdir()} == {
        "train.bin", "train.json", "train.checked", "val.bin", "val.json", "val.checked",
        "tokenizer.json", "corpus.txt", "parts.jsonl", "sample.json",
    }  # fmt: skip


def test_nothing_is_lost(corpus: Path, tmp_path: Path) -> None:
    prepared = prepare(config_of(corpus), tmp_path / "cache")
    train, val = (documents_of(shard) for shard in (prepared.train, prepared.val))
    wanted = [f"{text}second line" for text in LINES[:4000]]
    text = "".join(LINES) + "".join(f"document {i}\n" * (500 + i) for i in range(9)) + "".join(LINES[:3000])
    assert len("".join(train + val)) == len(text) + sum(map(len, wanted))
    assert set(wanted) <= set(train + val)
    assert 0.05 < len(prepared.val) / (len(prepared.val) + len(prepared.train)) < 0.15
    assert "12 files read" in prepared.summary
    assert "4,011 documents" in prepared.summary


def test_a_small_share_for_validation_is_met(corpus: Path, tmp_path: Path) -> None:
    prepared = prepare(config_of(corpus, val_fraction=0.004, pattern="long.txt"), tmp_path / "cache")
    share = len(prepared.val) / (len(prepared.val) + len(prepared.train))
    assert share == pytest.approx(0.004, rel=0.3), "parts of 40 kB have less than a piece each"


@pytest.mark.parametrize("name", ["packed.txt.gz", "*.md", "*"])
@pytest.mark.parametrize("limit", [50_000, 100_001])
def test_a_limit_holds_for_all_parts_together(corpus: Path, tmp_path: Path, name: str, limit: int) -> None:
    for index in range(4):
        (corpus / f"packed{index}.txt.gz").write_bytes(gzip.compress("".join(LINES[:2000]).encode()))
    config = config_of(corpus, pattern=name, max_bytes=limit)
    prepared = prepare(config, tmp_path / "a")
    text = "".join(documents_of(prepared.train) + documents_of(prepared.val))
    available = sum(500 + i for i in range(9)) * len("document 1\n") if name == "*.md" else 1 << 30
    assert min(limit, available) <= len(text) < limit + 6000
    assert content(prepare(config_of(corpus, pattern=name, max_bytes=limit, processes=1), tmp_path / "b")) == content(
        prepared
    )


class Ended(Exception):
    """Stands for the death of the process that prepares."""


def test_an_ended_preparation_goes_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(config_of(corpus), tmp_path / "whole")
    asked: list[int] = []
    do = EncoderPool._do

    def noted(self: EncoderPool, what: str, part: Part) -> Any:
        asked.append(part.number)
        return do(self, what, part)

    monkeypatch.setattr(EncoderPool, "_do", noted)
    append, appended = "elastic_moe.data.assembly.Assembly.append", []

    def ends(self: Any, record: Any, cut: Any = None) -> None:
        appended.append(record.number)
        if len(appended) % 4 == 0:
            raise Ended
        real(self, record, cut)

    from elastic_moe.data.assembly import Assembly

    real = Assembly.append
    monkeypatch.setattr(append, ends)
    for _ in range(20):
        try:
            again = prepare(config_of(corpus), tmp_path / "cache")
            break
        except Ended:
            (left,) = (tmp_path / "cache").iterdir()
            assert left.name.startswith(".unfinished-")
    assert content(again) == content(whole)
    assert len(appended) > len(parts_of(config_of(corpus))), "it was ended on the way"
    assert len(asked) < 2 * len(set(asked)), "what was encoded is not encoded again"


@pytest.mark.parametrize("name", ["train.bin", "part-000007.train", "parts.jsonl"])
def test_damage_in_what_was_left_is_found(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = prepare(config_of(corpus), tmp_path / "whole")
    from elastic_moe.data.assembly import Assembly

    real = Assembly.append

    def ends(self: Any, record: Any, cut: Any = None) -> None:
        if record.number == 6:
            time.sleep(1.0)  # others are encoded meanwhile
            raise Ended
        real(self, record, cut)

    with monkeypatch.context() as patch:
        patch.setattr(Assembly, "append", ends)
        with pytest.raises(Ended):
            prepare(config_of(corpus), tmp_path / "cache")
    (left,) = (tmp_path / "cache").iterdir()
    data = bytearray((left / name).read_bytes())
    data[len(data) // 2] ^= 1
    (left / name).write_bytes(data)
    assert content(prepare(config_of(corpus), tmp_path / "cache")) == content(whole)


def test_a_process_that_dies_is_replaced(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(config_of(corpus), tmp_path / "whole")
    killed: list[int] = []
    ask = EncoderPool._ask

    def kills(self: EncoderPool, process: Any, what: str, part: Part) -> Any:
        if part.number in (3, 8) and part.number not in killed:
            killed.append(part.number)
            process.kill()
        return ask(self, process, what, part)

    monkeypatch.setattr(EncoderPool, "_ask", kills)
    assert content(prepare(config_of(corpus), tmp_path / "cache")) == content(whole)
    assert sorted(killed) == [3, 8]


@pytest.mark.parametrize("often", [1, 2])
def test_a_process_that_is_stopped_is_replaced(
    often: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(config_of(corpus), tmp_path / "whole")
    monkeypatch.setattr(encoder_pool, "SILENT_S", 8.0)
    stopped: list[int] = []
    told: list[str] = []
    ask = EncoderPool._ask

    def stops(self: EncoderPool, process: Any, what: str, part: Part) -> Any:
        if part.number == 3 and len(stopped) < often:
            stopped.append(process.pid)
            os.kill(process.pid, signal.SIGSTOP)
        return ask(self, process, what, part)

    monkeypatch.setattr(EncoderPool, "_ask", stops)
    config, cache = config_of(corpus), tmp_path / "cache"
    if often == 2:
        with pytest.raises(UserError, match=r"has died twice \(no sign of life for 8 s\)"):
            prepare(config, cache, lambda what, *_: told.append(what))
    else:
        assert content(prepare(config, cache, lambda what, *_: told.append(what))) == content(whole)
        assert [text for text in told if "has died (no sign of life for 8 s) and is replaced" in text]
    assert not any(psutil.pid_exists(pid) for pid in stopped)


def test_what_killed_processes_leave_is_deleted(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    def stops(self: Any, record: Any, cut: Any = None) -> None:
        raise Stopped

    from elastic_moe.data.assembly import Assembly

    with monkeypatch.context() as patch:
        patch.setattr(Assembly, "append", stops)
        with pytest.raises(Stopped):
            prepare(config_of(corpus, dedup="exact"), tmp_path / "cache")
    (left,) = (tmp_path / "cache").iterdir()
    (left / ".part-000001.train-12345").write_bytes(b"x")
    (left / "sample.json").write_text("")  # between its making and its content
    (left / "dropped.json").write_text("")
    prepared = prepare(config_of(corpus, dedup="exact"), tmp_path / "cache")
    assert not [path.name for path in Path(prepared.train_path).parent.iterdir() if path.name.startswith(".part")]
    assert content(prepared) == content(prepare(config_of(corpus, dedup="exact"), tmp_path / "whole"))


def test_what_is_told_of_a_corpus_with_a_limit_is_never_below_zero(corpus: Path, tmp_path: Path) -> None:
    told: list[int] = []
    prepare(config_of(corpus, max_bytes=100_000), tmp_path / "cache", lambda _what, done, _total: told.append(done))
    assert min(told) == 0


def test_a_part_that_kills_its_process_is_a_sentence(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = EncoderPool._ask

    def kills(self: EncoderPool, process: Any, what: str, part: Part) -> Any:
        if part.number == 3:
            process.kill()
        return ask(self, process, what, part)

    monkeypatch.setattr(EncoderPool, "_ask", kills)
    with pytest.raises(UserError, match=r"lines\.jsonl has died twice \(SIGKILL\).*data\.processes"):
        prepare(config_of(corpus), tmp_path / "cache")


def test_bad_input_in_a_part_is_a_sentence(corpus: Path, tmp_path: Path) -> None:
    with (corpus / "lines.jsonl").open("a") as stream:
        stream.write('{"body": "no text"}\n')
    with pytest.raises(UserError, match=r"lines\.jsonl:\d+ after byte \d+ has no text under text or content"):
        prepare(config_of(corpus), tmp_path / "cache")


COMMAND = """
import sys
from elastic_moe.data import assembly, corpus
assembly.COMMIT_S = corpus.WHOLE_BYTES = 0
corpus.PART_BYTES = int(sys.argv.pop(1))
from elastic_moe.cli.main import main
raise SystemExit(main())
"""


def test_a_killed_command_goes_on(corpus: Path, tmp_path: Path) -> None:
    """The real command is killed with SIGKILL again and again, and leaves no process behind."""
    words = [f"run.dir={tmp_path}/runs/a", f"data.corpus={corpus}", "data.tokenizer=bytes", "data.val_fraction=0.1"]
    command = [sys.executable, "-c", COMMAND, str(PART // 8), "prepare", *words, "data.processes=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    cache = tmp_path / "runs" / ".cache"

    def progress() -> int:
        return sum(path.read_bytes().count(b"\n") for path in cache.glob(".unfinished-*/parts.jsonl"))

    before = seen = 0
    for _ in range(2):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 60
        while progress() < before + 5 and process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.005)
        encoders = psutil.Process(process.pid).children()
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was killed before its end"
        seen += len(encoders)
        assert not psutil.wait_procs(encoders, timeout=20)[1]
        assert progress() >= before + 5
        before = progress()
    assert seen, "it has had other processes"
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "the tokens are in " in ended.stderr
    (directory,) = cache.iterdir()
    whole = tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elastic_moe.data.corpus.PART_BYTES", PART // 8)
        prepared = prepare(config_of(corpus), whole)
    assert content(prepared) == tuple((directory / name).read_bytes() for name in ("train.bin", "val.bin"))


def test_two_that_prepare_the_same_do_it_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    inner: list[Prepared] = []
    from elastic_moe.data.assembly import Assembly

    real = Assembly.append

    def other(self: Any, record: Any, cut: Any = None) -> None:
        if record.number == 4:
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(PART), "prepare", f"run.dir={tmp_path}/runs/a",
                 f"data.corpus={corpus}", "data.tokenizer=bytes", "data.val_fraction=0.1"],
                env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert process.stderr is not None
            waited.append(process.stderr.readline())
            others.append(process)
        real(self, record, cut)

    others: list[subprocess.Popen[str]] = []
    monkeypatch.setattr(Assembly, "append", other)
    inner.append(prepare(config_of(corpus), tmp_path / "runs" / ".cache"))
    out = others[0].communicate()[1]
    assert "waiting for another process" in waited[0]
    assert f"the tokens are in {Path(inner[0].train_path).parent}" in out
    assert "encoding" not in out
    assert len(list((tmp_path / "runs" / ".cache").iterdir())) == 1


def test_usable_cpus() -> None:
    assert 1 <= encoder_pool.usable_cpus() <= len(os.sched_getaffinity(0))
