"""The files of a run: `log.jsonl`, `summary.json`, `checkpoint.pt`, written so that a crash at
any moment leaves them whole.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .errors import UsageError, WriteError

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
        raise UsageError(f"cannot write to {error.filename}: {error.strerror}") from error


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
    if not path.exists():
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


def ended_early(folder: Path) -> dict[str, Any] | None:
    """The settings of a run that ended before its first checkpoint, None if there is none such."""
    summary = read_summary(folder)
    early = not (folder / NAME).exists() and summary.get("finished") is False
    return summary["settings"] if early and isinstance(summary.get("settings"), dict) else None


def begun(folder: Path) -> bool:
    """Whether the folder holds a run that can go on, be it from its first step."""
    return (folder / NAME).exists() or ended_early(folder) is not None


def check_free(folder: Path) -> None:
    """That no other process is training there.

    Raises:
        UsageError: one is.
    """
    try:
        with (folder / LOG).open("rb") as log:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(folder) from error
    except OSError:  # no log yet; any other trouble is told where it is opened to be written
        pass


def check_unused(folder: Path, wanted: dict[str, Any], changeable: tuple[str, ...]) -> None:
    """That a new run does not overwrite another one, nor a log or summary that is none of a run.

    Args:
        folder: of the new run.
        wanted: its settings.
        changeable: names of settings with which a run may go on, whatever they were.

    Raises:
        UsageError: the folder holds such; naming the ways out.
    """
    if not begun(folder):
        for path in (folder / LOG, folder / SUMMARY):
            if path.exists() and path.stat().st_size:
                raise UsageError(
                    f"{path} is there already: choose another --out, or replace it with --overwrite"
                )
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


class Log:
    """The log of a run, which no other process can open while this one has it. Every line is
    written at once.

    Args:
        folder: of the run; made if need be.

    Raises:
        UsageError: it cannot be made or written to, or another process is training there.
    """

    def __init__(self, folder: Path) -> None:
        make(folder)
        self._folder, self._path = folder, folder / LOG
        self._file = self._path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process
        except OSError as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise _busy(folder) from error
            raise UsageError(
                f"cannot lock {self._path}: {error.strerror}: choose --out on another file system"
            ) from error

    def begin(self, size: int) -> None:
        """Cuts it to the size it had at the checkpoint: later records will be made again.

        Args:
            size: in bytes; 0 for a new run, which removes the checkpoint of an old one.

        Raises:
            UsageError: it is shorter than that, or a file cannot be changed.
        """
        found = os.fstat(self._file.fileno()).st_size
        if found < size:
            raise UsageError(
                f"{self._path} is missing or shorter than it was when {NAME} was written"
            )
        path = self._folder / NAME
        try:
            if size == 0:
                path.unlink(missing_ok=True)
            path = self._path
            if found > size:
                self._file.truncate(size)
        except OSError as error:
            raise UsageError(f"cannot replace {path}: {error.strerror}") from error

    def write(self, line: str) -> None:
        """Appends a line.

        Raises:
            UsageError: it cannot be written.
        """
        content = line.encode()
        try:
            while content:  # a disk that is nearly full takes a part first
                content = content[self._file.write(content) :]
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def sync(self) -> int:
        """Brings it onto the disk; returns its size.

        Raises:
            UsageError: that fails.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        return os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def remove(folder: Path) -> None:
    """Removes the run in the folder, if there is one."""
    for name in (NAME, LOG, SUMMARY):
        (folder / name).unlink(missing_ok=True)


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Replaces the folder's summary, atomically."""
    _replace(folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def read_summary(folder: Path) -> dict[str, Any]:
    """The folder's summary, empty if there is none that can be read."""
    try:
        found = json.loads((folder / SUMMARY).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # what went wrong first is said
            temporary.unlink()
        raise _cannot_write(path, error) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> UsageError:
    kind = WriteError if begun(path.parent) else UsageError
    return kind(f"cannot write {path}: {error.strerror}")


def _busy(folder: Path) -> UsageError:
    return UsageError(
        f"another process is training in {folder}: wait for its end, or choose another --out"
    )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
