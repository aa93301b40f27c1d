"""The table that `tune` measured on a user's own card: where it lies, what it is valid for, and which one a job uses.

It lies in the folder that the environment variable FUSED_RESNET_PLANS names, default ~/.cache/fused_resnet (under
XDG_CACHE_HOME if that is set); an empty FUSED_RESNET_PLANS does without. Its name carries a hash of its stamp: card,
versions of PyTorch and Triton, and this package's own files. So a table is not found after any of them changed, and two
environments that share a home directory do not disturb each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .plan import Table, parse_table, read_text

_NONE = "no table"  # a store's value is never empty


def folder() -> Path | None:
    """Where tuned tables lie; None if FUSED_RESNET_PLANS is set and empty."""
    chosen = os.environ.get("FUSED_RESNET_PLANS")
    if chosen is not None:
        return Path(chosen) if chosen else None
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fused_resnet"


@lru_cache
def _sources() -> str:
    """A hash of this package's files, the compiled library among them: what was measured is what runs."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.glob("*.so")]):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def stamp(card: str) -> dict[str, str]:
    """What a measurement on a card of that name depends on; the origin of a tuned table holds it."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {"card": card, "torch": torch.__version__, "triton": triton, "fused_resnet": _sources()}


def _digest(origin: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:12]


def location(arch: int, card: str) -> Path | None:
    """The file of the table for this card and this environment, existing or not; None where `folder` is."""
    home = folder()
    return None if home is None else home / f"sm{arch}-{_digest(stamp(card))}.json"


def load(arch: int, card: str) -> Table | None:
    """The table tuned on a card like this in this environment, None without one.

    All ranks of a distributed job with such a card get the same table, whatever their folders hold by then: that of the
    rank which asks first. It puts its table into the job's key-value store, so no rank waits for another. A file that
    is damaged or foreign warns and counts as none.
    """
    path = location(arch, card)
    if path is None:
        return None
    text = _of_the_job(path.name, read_text(path))
    return None if text is None else Table(str(path), parse_table(text, str(path), arch, stamp(card), card))


def _of_the_job(key: str, text: str | None) -> str | None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return text
    try:
        store = distributed.distributed_c10d._get_default_store()
        agreed = store.compare_set(f"fused_resnet/{key}", "", text or _NONE).decode()
    except (AttributeError, RuntimeError) as error:  # MPI has no store, a fake process group one that cannot do this
        warnings.warn(f"{key}: tuned plans are not used, for the job has no key-value store ({error!r})", stacklevel=2)
        return None
    agreed = None if agreed == _NONE else agreed
    if agreed != text:
        warnings.warn(f"{key}: another rank's table of tuned plans is used, which is not the one here", stacklevel=2)
    return agreed
