"""Train on four workers of this machine and kill one again and again: the others go on, and nothing is lost.

    python scripts/examples/kill_demo.py [--run DIR] [--steps N] [--every N]

Afterwards the page report.html in the run directory shows each death and each join.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading

import elastic_moe

POLL_S = 0.5


def kill_now_and_then(run_dir: str, every: int, ended: threading.Event) -> None:
    """Kill the worker of the last rank each time that so many more steps are committed, until the run has ended."""
    due = every
    while not ended.wait(POLL_S):
        try:
            run = elastic_moe.Run(run_dir)
        except elastic_moe.UserError:
            continue  # it has not begun
        if run.status().step < due:
            continue
        events = run.events()
        members = events[events["event"] == "view"].iloc[-1]["members"]
        ready = events[(events["event"] == "worker_ready") & (events["worker"] == members[-1])]
        os.kill(int(ready.iloc[-1]["pid"]), signal.SIGKILL)
        due = run.status().step + every


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, and kill a worker again and again.")
    parser.add_argument("--run", default="runs/kill_demo", help="the run directory")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50, help="steps between two deaths")
    options = parser.parse_args()
    ended = threading.Event()
    try:
        config = elastic_moe.configure(
            model="tiny",
            run={"dir": options.run, "steps": options.steps, "overwrite": True},
            cluster={"workers": 4},
            elastic={"min_workers": 1},
            tracking={"wandb": "off"},
        )
        threading.Thread(target=kill_now_and_then, args=(options.run, options.every, ended), daemon=True).start()
        run = elastic_moe.train(config)
    except elastic_moe.UserError as error:
        print(f"kill_demo: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        ended.set()
    metrics, events = run.metrics(), run.events()
    entered = events[events["event"] == "entered"]
    print(f"{len(events[events['event'] == 'worker_lost'])} workers died")
    print(f"steps {metrics['step'].min()} to {metrics['step'].max()}, each once: {metrics['step'].is_unique}")
    print(f"committed steps lost: {int(entered['lost_steps'].sum())}")
    print(f"drawn in {run.report()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
