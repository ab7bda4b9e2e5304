"""Takes a run that nobody trains back to one of its checkpoints, where `run.resume=auto` then goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from elastic_moe.checkpoint.identity import RunIdentity
from elastic_moe.checkpoint.inventory import COMPLETE, list_checkpoints
from elastic_moe.checkpoint.reader import verify_alone
from elastic_moe.config.saved import read_config
from elastic_moe.coordination.identity import IdentityFiles
from elastic_moe.coordination.lease import confirm, own
from elastic_moe.coordination.start import look
from elastic_moe.errors import UserError
from elastic_moe.run_dir import CONFIG, checkpoint_root


def rewind(place: str | Path, step: int, act: bool = True) -> tuple[int, ...]:
    """Take a run back to the checkpoint of a step. Deletes nothing; nothing changes if it is the newest one.

    Args:
        place: the run directory.
        step: of a complete checkpoint.
        act: do it; else only look.

    Returns:
        The steps of the later checkpoints, which then are abandoned: they go when the run has come as far again.

    Raises:
        UserError: it is no run directory, the run is owned by a process, it has no such checkpoint, or the root holds
            another run's.
        OSError: the checkpoint is damaged, or something cannot be read or written.
    """
    run_dir = Path(place).expanduser().absolute()
    if not (run_dir / CONFIG).is_file():
        raise UserError(f"{place} is no run directory.")
    config = read_config(run_dir)
    config = replace(config, run=replace(config.run, dir=str(run_dir)))  # it may have been moved
    root = checkpoint_root(config)
    with own(run_dir, root) as leases:
        found = look(config)
        if found.of_another_run:
            raise UserError(f"checkpoint.dir={root} holds the checkpoints of another run than {place}")
        complete = {entry.step: entry.manifest for entry in list_checkpoints(root) if entry.state == COMPLETE}
        chosen = complete.get(step)
        if chosen is None:
            there = ", ".join(map(str, complete)) or "none"
            raise UserError(f"{root} has no complete checkpoint of step {step}; it has: {there}")
        later = tuple(other for other in complete if other > step)
        if later and act:
            verify_alone(chosen)
            confirm(leases)
            known = found.known or RunIdentity.of_meta(chosen.meta)
            IdentityFiles(run_dir, root, known).change(known.forked(step, 0))
    return later
