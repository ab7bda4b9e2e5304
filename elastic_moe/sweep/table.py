"""The table of a sweep: `sweep.csv` in its directory, and the same as text for a terminal. Pure, but for the file."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from elastic_moe.sweep.trial import TrialRecord

COLUMNS = ("trial", "state", "step", "steps", "seconds", "starts", "exit_code")


def rows(records: Sequence[TrialRecord], objective: str) -> list[dict[str, str]]:
    """One row per trial: what became of it, its objective, and the keys by which trials differ.

    Args:
        records: of the trials, in order.
        objective: name of `run.objective`.
    """
    values = [dict(_split(text) for text in record.overrides) for record in records]
    keys = dict.fromkeys(key for found in values for key in found)
    swept = [key for key in keys if len({found.get(key, "") for found in values}) > 1] or list(keys)
    table: list[dict[str, str]] = []
    for record, found in zip(records, values, strict=True):
        row = {key: str(found.get(key, "")) for key in swept}
        known = (record.trial, record.state, record.step, record.steps, round(record.seconds), record.starts)
        row = dict(zip(COLUMNS, map(str, (*known, record.code)), strict=True)) | {objective: _shown(record)} | row
        table.append(row | {"reason": record.reason})
    return table


def write_table(path: Path, records: Sequence[TrialRecord], dirs: Mapping[int, Path], objective: str) -> None:
    """Write the table as a CSV file, with the directory of each trial.

    Args:
        dirs: run directory by number.
        path, records, objective: see `rows`.
    """
    found = zip(rows(records, objective), records, strict=True)
    table = [row | {"run_dir": str(dirs[record.trial])} for row, record in found]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    new = path.with_name(f".{path.name}.tmp")
    new.write_text(text.getvalue())
    os.replace(new, path)


def text_table(records: Sequence[TrialRecord], objective: str) -> str:
    """The table for a terminal, in columns."""
    table = rows(records, objective)
    names = [name for name in table[0] if name not in ("steps", "reason")]
    lines = [names, *([row[name] for name in names] for row in table)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(names))]
    told = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    told += [f"trial {row['trial']}: {row['reason']}" for row in table if row["reason"]]
    return "\n".join(told)


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def _shown(record: TrialRecord) -> str:
    value = record.objective
    return "" if value is None else f"{value:.6g}" if math.isfinite(value) else str(value)
