"""Copies of the run's metrics for Weights & Biases, through Accelerate's tracker layer. The only file that knows wandb.

Without an account wandb writes an offline run, which `wandb sync` can upload later.
"""

from __future__ import annotations

import netrc
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import psutil

from elastic_moe.config.schema import TrackingConfig
from elastic_moe.errors import UserError
from elastic_moe.metrics.sinks.background import Backend
from elastic_moe.metrics.sinks.marks import Mark

_SERVICE = "wandb-core"  # process that wandb starts


def wandb_mode(setting: str, environ: Mapping[str, str]) -> str:
    """The mode of tracking: "online", "offline" or "off".

    Args:
        setting: `tracking.wandb`.
        environ: environment variables; in "auto", WANDB_MODE is obeyed.

    Raises:
        UserError: the setting is unknown.
    """
    if setting not in ("auto", "online", "offline", "off"):
        raise UserError(f'tracking.wandb={setting} is unknown; use "auto", "online", "offline" or "off"')
    if setting == "auto":
        asked = environ.get("WANDB_MODE", "").lower()
        if asked in ("disabled", "off") or environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
            return "off"
        setting = "offline" if asked in ("offline", "dryrun") else "online"
    # Online without a key would ask for one at the terminal.
    return "offline" if setting == "online" and not has_account(environ) else setting


def has_account(environ: Mapping[str, str]) -> bool:
    """Whether wandb has a key: in WANDB_API_KEY, or for its host in the netrc file."""
    if environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    home = Path(environ.get("HOME") or environ.get("USERPROFILE") or Path.home())
    candidates = [Path(environ["NETRC"])] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    return any(_has_entry(path, host) for path in candidates)


def _has_entry(path: Path, host: str) -> bool:
    """Whether a netrc file names the host; a file that cannot be read does not."""
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def open_wandb(config: TrackingConfig, run_dir: Path, mode: str, mark: Mark) -> Backend:
    """Begin a run in wandb through Accelerate, or go on with the one of the start before.

    Offline, each start has a directory of its own, all with the same id: `wandb sync` makes one run of them.

    Args:
        config: how to track.
        run_dir: the run directory; offline runs are written there.
        mode: "online" or "offline".
        mark: what the start before has sent.
    """
    # Imported here: they take seconds, and this runs in the sink's thread.
    import wandb
    from accelerate import PartialState
    from accelerate.tracking import WandBTracker

    PartialState(cpu=True)  # Accelerate's logger, which the tracker uses, refuses to work without it
    settings = wandb.Settings(silent=True, console="off", init_timeout=30, disable_git=True, disable_code=True)
    run = mark.run_id or secrets.token_hex(8)

    class Wandb(WandBTracker):
        replaces, run_id = False, run

        def flush(self) -> None:
            """wandb's service has what was logged, and outlives this process."""

        def finish(self) -> None:
            super().finish()
            wandb.teardown()  # its service process ends with the run

    tracker = Wandb(
        config.project,
        id=run,
        resume="allow",
        name=config.name or run_dir.name,
        group=config.group or None,
        dir=str(run_dir),
        mode=mode,
        settings=settings,
    )
    tracker.start()
    return tracker


def end_services(before: set[psutil.Process]) -> None:
    """End the services that came since: at exit wandb waits for its own, which may wait for the network for ever.

    Args:
        before: services that are to stay.
    """
    for process in services() - before:
        process.kill()
    _hush_lost_connections()


def services() -> set[psutil.Process]:
    """Service processes of wandb that this process started."""
    try:
        return {child for child in psutil.Process().children() if child.name().startswith(_SERVICE)}
    except psutil.Error:
        return set()


def _hush_lost_connections() -> None:
    """Keep wandb quiet at exit: its report that the ended service is lost would look like a fault of the run."""
    others = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, ConnectionError):
            others(unraisable)

    sys.unraisablehook = hook
