"""Results files: JSON with the environment, the ceilings of the card, parity checks, and one row per timing.

Every row names its case (`baselines.Case`) and its contender, and either has times or says in `error` why it has none.
A row of a single layer (`layers`) names `layer`, `operator` and `problem`, too.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from . import environment
from .baselines import Case

_KEY = (*Case._fields, "contender", "operator", "problem")
_TIMES = ("median_ms", "q25_ms", "q75_ms")


class NotResults(ValueError):
    """A file is no results file; the message names it and says why."""


class Results:
    """A results file in the making, rewritten atomically whenever something is added."""

    def __init__(self, path: Path, options: Namespace) -> None:
        plain = {k: v if isinstance(v, (int, float, list, type(None))) else str(v) for k, v in vars(options).items()}
        plain = {k: str(v) if v == float("inf") else v for k, v in plain.items()}  # JSON has no infinity
        self.path = path
        self.content = {"environment": environment.describe(), "options": plain, "parity": [], "rows": []}
        self.write()

    def write(self) -> None:
        environment.write_json(self.path, self.content)

    def add(self, part: str, entry: dict) -> None:
        """Append to "parity" or "rows" and write."""
        self.content[part].append(entry)
        self.write()


def load(path: Path) -> dict:
    """The content of a results file; `NotResults` if it is none, or was cut off."""
    try:
        content = json.loads(path.read_text())
        content["environment"]["commit"]
        for row in content["rows"]:
            missing = [name for name in (*Case._fields, "contender") if name not in row]
            if missing:
                raise ValueError(f"a row without {', '.join(missing)}")
            if "error" not in row and not all(row[name] > 0 for name in _TIMES):
                raise ValueError("a row with a time that is not positive")
    except OSError as error:
        raise NotResults(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise NotResults(f"{path}: not a results file: {type(error).__name__}: {error}") from error
    return content


def key(row: dict) -> tuple:
    """What two rows of the same measurement have in common."""
    return tuple(row.get(name) for name in _KEY)


def case_of(row: dict) -> tuple:
    """The row's case as a tuple, the same for all its contenders."""
    return tuple(row[name] for name in Case._fields)


def case_name(row: dict) -> str:
    """The row's case for people."""
    return f"{row['model']} {row['mode']} {row['dtype']} {row['batch']}x{row['size']}"


def networks(content: dict) -> list[dict]:
    """The timed rows of whole networks."""
    return [row for row in content["rows"] if "error" not in row and "layer" not in row]


def layers(content: dict) -> list[dict]:
    """The timed rows of single layers."""
    return [row for row in content["rows"] if "error" not in row and "layer" in row]
