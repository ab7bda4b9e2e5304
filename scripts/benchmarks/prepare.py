"""`elastic-moe prepare` against the same tokenizer called directly by all cores; its memory; a kill and a resume.

The corpora are the text of the standard corpus, its files in a random order with names changed in them, until they are
as large as wanted: real text, but not the same text again and again.

- *Speed*: both sides encode the same file with the same trained tokenizer, in turn. The direct side splits the text
  evenly over as many processes as there are processors, calls `encode_batch_fast`, and throws the tokens away: no
  documents, no validation text, no shards, no checksums, nothing that could be resumed. Its start is not counted; that
  of the command is (`command_s`), and a second ratio leaves it out (`prepare_s`: from the first word to the last).
- *Memory*: the peak of all processes of the command together (unique set size) with a small and a large corpus, by the
  byte tokenizer, so that the large one does not take an hour.
- *Kill*: the command is killed by SIGKILL when it has put a third of its parts together, and started again. Bytes are
  compared with those of a preparation that nobody disturbed.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from elastic_moe.config.schema import DataConfig
from elastic_moe.data.corpus import PART_BYTES, list_files
from elastic_moe.data.encoder_pool import usable_cpus
from elastic_moe.data.tokenizer import BpeTokenizer, read_tokenizer_file
from scripts.benchmarks.common import arguments, machine, median, run, say

VOCABULARY = 8192
TRAINED_ON = 4_000_000  # bytes
PIECE = 65536  # characters that the direct side encodes as one text
BATCH = 16
MB = 1e6


def make_corpus(path: Path, size: int, texts: list[str]) -> None:
    """Write a file of about so many bytes."""
    draw, written = random.Random(size), 0
    with path.open("w", encoding="utf-8") as stream:
        while written < size:
            name = f"{draw.randrange(10**6)}"
            text = draw.choice(texts).replace("self", "own" + name[:2]).replace("return", "give" + name[2:])
            stream.write(text)
            written += len(text.encode())


def make_tokenizer(directory: Path, texts: list[str]) -> Path:
    """A trained `tokenizer.json`."""
    chosen, size = [], 0
    for text in texts[::2]:
        chosen.append(text)
        size += len(text)
        if size > TRAINED_ON:
            break
    directory.mkdir()
    BpeTokenizer.train(chosen, VOCABULARY).export(directory)
    return directory


# --- the direct side --------------------------------------------------------------------------------------------------


def encode_share(path: str, tokenizer: str, share: int, shares: int, ready: Any, tokens: Any) -> None:
    """One process of the direct side: encode its share of the text."""
    encode = read_tokenizer_file(tokenizer)._tokenizer.encode_batch_fast
    with open(path, "rb") as stream:
        size = os.path.getsize(path)
        stream.seek(size * share // shares)
        text = stream.read(size * (share + 1) // shares - stream.tell()).decode(errors="replace")
    ready.wait()
    count = 0
    for begin in range(0, len(text), PIECE * BATCH):
        pieces = [text[i : i + PIECE] for i in range(begin, min(begin + PIECE * BATCH, len(text)), PIECE)]
        count += sum(len(one.ids) for one in encode(pieces, add_special_tokens=False))
    tokens.value = count


def direct(path: Path, tokenizer: Path) -> tuple[float, int]:
    """Seconds and tokens of the direct side."""
    cpus, context = usable_cpus(), mp.get_context("spawn")
    ready, tokens = context.Barrier(cpus + 1), [context.Value("q") for _ in range(cpus)]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    workers = [
        context.Process(target=encode_share, args=(str(path), str(tokenizer), share, cpus, ready, tokens[share]))
        for share in range(cpus)
    ]
    for worker in workers:
        worker.start()
    ready.wait()
    begin_s = time.monotonic()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    return time.monotonic() - begin_s, sum(one.value for one in tokens)


# --- the command ------------------------------------------------------------------------------------------------------


class Command:
    """`elastic-moe prepare`. Attributes: seconds in all, seconds of the preparation, peak memory in bytes, digest."""

    def __init__(self, root: Path, name: str, corpus: Path, tokenizer: str) -> None:
        self.cache = root / name / ".cache"
        keys = [f"data.corpus={corpus}", f"data.tokenizer={tokenizer}", f"run.dir={root / name / 'run'}"]
        self._words = [sys.executable, "-m", "elastic_moe.cli.main", "prepare", *keys, "run.log_format=json"]
        self.command_s = self.prepare_s = 0.0
        self.peak_bytes, self.digest, self.summary = 0, "", ""

    def run(self, kill_after: int = 0) -> None:
        """Run it to its end, or kill it when it has put so many parts together.

        Raises:
            CalledProcessError: it failed.
        """
        begin_s = time.monotonic()
        process = subprocess.Popen(self._words, stderr=subprocess.PIPE, text=True)
        watch = threading.Thread(target=self._watch, args=(psutil.Process(process.pid),))
        watch.start()
        while kill_after and process.poll() is None:
            if self.parts() >= kill_after:
                process.kill()
            time.sleep(0.01)
        text = process.communicate()[1]
        watch.join()
        self.command_s = time.monotonic() - begin_s
        if process.returncode == -signal.SIGKILL and kill_after:
            return
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, self._words, stderr=text)
        lines = [json.loads(line) for line in text.splitlines()]
        self.prepare_s = next(line["time"] for line in lines if line["event"] == "prepared") - lines[0]["time"]
        self.digest, self.summary = lines[-1]["digest"], lines[-2]["message"]

    def parts(self) -> int:
        """Parts that are put together."""
        return sum(path.read_bytes().count(b"\n") for path in self.cache.glob(".unfinished-*/parts.jsonl"))

    def _watch(self, process: psutil.Process) -> None:
        """Note the peak of the memory that the command's processes have for themselves."""
        while True:
            try:
                family = [process, *process.children(recursive=True)]
                used = 0
                for one in family:
                    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                        used += one.memory_full_info().uss
                if not used:
                    return
                self.peak_bytes = max(self.peak_bytes, used)
            except psutil.Error:
                return
            time.sleep(0.2)


