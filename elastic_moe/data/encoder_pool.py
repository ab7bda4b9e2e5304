"""Encodes the parts of a corpus in several processes, and gives their records in the order of the parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from elastic_moe.data.encode import EncodeSettings
from elastic_moe.data.source_file import Part
from elastic_moe.errors import UserError

POLL_S = 0.5
SILENT_S = 120.0  # a process that gives no sign of life for so long, since somebody has stopped it, is ended
BEATS = 24  # signs of life that have to fail for that
MOST_DEATHS = 2  # of processes that encode one part
_ENDED_S = 5.0


def usable_cpus() -> int:
    """Processors that this process may use, as its affinity and the limit of its control group allow."""
    usable = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        usable = min(usable, max(1, round(int(quota) / int(period))))
    return usable


class EncoderPool:
    """Some processes that encode. Use as a context manager: none of them outlives it.

    Args:
        settings: what they encode with.
        processes: their number at most.
        word: is told what happens to them, by the thread that reads the records.
    """

    def __init__(
        self, settings: EncodeSettings, processes: int, word: Callable[[str], object] = lambda _: None
    ) -> None:
        self._settings, self._own, self._word = settings, threading.local(), word
        self._words = deque[str]()
        self._heard_s, self._silent = dict[subprocess.Popen[str], float](), set[int]()  # of busy ones; process ids
        self._looked_s = time.monotonic()
        self._processes: list[subprocess.Popen[str]] = []
        self._finished, self._under_way = 0, dict[int, int]()  # bytes of source; of each part that is not finished
        self._lock, self._ended = threading.Lock(), False
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="encoder")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self._ended = True
            processes = list(self._processes)
        for process in processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in processes:
            _close(process)

    def records(self, what: str, parts: Sequence[Part], told: Callable[[int], object]) -> Generator[dict[str, Any]]:
        """Do a job for each part.

        Args:
            what: the job, as `encoder.py` names it.
            parts: of the corpus.
            told: is told again and again how many bytes of source are done, by the thread that reads the records.

        Yields:
            The answers, in the order of the parts.

        Raises:
            UserError: a file cannot be read, or has no text where it should.
            OSError: the working directory cannot be written.
        """
        self._finished, self._looked_s = 0, time.monotonic()
        waiting = deque(self._threads.submit(self._do, what, part) for part in parts)
        while waiting:
            record = self._result(waiting.popleft(), told)
            self._tell()
            told(self._done())
            yield record

    def _done(self) -> int:
        """Bytes of source that are done."""
        with self._lock:
            return self._finished + sum(self._under_way.values())

    def _result(self, future: Future[dict[str, Any]], told: Callable[[int], object]) -> dict[str, Any]:
        while True:
            try:
                return future.result(POLL_S)
            except NotYet:
                if future.done():
                    raise
                self._watch()
                told(self._done())

    def _watch(self) -> None:
        """End processes that give no sign of life, and tell of those that are replaced."""
        now_s = time.monotonic()
        with self._lock:
            if now_s - self._looked_s > 10 * POLL_S:  # this process was stopped itself, and has not heard
                self._heard_s = dict.fromkeys(self._heard_s, now_s)
            self._looked_s = now_s
            for process, heard_s in self._heard_s.items():
                if now_s - heard_s > SILENT_S:
                    self._silent.add(process.pid)
                    process.kill()
        self._tell()

    def _tell(self) -> None:
        while self._words:
            self._word(self._words.popleft())

    def _do(self, what: str, part: Part) -> dict[str, Any]:
        """Let this thread's process do a job; a process that dies is replaced."""
        died = ""
        for _ in range(MOST_DEATHS):
            process = self._process()
            answer = self._ask(process, what, part)
            if answer is not None:
                return _record_of(answer)
            died = self._death(process)
            del self._own.process
            if not self._ended:
                self._words.append(f"a process that encodes {part.files[0].path} has died ({died}) and is replaced")
        raise UserError(
            f"data.corpus: a process that encodes {part.files[0].path} has died twice ({died}); where memory is short, "
            "fewer of them take less (data.processes)."
        )

    def _death(self, process: subprocess.Popen[str]) -> str:
        """What a process has died of; one that is broken and lives is ended."""
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDED_S)
        process.kill()
        code = process.wait()
        if process.pid in self._silent:
            return f"no sign of life for {SILENT_S:g} s"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _ask(self, process: subprocess.Popen[str], what: str, part: Part) -> dict[str, Any] | None:
        """The last answer of a process to a job; None if it has died."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            self._hear(process)
            process.stdin.write(json.dumps({"do": what, "part": part.to_json()}) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                answer: dict[str, Any] = json.loads(line)
                self._hear(process)
                with self._lock:
                    if "done" in answer:
                        self._under_way[part.number] = min(int(answer["done"]), part.weight)
                    elif "alive" not in answer:
                        self._under_way.pop(part.number, None)
                        self._finished += part.weight
                        return answer
        except (OSError, ValueError):  # a half line of a process that was killed
            pass
        finally:
            with self._lock:
                self._heard_s.pop(process, None)
        return None

    def _hear(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._heard_s[process] = time.monotonic()

    def _process(self) -> subprocess.Popen[str]:
        """The process of this thread, which is started if there is none."""
        process: subprocess.Popen[str] | None = getattr(self._own, "process", None)
        if process is not None:
            return process
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        with self._lock:
            if self._ended:
                raise UserError("the preparation of the corpus was ended.")
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "elastic_moe.data.encoder", str(SILENT_S / BEATS)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
                start_new_session=True,  # Ctrl-C is for this process, which ends that one
            )  # fmt: skip
            self._processes.append(process)
        self._own.process = process
        assert process.stdin is not None
        with suppress(OSError):  # of a process that has died; it is seen when it is asked
            process.stdin.write(json.dumps(asdict(self._settings)) + "\n")
        return process


def _record_of(answer: dict[str, Any]) -> dict[str, Any]:
    """The record in an answer; its error is raised here."""
    if "user_error" in answer:
        raise UserError(answer["user_error"])
    if "os_error" in answer:
        raise OSError(*answer["os_error"])
    if "failed" in answer:
        raise RuntimeError(f"a process that encodes has failed:\n{answer['failed']}")
    record: dict[str, Any] = answer["record"]
    return record


def _close(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):
            assert stream is not None
            stream.close()
    process.wait(_ENDED_S)
