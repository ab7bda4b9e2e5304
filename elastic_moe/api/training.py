"""`train`: run a training from Python, on an embedded, simulated or existing Ray cluster."""

from __future__ import annotations

from typing import Any

from elastic_moe.api.run import Run
from elastic_moe.api.settings import as_yaml, configure
from elastic_moe.config.schema import TrainConfig


class TrainingFailed(RuntimeError):
    """A run ended before its last step, and not because it was asked to. The message says where to look.

    Attributes:
        run: what it left behind.
        exit_code: that of the command line.
    """

    def __init__(self, run: Run, exit_code: int) -> None:
        super().__init__(f"the run in {run.dir} ended early: {run.status().reason or f'exit code {exit_code}'}")
        self.run, self.exit_code = run, exit_code


def train(config: TrainConfig | None = None, /, **groups: Any) -> Run:
    """Train to the end, and stay with the run meanwhile.

    In a notebook, interrupting the kernel saves the state first, as Ctrl-C does; a second interrupt ends it at once.
    A Ray that this process has started or joined before is used and left as it is.

    Args:
        config: made by `configure`; None: made of `groups`.
        groups: arguments of `configure`, if no configuration is given.

    Returns:
        The run. It may have been stopped by an operator; its status tells.

    Raises:
        UserError: bad input; nothing was started.
        StorageFailed: the last state could not be saved.
        TrainingFailed: the run ended early.
        KeyboardInterrupt: it was interrupted. `configure(run={"resume": "auto"}, ...)` goes on.
        TypeError: both a configuration and keys were given.
    """
    if config is not None and groups:
        raise TypeError("train takes a configuration or keys, not both; give the keys to configure")
    config = config or configure(groups)
    from elastic_moe.actors.driver import start  # Ray is imported here, after everything was checked
    from elastic_moe.actors.outcome import SIGNALLED

    code = start(config, as_yaml(config))
    if code >= SIGNALLED:
        raise KeyboardInterrupt(f"the run was stopped by signal {code - SIGNALLED}")
    run = Run(config.run.dir)
    if code:
        raise TrainingFailed(run, code)
    return run


__all__ = ["TrainingFailed", "train"]
