"""Compares a start with the run that it continues, and writes the run's identity and configuration.

A model of another shape or vocabulary is refused before anything is written and before Ray starts. What changes the
run is told in one sentence and recorded as an event.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from elastic_moe.checkpoint.identity import RunIdentity
from elastic_moe.checkpoint.sweep import sweep
from elastic_moe.config.fingerprint import compare, fingerprint
from elastic_moe.config.saved import read_config
from elastic_moe.config.schema import TrainConfig
from elastic_moe.coordination.identity import IdentityFiles
from elastic_moe.coordination.start import Found
from elastic_moe.data.prepare import Prepared
from elastic_moe.data.shards import file_sha256, token_digest
from elastic_moe.data.tokenizer import load_tokenizer, with_tokenizer
from elastic_moe.errors import UserError
from elastic_moe.metrics.recorder import Recorder
from elastic_moe.run_dir import CONFIG, CONFIGS, START, TOKENIZER


def fingerprint_of(config: TrainConfig, prepared: Prepared) -> dict[str, Any]:
    """Fingerprint of a configuration whose corpus is prepared and whose vocabulary is known."""
    digests = {
        "tokenizer": file_sha256(Path(prepared.tokenizer_path)),
        "data": token_digest(prepared.train_path, prepared.val_path),
    }
    return fingerprint(config, digests)


def changes(found: Found, new: dict[str, Any]) -> tuple[str, ...]:
    """What a start that continues a run changes in it, as `key: old -> new`.

    Raises:
        UserError: the run cannot be continued so.
    """
    comparison = compare(_known_fingerprint(found), new)
    if comparison.impossible:
        raise UserError(
            f"run.dir={found.run_dir} cannot be continued with another model ({'; '.join(comparison.impossible)}): "
            "give the old values, or another run.dir; nothing was changed"
        )
    return comparison.changed


def run_of(found: Found, resume: bool) -> str:
    """The id of the run that a start goes on with or begins; see `begin`."""
    known = found.known if resume else None
    return (known.run if known else "") or RunIdentity.new("").run


def begin(found: Found, resume: bool, run: str, new: dict[str, Any], changed: tuple[str, ...], raw_yaml: str) -> None:
    """Write the identity and the configuration of a start; earlier configurations are kept.

    Args:
        found: contents of the run's directories.
        resume: the run goes on, if there is one.
        run: its id, by `run_of`.
        new: fingerprint of the start.
        changed: what the start changes, told and recorded here.
        raw_yaml: the configuration as the user gave it.
    """
    run_dir = found.run_dir
    known = (found.known if resume else None) or RunIdentity(run)
    first = known.first_checkpoint or (found.newest.step if resume and found.newest else 0)
    identity = replace(known, run=run, first_checkpoint=first, run_dir=str(run_dir), fingerprint=new)
    if resume:
        _sweep(found, run)
    try:
        IdentityFiles(run_dir, found.root, identity).change(identity)
    except OSError as error:
        raise UserError(f"checkpoint.dir={found.root} cannot be written: {error}") from error
    try:
        _write_config(run_dir, raw_yaml)
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot keep the configuration: {error}") from error
    if changed:
        print(f"elastic_moe: note: this start changes the run: {'; '.join(changed)}", file=sys.stderr)
        recorder = Recorder(run_dir)
        recorder.event({"event": "run_changed", "step": recorder.last_step, "changes": list(changed)})
        recorder.close()


def _sweep(found: Found, run: str) -> None:
    """Remove what an earlier start of this run left unfinished, and tell of it."""
    for place in dict.fromkeys((str(found.run_dir), found.root)):
        try:
            swept = sweep(place, run)
        except OSError as error:
            print(f"elastic_moe: note: {place} cannot be searched for unfinished files: {error}", file=sys.stderr)
            continue
        for paths, outcome in ((swept.removed, "removed"), (swept.left, "perhaps still being written, left alone")):
            if paths:
                what = f"{len(paths)} unfinished files or checkpoints in {place} ({paths[0]}, ...)"
                print(f"elastic_moe: note: {what}: {outcome}", file=sys.stderr)


def _known_fingerprint(found: Found) -> dict[str, Any]:
    """Fingerprint of the run; of an older version's run as far as its files tell it."""
    for identity in (found.own, found.of_root):
        if identity is not None and identity.fingerprint:
            return identity.fingerprint
    if found.newest is not None and (known := RunIdentity.of_meta(found.newest.meta).fingerprint):
        return known
    tokenizer = found.run_dir / TOKENIZER
    if not found.has_records or not (found.run_dir / CONFIG).is_file() or not tokenizer.is_file():
        return {}
    try:
        config = read_config(found.run_dir)
        config = replace(config, model=with_tokenizer(config.model, load_tokenizer(tokenizer)))
    except (UserError, OSError):
        return {}  # of a version that is too old to be compared
    return fingerprint(config, {})


def _write_config(run_dir: Path, raw_yaml: str) -> None:
    """Write the newest configuration, and keep it beside those of earlier starts."""
    kept = run_dir / CONFIGS
    kept.mkdir(exist_ok=True)
    current = run_dir / CONFIG
    if current.is_file() and not any(kept.iterdir()):
        (kept / "0000.yaml").write_bytes(current.read_bytes())  # of a version that kept only the newest
    number = max((int(path.stem) for path in kept.glob("[0-9]*.yaml") if path.stem.isdecimal()), default=0) + 1
    facts = json.dumps(_start_facts(), indent=1)
    texts = {kept / f"{number:04d}{START}": facts, kept / f"{number:04d}.yaml": raw_yaml, current: raw_yaml}
    for path, text in texts.items():
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text)
        os.replace(temporary, path)


def _start_facts() -> dict[str, Any]:
    """Command, versions and machine of this start, for the report."""
    program, *arguments = sys.argv or [""]
    ours = Path(program).name in ("train.py", "elastic-moe train", "elastic-moe-train")
    versions = {"python": platform.python_version()}
    for package in ("elastic_moe", "torch", "ray"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "time": time.time(),
        "command": [*(("elastic-moe", "train") if ours else ("python", program)), *arguments],
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
    }