# --- the benchmark ----------------------------------------------------------------------------------------------------


def measure_speed(root: Path, texts: list[str], size: int, rounds: int) -> dict[str, Any]:
    corpus, tokenizer = root / "speed.txt", make_tokenizer(root / "tokenizer", texts)
    make_corpus(corpus, size, texts)
    size = corpus.stat().st_size
    sides: dict[str, list[float]] = {"direct": [], "command": [], "prepare": []}
    peak = 0
    for number in range(rounds):
        seconds, tokens = direct(corpus, tokenizer)
        sides["direct"].append(size / MB / seconds)
        say(f"direct: {sides['direct'][-1]:.2f} MB/s")
        command = Command(root, f"speed{number}", corpus, str(tokenizer))
        command.run()
        sides["command"].append(size / MB / command.command_s)
        sides["prepare"].append(size / MB / command.prepare_s)
        peak = max(peak, command.peak_bytes)
        say(f"elastic-moe prepare: {sides['command'][-1]:.2f} MB/s, without its start {sides['prepare'][-1]:.2f} MB/s")
    of = {f"{name}_mb_per_s": median(values) for name, values in sides.items()}
    return {
        "corpus_mb": size / MB,
        "tokens": tokens,
        **of,
        "rounds": sides,
        "command_over_direct": of["command_mb_per_s"] / of["direct_mb_per_s"],
        "prepare_over_direct": of["prepare_mb_per_s"] / of["direct_mb_per_s"],
        "peak_mib": peak / 2**20,
    }


def measure_memory(root: Path, texts: list[str], sizes: tuple[int, int]) -> dict[str, Any]:
    found = []
    for size in sizes:
        corpus = root / f"memory{size}.txt"
        make_corpus(corpus, size, texts)
        command = Command(root, f"memory{size}", corpus, "bytes")
        command.run()
        mb = corpus.stat().st_size / MB
        found.append({"corpus_mb": mb, "mb_per_s": mb / command.command_s, "peak_mib": command.peak_bytes / 2**20})
        say(f"{mb:.0f} MB as bytes: {found[-1]['mb_per_s']:.0f} MB/s, at most {found[-1]['peak_mib']:.0f} MiB")
        if size != sizes[0]:
            corpus.unlink()
    return {"corpora": found, "large_over_small": found[1]["peak_mib"] / found[0]["peak_mib"]}


def measure_kill(root: Path, size: int, parts: int) -> dict[str, Any]:
    """The small corpus of `measure_memory` again, with a kill; that one was not disturbed."""
    corpus = root / f"memory{size}.txt"
    whole = Command(root, f"memory{size}", corpus, "bytes")  # has run
    killed = Command(root, "killed", corpus, "bytes")
    killed.run(kill_after=parts)
    kept = killed.parts()
    say(f"killed with {kept} parts put together")
    resumed = Command(root, "killed", corpus, "bytes")
    resumed.run()

    def content(command: Command) -> list[bytes]:
        (directory,) = command.cache.iterdir()
        return [(directory / name).read_bytes() for name in ("train.bin", "val.bin", "train.json", "val.json")]

    return {
        "corpus_mb": corpus.stat().st_size / MB,
        "parts_kept": kept,
        "killed_after_s": killed.command_s,
        "resumed_s": resumed.command_s,
        "equal_to_undisturbed": content(resumed) == content(whole),
    }


def benchmark(speed: int, memory: tuple[int, int], rounds: int) -> dict[str, Any]:
    facts = machine()
    texts = [Path(file.path).read_text(encoding="utf-8", errors="replace") for file in list_files(DataConfig()).files]
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as name:
        root = Path(name)
        result = {
            "benchmark": "prepare",
            "machine": facts,
            "settings": {"vocabulary": VOCABULARY, "rounds": rounds, "part_mib": PART_BYTES >> 20},
            "speed": measure_speed(root, texts, speed, rounds),
            "memory": measure_memory(root, texts, memory),
        }
        parts = max(1, memory[0] // PART_BYTES // 3)
        return result | {"kill": measure_kill(root, memory[0], parts)}


def main() -> int:
    parser = arguments("prepare", "A corpus prepared by the command and by its tokenizer alone; memory; a kill.")
    parser.add_argument("--speed-mb", type=int, default=200, help="corpus of the comparison with the tokenizer alone")
    parser.add_argument("--memory-mb", type=int, nargs=2, default=(200, 2000), help="corpora whose memory is compared")
    parser.add_argument("--rounds", type=int, default=2, help="of the comparison, in turn")
    given = parser.parse_args()
    speed, memory = given.speed_mb, (given.memory_mb[0], given.memory_mb[1])
    if given.quick:
        speed, memory, given.rounds = 20, (60, 120), 1
    sizes = int(speed * MB), (int(memory[0] * MB), int(memory[1] * MB))
    return run(lambda: benchmark(*sizes, given.rounds), given.json)


if __name__ == "__main__":
    sys.exit(main())
