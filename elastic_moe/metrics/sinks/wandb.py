"""Copies of the run's metrics for Weights & Biases, through Accelerate's tracker layer. The only file that knows wandb.

Without an account wandb writes an offline run, which `wandb sync` can upload later.
"""

from __future__ import annotations

import logging
import netrc
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import psutil

from elastic_moe.config.schema import TrackingConfig
from elastic_moe.errors import UserError
from elastic_moe.metrics.sinks.background import Backend, BackgroundSink

_SERVICE = "wandb-core"  # process that wandb starts
_LOG = logging.getLogger(__name__)


class Tracker(BackgroundSink):
    """Sends metrics to wandb in the background.

    Args:
        config: how to track.
        run_dir: the run directory; offline runs are written there.
        run_config: the run's whole configuration, stored with the run.
        environ: environment variables of the process.
        on_failure: called once, from another thread, with a sentence about why tracking ended.
        backend: opens a backend instead of wandb's.

    Raises:
        UserError: `tracking.wandb` is unknown.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: str | Path,
        run_config: Mapping[str, Any],
        environ: Mapping[str, str],
        on_failure: Callable[[str], None] = _LOG.warning,
        backend: Callable[[], Backend] | None = None,
    ) -> None:
        mode = wandb_mode(config.wandb, environ)
        make = backend or (lambda: open_wandb(config, Path(run_dir), mode))
        self._services_before = set() if mode == "off" else _services()
        super().__init__(None if mode == "off" else make, run_config, on_failure)

    def _abandon(self) -> None:
        """End wandb's service: at exit wandb waits for it, and the service may wait for the network for ever."""
        for process in _services() - self._services_before:
            process.kill()
        _hush_lost_connections()


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


def open_wandb(config: TrackingConfig, run_dir: Path, mode: str) -> Backend:
    """Start a wandb run through Accelerate."""
    # Imported here: they take seconds, and this runs in the sink's thread.
    import wandb
    from accelerate import PartialState
    from accelerate.tracking import WandBTracker

    PartialState(cpu=True)  # Accelerate's logger, which the tracker uses, refuses to work without it
    settings = wandb.Settings(silent=True, console="off", init_timeout=30, disable_git=True, disable_code=True)

    class Wandb(WandBTracker):
        def finish(self) -> None:
            super().finish()
            wandb.teardown()  # its service process ends with the run

    tracker = Wandb(config.project, name=config.name or run_dir.name, dir=str(run_dir), mode=mode, settings=settings)
    tracker.start()
    return tracker


def _services() -> set[psutil.Process]:
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
