"""One job of a sweep in a process of its own: `python -m elastic_moe.sweep.job FILE PARENT` runs what is in the file.

A crash of one job loses no other. The job and its result travel as pickles in a directory that only this user reads. A
job ends with its launcher, however that ends: on a cluster that goes on, its coordinator then saves the run, as after
the death of any driver (`actors/driver_watcher.py`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from ray.cloudpickle import dumps, loads  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]

from elastic_moe.sweep.register import register
from elastic_moe.sweep.trial import TrialFailed

PR_SET_PDEATHSIG = 1
RESULT = ".result"


class JobProcess:
    """A job that runs.

    Args:
        job: `hydra_context`, `task_function` and `config` for Hydra's `run_job`; `address` of a cluster that the job
            is to join first, or "".
        file: where the job is left; its result is written beside it.
        log: file for what it prints; None: it prints where this process does.
    """

    def __init__(self, job: Mapping[str, Any], file: Path, log: Path | None) -> None:
        self._result = file.with_suffix(RESULT)
        self._result.unlink(missing_ok=True)
        file.write_bytes(dumps({**job, "singletons": Singleton.get_state()}))
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        output = None if log is None else log.open("a")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "elastic_moe.sweep.job", str(file), str(os.getpid())],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # signals come from the launcher only, once each
            )
        finally:
            if output is not None:
                output.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def code(self) -> int | None:
        """Exit code; 128 + signal for one that a signal has ended; None while it runs."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def result(self) -> JobReturn | None:
        """The result of a job that has ended; None if it left none."""
        try:
            found = loads(self._result.read_bytes())
        except Exception:  # noqa: BLE001 - torn, or of a class that this process does not know
            return None
        return found if isinstance(found, JobReturn) else None

    def signal(self, signum: int) -> None:
        """Send a signal, if it still runs."""
        self._process.send_signal(signum)

    def end(self, patience_s: float) -> None:
        """Wait for its end; kill it after so many seconds."""
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _end_with(parent: int) -> None:
    """Let the kernel end this process with its parent."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGKILL)


def _joined(address: str) -> AbstractContextManager[None]:
    if not address:
        return nullcontext()
    from elastic_moe.actors.shared import join

    return join(address)


def _run(job: Mapping[str, Any]) -> JobReturn:
    with _joined(job["address"]):
        return run_job(
            hydra_context=job["hydra_context"],
            task_function=job["task_function"],
            config=job["config"],
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def main(file: Path, parent: int) -> int:
    """Run the job in this file and leave its result, unless the parent ends before. Returns the exit code."""
    _end_with(parent)
    register()
    job = loads(file.read_bytes())
    setup_globals()
    Singleton.set_state(job["singletons"])
    HydraConfig.instance().set_config(job["config"])
    result = _run(job)
    failed = result.status == JobStatus.FAILED
    try:
        data = dumps(result)
        loads(data)
    except Exception:
        if not failed:
            raise
        result.return_value = TrialFailed(repr(result._return_value), 1)
        data = dumps(result)
    new = file.with_suffix(".tmp")
    new.write_bytes(data)
    os.replace(new, file.with_suffix(RESULT))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
