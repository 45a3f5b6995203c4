"""Files of results: what was run where, and one result a line (see measure.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]

SCHEMA = 1


def save(record: Record, path: Path) -> None:
    """As JSON with a line for each entry of each list, so that two files can be compared by eye."""
    entries = []
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = ",\n  ".join(json.dumps(each) for each in value)
            entries.append(f" {json.dumps(name)}: [\n  {lines}\n ]")
        else:
            entries.append(f" {json.dumps(name)}: {json.dumps(value)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def load(path: Path) -> Record:
    record: Record = json.loads(path.read_text())
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected results of schema {SCHEMA}, got {record.get('schema')}")
    return record


def properties(result: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two results ones of the same case."""
    names = ("device", "threads", "operation", "layout", "cache", "dtype", "rows", "n")
    return tuple(result[name] for name in names)


def name_of(result: dict[str, Any]) -> str:
    device, threads, operation, layout, cache, dtype, rows, n = properties(result)
    place = f"{threads} thread{'s' * (threads > 1)}" if device == "cpu" else device
    where = cache if layout == "contiguous" else f"{layout} {cache}"
    return f"{operation:9}{dtype:5}{f'{rows} x {n}':>14} {where:6} {place}"
