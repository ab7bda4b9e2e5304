"""`Run`: what a run has written so far, from Python: metrics and events as tables, checkpoints, model, report."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError
from elastic_moe.metrics.jsonl import last_line, read_jsonl
from elastic_moe.run_dir import CONFIG, EVENTS, EXPERTS, LIVE, METRICS, checkpoint_root

if TYPE_CHECKING:
    import pandas

    from elastic_moe.actors.operate import LiveRun
    from elastic_moe.data.tokenizer import TextTokenizer
    from elastic_moe.model.transformer import Transformer

FRAME_HEIGHT = 720  # pixels of the report in a notebook
NEW, RUNNING, STARTED_AGAIN = "new", "running", ("view", "entered")


@dataclass(frozen=True)
class RunStatus:
    """How a run is doing, from its files.

    Attributes:
        state: "new" without an event, "running", "finished", "failed", or "ended" if it left no word.
        reason: of its end, as a sentence; "" if it gave none.
        step, steps: committed so far, and of the whole run.
        loss: of the last step; None before the first one.
        tokens_per_s: of the last step.
        world_size: workers of the last step.
        generation: of the view that committed it.
        checkpoint_step: of the newest checkpoint of which the run told; 0 if none.
    """

    state: str
    reason: str
    step: int
    steps: int
    loss: float | None
    tokens_per_s: float
    world_size: int
    generation: int
    checkpoint_step: int


class Run:
    """A run directory. It may belong to a run that goes on: every call reads what is there now.

    Args:
        path: the run directory.

    Raises:
        UserError: it is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.dir = Path(path).expanduser().absolute()
        if not (self.dir / CONFIG).is_file():
            raise UserError(f"{path} is not the directory of a run: it has no {CONFIG}.")

    def __repr__(self) -> str:
        status = self.status()
        return f"Run({str(self.dir)!r}: {status.state}, step {status.step} of {status.steps})"

    @cached_property
    def config(self) -> TrainConfig:
        """The configuration of the newest start when this was read first."""
        from elastic_moe.config.saved import read_config

        return read_config(self.dir)

    def metrics(self) -> pandas.DataFrame:
        """A row per committed step. metrics/README.md explains the columns; `time` is seconds since the Unix epoch."""
        return _frame(read_jsonl(self.dir / METRICS))

    def events(self) -> pandas.DataFrame:
        """A row per event: starts, views, deaths, checkpoints, evaluations. A key that a kind does not have is NaN."""
        return _frame(read_jsonl(self.dir / EVENTS))

    def experts(self) -> pandas.DataFrame:
        """A row per record of the experts: where they are (`placement`) and how many tokens they got (`load`)."""
        return _frame(read_jsonl(self.dir / EXPERTS))

    def checkpoints(self, verify: bool = False) -> pandas.DataFrame:
        """A row per checkpoint: step, state ("complete", "unfinished", "abandoned", "damaged"), reason, bytes, stays.

        One that stays is kept for good: see `checkpoint.keep_every_steps`.

        Args:
            verify: compare checksums, which reads every file once.

        Raises:
            StorageUnavailable: something cannot be read.
        """
        from elastic_moe.checkpoint.inventory import list_checkpoints

        rows = [
            {
                "step": entry.step,
                "state": entry.state,
                "reason": entry.reason,
                "bytes": 0 if entry.manifest is None else entry.manifest.bytes,
                "stays": entry.manifest is not None and entry.manifest.stays,
            }
            for entry in list_checkpoints(checkpoint_root(self.config, self.dir), verify)
        ]
        return _frame(rows, ("step", "state", "reason", "bytes", "stays"))

    def status(self) -> RunStatus:
        """How the run is doing, from its files; `live` asks its coordinator."""
        last, events = last_line(self.dir / METRICS) or {}, read_jsonl(self.dir / EVENTS)
        state, reason = _state(events, (self.dir / LIVE).exists())
        saved = [int(event["step"]) for event in events if event.get("event") == "checkpoint"]
        return RunStatus(
            state=state,
            reason=reason,
            step=int(last.get("step", 0)),
            steps=self.config.run.steps,
            loss=last.get("loss"),
            tokens_per_s=float(last.get("tokens_per_s") or 0.0),
            world_size=int(last.get("world_size", 0)),
            generation=int(last.get("generation", 0)),
            checkpoint_step=saved[-1] if saved else 0,
        )

    @contextmanager
    def live(self, address: str = "") -> Iterator[LiveRun]:
        """Connect to the coordinator of a run that goes on in another process: its status, and requests to it.

            with run.live() as live:
                live.submit({"event": "scale", "workers": 4})

        Args:
            address: of the Ray cluster; by default the one that the run told.

        Raises:
            UserError: the run does not go on, or its cluster does not answer.
        """
        from elastic_moe.actors.operate import live_run

        with live_run(self.dir, address) as live:
            yield live

    def model(self, step: int | None = None) -> Transformer:
        """The trained model, whole on one device (a GPU where there is one). Called with token ids (batch, position).

        Args:
            step: of the checkpoint; None: the newest one.

        Raises:
            UserError: there is no such complete checkpoint.
        """
        from elastic_moe.saved import load_model, open_run

        return load_model(open_run(str(self.dir), step))

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the run's model."""
        from elastic_moe.data.tokenizer import load_tokenizer
        from elastic_moe.run_dir import TOKENIZER

        return load_tokenizer(self.dir / TOKENIZER)

    def generate(
        self, prompt: str, max_tokens: int = 128, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0
    ) -> str:
        """Continue a text with the newest checkpoint. Returns the prompt and what follows.

        Args:
            prompt: text to continue.
            max_tokens: at most so many follow.
            temperature: 0 takes the most likely token.
            top_p: sample among the likeliest tokens that have this probability together.
            seed: of the samples.

        Raises:
            UserError: there is no complete checkpoint.
        """
        from elastic_moe.model.sampling import generate
        from elastic_moe.saved import load_model, open_run

        saved, tokenizer = open_run(str(self.dir)), self.tokenizer
        tokens = tokenizer.encode(prompt) or [tokenizer.end_id]
        settings = (max_tokens, temperature, top_p, seed, tokenizer.end_id)
        return tokenizer.decode([*tokens, *generate(load_model(saved), saved.cfg.num_layers, tokens, *settings)])

    def export(self, target: str | Path, step: int | None = None, dtype: str = "fp32") -> str:
        """Write the weights as a Hugging Face directory. Returns one line about the result.

        Args:
            target: directory to write; it must not exist, or be empty.
            step: of the checkpoint; None: the newest one.
            dtype: "fp32" or "bf16".

        Raises:
            UserError: there is no such checkpoint, the model cannot be expressed, or the target cannot be written.
        """
        from elastic_moe.cli.export import DTYPES, export

        if dtype not in DTYPES:
            raise UserError(f"dtype can be {' or '.join(sorted(DTYPES))}, not {dtype!r}.")
        return export(str(self.dir), str(target), step, DTYPES[dtype])

    def report(self) -> Path:
        """Draw the run as one page, report.html in its directory. Returns its path.

        Raises:
            UserError: no step is committed yet.
        """
        from elastic_moe.metrics.report.page import write_report

        return write_report(self.dir)

    def _repr_html_(self) -> str:
        """The report, in a notebook."""
        try:
            page = self.report().read_text(encoding="utf-8")
        except (UserError, OSError) as error:
            return f"<p>{html.escape(repr(self))}: {html.escape(str(error))}</p>"
        return (
            f'<iframe srcdoc="{html.escape(page, quote=True)}" width="100%" height="{FRAME_HEIGHT}" '
            f'style="border: 0" title="{html.escape(self.dir.name)}"></iframe>'
        )


def _state(events: Sequence[dict[str, Any]], announced: bool) -> tuple[str, str]:
    """State and reason: the last event of an end counts, unless the run was started again after it."""
    for event in reversed(events):
        kind = event.get("event")
        if kind in ("finished", "failed"):
            return str(kind), str(event.get("reason", ""))
        if kind in STARTED_AGAIN:
            break
    if announced:
        return RUNNING, ""
    return ("ended", "its end was not recorded") if events else (NEW, "")


def _frame(rows: list[dict[str, Any]], columns: Sequence[str] = ()) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(rows, columns=list(columns) if columns and not rows else None)
