"""A process that encodes parts of a corpus: `python -m elastic_moe.data.encoder`. `encoder_pool.py` starts it.

Each line of its standard input is a job, each line of its standard output an answer, all in JSON: the first job is the
settings; each further one is a part, and what to do with it. Answers tell how many bytes are done, or just that it
lives, and at the end the record of the part, or what is wrong. It ends when its input does, in the middle of a part
too, so it never outlives whoever started it. A plain process is used, since those of `multiprocessing` run the user's
main module again.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from elastic_moe.data.dedup import write_prints
from elastic_moe.data.encode import EncodeSettings, encode_part
from elastic_moe.data.source_file import Part
from elastic_moe.data.tokenizer import TOKENIZER_FILE, TextTokenizer, load_tokenizer
from elastic_moe.errors import UserError

ENCODE, PRINTS = "encode", "prints"
TELL_S = 0.5  # seconds between two answers about what is done


class Encoder:
    """Does one job after another. `answer` takes what is to be told."""

    def __init__(self, settings: EncodeSettings, answer: Callable[[dict[str, Any]], object]) -> None:
        self._settings, self._answer, self._told_s = settings, answer, 0.0
        self._tokenizer: TextTokenizer | None = None

    def do(self, job: dict[str, Any]) -> None:
        """Do a job, and answer."""
        part = Part.from_json(job["part"])
        try:
            self._answer({"record": self._record(job["do"], part)})
        except UserError as error:
            self._answer({"user_error": str(error)})
        except OSError as error:
            self._answer({"os_error": [error.errno, error.strerror or str(error)]})
        except Exception:  # noqa: BLE001 - whoever started this process raises it there
            self._answer({"failed": traceback.format_exc()})

    def _record(self, what: str, part: Part) -> dict[str, Any]:
        if what == PRINTS:
            write_prints(part, self._settings, self._tell)
            return {}
        self._tokenizer = self._tokenizer or load_tokenizer(Path(self._settings.directory) / TOKENIZER_FILE)
        return encode_part(part, self._settings, self._tokenizer, self._tell).to_json()

    def _tell(self, done: int) -> None:
        if time.monotonic() - self._told_s >= TELL_S:
            self._told_s = time.monotonic()
            self._answer({"done": done})


def _read(jobs: queue.SimpleQueue[dict[str, Any]], stream: TextIO) -> None:
    """Take jobs until there are no more, and end this process then."""
    for line in stream:
        jobs.put(json.loads(line))
    os._exit(0)


def main(beat_s: float) -> None:
    """Answer jobs for ever, with a sign of life every so many seconds."""
    answers, lock = os.fdopen(os.dup(1), "w", encoding="utf-8"), threading.Lock()
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(value: dict[str, Any]) -> None:
        with lock:
            answers.write(json.dumps(value) + "\n")
            answers.flush()

    def beat() -> None:
        with suppress(OSError):
            while True:
                time.sleep(beat_s)
                answer({"alive": True})

    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(jobs, sys.stdin), daemon=True).start()
    threading.Thread(target=beat, daemon=True).start()
    encoder = Encoder(EncodeSettings(**jobs.get()), answer)
    try:
        while True:
            encoder.do(jobs.get())
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main(float(sys.argv[1]))
