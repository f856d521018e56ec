"""The files of a run: `log.jsonl`, `summary.json`, `checkpoint.pt`, written so that a crash at
any moment leaves them whole.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any, TextIO

import torch

from .errors import UsageError

NAME = "checkpoint.pt"
LOG = "log.jsonl"
SUMMARY = "summary.json"


def make(folder: Path) -> None:
    """Makes the folder of a run if it is not there.

    Raises:
        UsageError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG).open("a").close()
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error


def write(folder: Path, state: dict[str, Any]) -> None:
    """Replaces the folder's checkpoint, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    _replace(folder / NAME, buffer.getvalue())


def read(folder: Path) -> dict[str, Any]:
    """The folder's checkpoint.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise UsageError(f"nothing to resume: {path} does not exist")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if not {"settings", "model", "optimizer", "loader", "log_bytes"} <= state.keys():
            raise ValueError("not the checkpoint of a run")
    except Exception as error:  # damaged bytes raise whatever they happen to say
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"{path} is damaged: {reason}") from error
    return state


def check_settings(
    saved: dict[str, Any], wanted: dict[str, Any], changeable: tuple[str, ...], folder: Path
) -> None:
    """That a run is continued with the settings it was begun with.

    Raises:
        UsageError: naming the first that differs.
    """
    for name, value in wanted.items():
        if name not in changeable and saved.get(name) != value:
            raise UsageError(
                f"the run in {folder} has {_option(name)} {saved.get(name)}, not {value}: resume "
                "it with its own settings, or choose another --out"
            )


def check_unused(folder: Path, wanted: dict[str, Any], changeable: tuple[str, ...]) -> None:
    """That a new run does not overwrite another one.

    Args:
        folder: of the new run.
        wanted: its settings.
        changeable: names of settings with which a run may go on, whatever they were.

    Raises:
        UsageError: the folder holds a run; naming the ways out.
    """
    if not (folder / NAME).is_file():
        return
    summary = read_summary(folder)
    if not summary.get("finished"):
        raise UsageError(
            f"{folder} holds an unfinished run: continue it with --resume, choose another --out, "
            "or replace it with --overwrite"
        )
    for name, value in wanted.items():
        saved = summary.get("settings", {}).get(name)
        if name not in changeable and saved != value:
            raise UsageError(
                f"{folder} holds another run ({_option(name)} {saved}, not {value}): choose "
                "another --out, or replace it with --overwrite"
            )
    raise UsageError(
        f"{folder} holds this run, finished after {summary.get('samples', 0):,} samples: go on "
        "with --resume and more --samples, choose another --out, or train anew with --overwrite"
    )


def open_log(folder: Path, size: int) -> TextIO:
    """The log, cut to the size it had at the checkpoint: later records will be made again.

    Raises:
        UsageError: it is shorter than that.
    """
    path = folder / LOG
    if size == 0:
        (folder / NAME).unlink(missing_ok=True)
        return path.open("w", buffering=1)
    if not path.is_file() or path.stat().st_size < size:
        raise UsageError(f"{path} is missing or shorter than it was when {NAME} was written")
    os.truncate(path, size)
    return path.open("a", buffering=1)


def sync(log: TextIO) -> int:
    """Brings the log onto the disk; returns its size."""
    log.flush()
    os.fsync(log.fileno())
    return os.fstat(log.fileno()).st_size


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Replaces the folder's summary, atomically."""
    _replace(folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def read_summary(folder: Path) -> dict[str, Any]:
    """The folder's summary, empty if there is none that can be read."""
    try:
        return json.loads((folder / SUMMARY).read_text())
    except (OSError, ValueError):
        return {}


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
