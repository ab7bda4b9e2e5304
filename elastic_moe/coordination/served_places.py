"""Which directories of this node a run's workers may need, and the mark by which a worker knows that it sees one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from elastic_moe.checkpoint.storage import Storage, persistent
from elastic_moe.config.schema import TrainConfig
from elastic_moe.coordination.file_server import Place
from elastic_moe.data.prepare import Prepared
from elastic_moe.run_dir import CHECKPOINTS, WITNESS, checkpoint_root, local_path

CORPUS, MODEL = "corpus", "model"  # besides `run_dir.CHECKPOINTS`


def served_places(config: TrainConfig, prepared: Prepared | None) -> dict[str, Place]:
    """The directories that the coordinator serves, by name: those of them that are on this node."""
    places: dict[str, Place] = {}
    if (root := local_path(checkpoint_root(config))) is not None:
        places[CHECKPOINTS] = Place(str(root), writable=True)
    if prepared is not None:
        places[CORPUS] = Place(str(Path(prepared.train_path).parent))
    if config.model.init_from:
        places[MODEL] = Place(str(Path(config.model.init_from).expanduser().absolute()))
    return places


def witness(root: str, token: str, write: bool) -> str:
    """The mark in a local checkpoint root; "" for an object store, which every node sees.

    It follows from the token, and does not tell it. So a coordinator that is started again needs no storage to know it.

    Args:
        root: the checkpoint root.
        token: shared secret of the run.
        write: write it too.

    Raises:
        OSError: it cannot be written.
    """
    if local_path(root) is None:
        return ""
    mark = hashlib.sha256(f"witness {token}".encode()).hexdigest()
    if write:
        persistent(lambda: Storage(root).write(WITNESS, mark.encode()))
    return mark


def sees(root: str, mark: str) -> bool:
    """Whether this node's files below a checkpoint root are those in which the coordinator has left its mark.

    A storage that cannot be read now is not absent: it counts as seen, and whoever reads a checkpoint waits for it.
    """
    if not mark:
        return True
    try:
        return Storage(root).read(WITNESS) == mark.encode()
    except FileNotFoundError:
        return False
    except OSError:
        return True
