"""`elastic-moe train key=value ...` trains; `-m` runs a sweep; `python -m elastic_moe.train` is the same command.

The command line is composed and checked first (cli/compose.py), and only then handed to Hydra. A bad configuration ends
with exit code 2 and one sentence, before Ray is imported.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elastic_moe.cli.compose import Checked, check_command, one_sentence, register_schema
from elastic_moe.cli.hydra_internals import parse_flags
from elastic_moe.cli.key_help import show_help
from elastic_moe.config.build import build
from elastic_moe.config.reference import config_dir
from elastic_moe.environment import environment
from elastic_moe.errors import UserError, of_storage
from elastic_moe.metrics.report.page import write_report
from elastic_moe.origin import with_origin
from elastic_moe.run_dir import EVENTS, METRICS, make_run_dir
from elastic_moe.sweep.register import register
from elastic_moe.sweep.trial import TrialFailed, objective
from elastic_moe.sweep.values import hydra_values

SIGNALLED = 128  # exit codes from here on: the run was stopped by a signal
FAILED = 1
BASIC, ELASTIC = "BasicLauncher", "ElasticLauncher"
FULL_ERROR = "HYDRA_FULL_ERROR"  # else Hydra prints an error in its own words and ends with 1


def _own_run_dir(config: DictConfig) -> None:
    """Give a job of a sweep directories of its own: the one Hydra made by its number, and a checkpoint root."""
    settings = HydraConfig.get()
    if settings.mode == RunMode.MULTIRUN:
        config.run.dir = f"{settings.sweep.dir}/{settings.sweep.subdir}"
        if config.checkpoint.dir:
            config.checkpoint.dir = f"{config.checkpoint.dir.rstrip('/')}/{settings.sweep.subdir}"


def _run_job(config: DictConfig) -> int:
    _own_run_dir(config)
    run_dir = Path(config.run.dir).expanduser()
    before = _records(run_dir)
    try:
        config = with_origin(config)
        built = build(config)
        from elastic_moe.actors.driver import launch  # Ray is imported here, after everything was checked

        code = launch(built, OmegaConf.to_yaml(config, resolve=True))
    except UserError as error:
        return _complain(error)
    if _records(run_dir) == before:
        return code  # refused: what is there belongs to another start
    try:
        print(f"elastic_moe: drawn in {write_report(run_dir)}", file=sys.stderr)
    except (UserError, OSError):
        pass  # a run that was stopped before its first step, or a full disk
    except Exception as error:  # noqa: BLE001 - the run is over, and its picture is not worth its exit code
        print(f"elastic_moe: the report could not be drawn: {type(error).__name__}: {error}", file=sys.stderr)
    return code


def _records(run_dir: Path) -> list[tuple[int, int]]:
    """Size and time of the records of a run, which tell whether one was added."""
    found = [run_dir / name for name in (METRICS, EVENTS) if (run_dir / name).is_file()]
    return [(path.stat().st_size, path.stat().st_mtime_ns) for path in found]


def _run_trial(config: DictConfig) -> float | None:
    """A job of a sweep: its objective, for Hydra's sweeper.

    Raises:
        TrialFailed: its exit code is not 0.
        SystemExit: a signal has ended it, and with it a sweep whose jobs run in this process.
    """
    code = _run_job(config)
    if code >= SIGNALLED:
        raise SystemExit(code)
    if code:
        raise TrialFailed(f"run.dir={config.run.dir} ended with exit code {code}", code)
    return objective(Path(config.run.dir).expanduser(), config.run.objective)


def _one_cluster(checked: Checked) -> AbstractContextManager[None]:
    """The cluster that the jobs of a sweep share, so that only the first one waits for Ray to start."""
    kind = checked.launcher.rpartition(".")[2]
    if kind not in (BASIC, ELASTIC):
        return nullcontext()
    from elastic_moe.actors import cluster  # Ray is imported here, after everything was checked

    return (cluster.shared_session if kind == ELASTIC else cluster.sweep_session)(checked.configs)


def _complain(error: UserError) -> int:
    print(f"elastic_moe: {error}", file=sys.stderr)
    return error.exit_code


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"elastic_moe: note: {message}", file=sys.stderr)


def main() -> int:
    """Run the command line; exit code 0 when every job committed its steps, 2 for a bad configuration."""
    register_schema()
    arguments = parse_flags()
    if arguments.help:
        show_help("train", "Train a model on a cluster whose workers may come and go.")
        return 0
    register()
    only_shows = arguments.hydra_help or arguments.cfg or arguments.info or arguments.shell_completion
    checked = Checked([])
    if not only_shows and not arguments.config_path:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # given once, by the job itself
                name, own = arguments.config_name or "train", arguments.config_dir or ""
                checked = check_command(arguments.overrides, name, arguments.multirun, own)
            for run_dir in dict.fromkeys(config.run.dir for config in checked.configs):
                make_run_dir(Path(run_dir).expanduser())  # before Hydra does, with a stack trace
        except UserError as error:
            return _complain(error)
    codes: list[int] = []

    def job(config: DictConfig) -> float | None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            try:
                return _run_trial(config)
            except TrialFailed as failure:
                codes.append(failure.code)  # Hydra tells of the first failure only
                raise
        codes.append(_run_job(config))
        return None

    try:
        # The sweep's own directory may be named by values of Hydra, which it sets for the jobs only.
        sweep = nullcontext() if checked.sweep is None else hydra_values(checked.sweep)
        with warnings.catch_warnings(), _one_cluster(checked), sweep:
            warnings.showwarning = _show_warning
            return max(_run_hydra(job), *codes, 0)
    except UserError as error:
        return _complain(error)


def _run_hydra(job: Callable[[DictConfig], float | None]) -> int:
    """Let Hydra run the jobs. Returns the exit code: the worst of those of a sweep that its launcher tells."""
    try:
        with environment({FULL_ERROR: "1"}):
            hydra.main(version_base=None, config_path=str(config_dir()), config_name="train")(job)()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FAILED if end.code else 0
    except TrialFailed as failure:
        print(f"elastic_moe: {failure}", file=sys.stderr)
        return failure.worst
    except UserError:
        raise
    except OSError as error:
        if of_storage(error):  # where Hydra writes
            return _complain(UserError(f"hydra.run.dir or hydra.sweep.dir cannot be written: {error}"))
        traceback.print_exc()
        return FAILED
    except (HydraException, OmegaConfBaseException) as error:
        return _complain(UserError(one_sentence(error)))
    except Exception:  # noqa: BLE001 - of a sweeper or another launcher
        traceback.print_exc()
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
