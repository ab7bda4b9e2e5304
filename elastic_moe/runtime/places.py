"""Where a worker finds the run's files: on its own node, or on that of the coordinator.

Nothing has to be told: the coordinator leaves a mark in the checkpoint root, and a corpus has a digest. A worker that
does not find them reads and writes checkpoints at the coordinator (`checkpoint/served.py`), and keeps a copy of the
corpus, and of the model to begin with, in its user's cache folder. Workers of one node make one copy.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic_moe.checkpoint.local_file import lock
from elastic_moe.checkpoint.served import SCHEME, connect_to
from elastic_moe.checkpoint.storage import Storage, persistent
from elastic_moe.config.schema import TrainConfig
from elastic_moe.control.messages import WelcomeMessage
from elastic_moe.coordination.served_places import CORPUS, MODEL, sees
from elastic_moe.data.prepare import Prepared, digest_of, find_prepared, prepared_in
from elastic_moe.errors import UserError
from elastic_moe.plan.compiled import cache_dir
from elastic_moe.run_dir import CHECKPOINTS, checkpoint_root

PIECE = 1 << 23  # bytes of a file that are read by one call
LOCK_POLL_S = 0.5
TOLD_EVERY_S = 10.0

Tell = Callable[[dict[str, Any]], None]
logger = logging.getLogger(__name__)


def localised(
    config: TrainConfig,
    prepared: Prepared,
    token: str,
    node: str,
    welcome: Callable[[], WelcomeMessage | None],
    tell: Tell,
) -> tuple[TrainConfig, Prepared]:
    """The configuration and the corpus as this worker can reach them.

    Args:
        config, prepared: as they are on the coordinator's node.
        token: shared secret of the run.
        node: of this worker.
        welcome: returns the newest welcome of the coordinator.
        tell: takes events.

    Raises:
        UserError: the corpus that the coordinator serves is damaged.
        OSError: neither it nor this node's storage answers.
    """
    said = welcome()
    if said is None or not said.files[1]:
        return config, prepared
    connect_to(lambda: _address(welcome()), token)
    missing = []
    if not sees(checkpoint_root(config), said.witness):
        config = replace(config, checkpoint=replace(config.checkpoint, dir=f"{SCHEME}{CHECKPOINTS}"))
        missing.append("checkpoint.dir")
    started_s, moved = time.monotonic(), 0
    if _digest(prepared) != (digest := prepared.digest):
        directory = copies_dir() / f"{CORPUS}-{digest[:16]}"
        moved += fetch(CORPUS, directory, lambda copy: _check(copy, digest))
        prepared = prepared_in(directory, prepared.vocab_size)
        missing.append("the corpus")
    if config.model.init_from and not Path(config.model.init_from).expanduser().is_dir():
        listed = _listing_digest(MODEL)
        directory = copies_dir() / f"{MODEL}-{listed}"
        moved += fetch(MODEL, directory, lambda _: _check_unchanged(listed))
        config = replace(config, model=replace(config.model, init_from=str(directory)))
        missing.append("model.init_from")
    if missing:
        copied = f"{moved / 2**20:.1f} MiB copied in {time.monotonic() - started_s:.1f} s"
        reason = (
            f"node {node} does not see {' and '.join(missing)} of the coordinator's node, which serves it; {copied}"
        )
        tell({"event": "files_served", "reason": reason})
    return config, prepared


def copies_dir() -> Path:
    """The folder of this node's copies."""
    plans = cache_dir()
    return (plans.parent if plans.name.startswith("plan-") else plans) / "copies"


def fetch(place: str, directory: Path, check: Callable[[Path], None]) -> int:
    """Copy what the coordinator serves at a place into a directory, unless it is there.

    Args:
        place: name of the served directory; directories in it are left out.
        directory: appears when it is complete.
        check: called with the directory of a new copy; raises if the copy is damaged.

    Returns:
        Bytes that were copied.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        if directory.is_dir():
            return 0
        temporary = directory.with_name(f".{directory.name}-{uuid.uuid4().hex}")
        temporary.mkdir()
        try:
            moved = _copy(place, temporary)
            check(temporary)
            os.rename(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return moved


def _copy(place: str, directory: Path) -> int:
    """Copy the files piece by piece, so that a coordinator that is started again interrupts only one piece."""
    storage = Storage(f"{SCHEME}{place}")
    sizes = persistent(lambda: storage.sizes(""))
    moved, told_s, buffer = 0, time.monotonic(), bytearray(PIECE)
    for name, size in sizes.items():
        with (directory / name).open("wb") as file:
            for start in range(0, size, PIECE):
                piece = memoryview(buffer)[: min(PIECE, size - start)]
                persistent(lambda n=name, s=start, p=piece: storage.read_into(n, [(s, p)]))
                file.write(piece)
                moved += len(piece)
                if time.monotonic() - told_s > TOLD_EVERY_S:
                    told_s = time.monotonic()
                    share = 100 * moved / max(1, sum(sizes.values()))
                    logger.warning("%.0f %% of the %s copied from the coordinator's node", share, place)
    return moved


@contextmanager
def _alone(directory: Path) -> Generator[None]:
    """Only one process of this node makes a copy; the others wait for it, as long as it lives."""
    with directory.with_name(f".{directory.name}.lock").open("w") as file:
        waiting_s = time.monotonic()
        while not lock(file, TOLD_EVERY_S, LOCK_POLL_S):
            waited_s = time.monotonic() - waiting_s
            logger.warning("another worker of this node copies %s, for %.0f s", directory, waited_s)
        yield


def _address(said: WelcomeMessage | None) -> tuple[str, int] | None:
    return None if said is None or not said.files[1] else said.files


def _digest(prepared: Prepared) -> str:
    """Digest of the corpus at these paths on this node; "" if it is not here."""
    try:
        return digest_of(prepared)
    except (OSError, ValueError, KeyError):
        return ""


def _check(copy: Path, digest: str) -> None:
    """Compare a copy's checksums, and its digest with that of the run's corpus."""
    found = find_prepared(copy)
    if found is None or found.digest != digest:
        raise UserError(
            "the corpus that the coordinator serves is damaged, or another start has changed data.cache_dir"
        )


def _check_unchanged(listed: str) -> None:
    if _listing_digest(MODEL) != listed:
        raise UserError("model.init_from was changed on the coordinator's node while this node copied it")


def _listing_digest(place: str) -> str:
    """Short digest of the names, sizes and times of the files at a served place. Weights change without their size."""
    storage = Storage(f"{SCHEME}{place}")
    sizes, entries = persistent(lambda: (storage.sizes(""), storage.entries("")))
    listing = [[entry.name, sizes.get(entry.name), entry.changed_s] for entry in entries if not entry.is_directory]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
