"""Copies of the run's metrics for Weights & Biases, through Accelerate's tracker layer. The only file that knows
wandb.

Nothing here may stop or delay training: every call of the tracker runs in a daemon thread behind a bounded queue, a
failure is reported once and ends tracking, and closing waits for a bounded time. Without an account wandb writes an
offline run that `wandb sync` can upload later.
"""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import psutil

from elastic_moe.config.schema import TrackingConfig
from elastic_moe.errors import UserError

MAX_QUEUED = 1000
CLOSE_TIMEOUT_S = 20.0
_SERVICE = "wandb-core"
_LOG = logging.getLogger(__name__)


class Backend(Protocol):
    """The part of Accelerate's `GeneralTracker` that is used."""

    def store_init_configuration(self, values: dict) -> Any: ...

    def log(self, values: dict, step: int | None) -> Any: ...

    def finish(self) -> Any: ...


def has_account(environ: Mapping[str, str]) -> bool:
    """Whether wandb has a key: in WANDB_API_KEY, or for its host in the netrc file."""
    if environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    home = Path(environ.get("HOME") or environ.get("USERPROFILE") or Path.home())
    candidates = [Path(environ["NETRC"])] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for path in candidates:
        try:
            if netrc.netrc(str(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def wandb_mode(setting: str, environ: Mapping[str, str]) -> str:
    """What to do: "online", "offline" or "off".

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


def open_wandb(config: TrackingConfig, run_dir: Path, mode: str) -> Backend:
    """Start a wandb run through Accelerate."""
    # Imported here: they take seconds, and this runs in the tracker's thread.
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


class Tracker:
    """Sends metrics to a tracker in the background. No method raises or blocks because of the tracker.

    Args:
        config: which tracker.
        run_dir: the run directory; offline runs are written there.
        run_config: the run's whole configuration, stored with the run.
        on_failure: told once, from another thread, why tracking ended.
        backend: makes the backend, instead of wandb.
        environ: environment variables.

    Raises:
        UserError: `tracking.wandb` is unknown.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: str | Path,
        run_config: Mapping[str, Any],
        on_failure: Callable[[str], None] = _LOG.warning,
        backend: Callable[[], Backend] | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.mode = wandb_mode(config.wandb, environ)
        self.dropped = 0
        self._on_failure, self._failed = on_failure, threading.Event()
        self._jobs: queue.Queue[Callable[[Backend], Any] | None] = queue.Queue(maxsize=MAX_QUEUED)
        self._make = backend or (lambda: open_wandb(config, Path(run_dir), self.mode))
        self._thread: threading.Thread | None = None
        if self.mode != "off":
            self._before = _services()
            values = _flat(run_config)
            self._put(lambda b: b.store_init_configuration(values))
            self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
            self._thread.start()

    @property
    def failed(self) -> bool:
        return self._failed.is_set()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log numbers of a step, those of a list as name/index; other values are left out. Dropped when the tracker cannot keep up."""
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
        for name, items in values.items():
            if isinstance(items, list) and all(isinstance(item, (int, float)) for item in items):
                numbers |= {f"{name}/{index}": item for index, item in enumerate(items)}
        self._put(lambda b: b.log(numbers, step))

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Send what waits and finish. Returns False when the tracker did not finish in time, and was abandoned."""
        if self._thread is None:
            return not self.failed
        deadline = time.monotonic() + timeout_s
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._jobs.put(None, timeout=timeout_s)
            self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive() or self.failed:
            # At exit wandb waits for its service, which may wait for the network for ever.
            for process in _services() - self._before:
                process.kill()
            _hush_lost_connections()
        return not self._thread.is_alive() and not self.failed

    def _put(self, job: Callable[[Backend], Any]) -> None:
        if self.mode == "off" or self.failed:
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self.dropped += 1

    def _run(self) -> None:
        # A shell: whatever a tracker raises, the fault is that tracking ends, and it is reported.
        try:
            backend = self._make()
            while (job := self._jobs.get()) is not None:
                job(backend)
            backend.finish()
        except BaseException as error:  # wandb exits the interpreter on some errors
            self._failed.set()
            try:
                self._on_failure(f"tracking ended: {type(error).__name__}: {error}")
            except Exception:
                _LOG.exception("the report that tracking ended failed")


def _services() -> set[psutil.Process]:
    """Service processes of wandb that this process started."""
    try:
        return {child for child in psutil.Process().children() if child.name().startswith(_SERVICE)}
    except psutil.Error:
        return set()


def _hush_lost_connections() -> None:
    """At exit wandb takes leave of its service, which is gone; its complaint would look like a fault of the run."""
    others = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, ConnectionError):
            others(unraisable)

    sys.unraisablehook = hook


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted keys with plain values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
    return flat
