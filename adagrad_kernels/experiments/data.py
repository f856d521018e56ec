"""Readers of the data sets: from files to tensors in memory, checked before they are believed."""

from __future__ import annotations

import gzip
import io
import itertools
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from .errors import UsageError, optional

Images = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Data:
    """A data set in memory.

    Attributes:
        train: inputs float32 [n, C, H, W] and labels int64 [n].
        validation: likewise, never trained on: the official test files where there are any.
        classes: number of classes.
    """

    train: TensorDataset
    validation: TensorDataset
    classes: int = 10

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.tensors[0].shape[1:]
        return channels, height, width


def load(name: str, data_dir: Path | None = None) -> Data:
    """Reads a data set.

    Args:
        name: "digits" (scikit-learn's own, no files needed), "mnist" or "cifar10".
        data_dir: folder of the files of the last two.

    Raises:
        UsageError: an unknown name, no folder, a missing or damaged file.
    """
    if name not in DATASETS:
        raise UsageError(f"unknown dataset {name!r}; there are {', '.join(DATASETS)}")
    if name == "digits":
        return digits()
    if data_dir is None:
        raise UsageError(f"--dataset {name} needs --data-dir, the folder with its files")
    if not data_dir.is_dir():
        raise UsageError(f"--data-dir {data_dir} is not a folder")
    try:
        return DATASETS[name](data_dir)
    except OSError as error:
        raise UsageError(f"{error.filename or data_dir}: {error.strerror or error}") from error


def digits(_: Path | None = None) -> Data:
    """scikit-learn's 1,797 handwritten digits, 8×8 in [0, 1]; every fifth one for validation."""
    bunch = optional("sklearn.datasets", "scikit-learn").load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.arange(len(labels)) % 5 == 4
    return Data(
        TensorDataset(images[~held_out], labels[~held_out]),
        TensorDataset(images[held_out], labels[held_out]),
    )


def mnist(folder: Path) -> Data:
    """MNIST from its IDX files, gzipped or not; inputs [n, 1, 28, 28] in [0, 1]."""
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(_first(folder, f"{part}-images-idx3-ubyte"), 3)
        labels = read_idx(_first(folder, f"{part}-labels-idx1-ubyte"), 1)
        _check(images, labels, (28, 28), folder / f"{part}-images-idx3-ubyte")
        inputs = torch.from_numpy(images).unsqueeze(1).float().div_(255)
        parts.append(TensorDataset(inputs, torch.from_numpy(labels).long()))
    train, validation = parts
    return Data(train, validation)


def cifar10(folder: Path) -> Data:
    """CIFAR-10 from its python pickles or from JPEG archives; [n, 3, 32, 32], (x − ½)/½.

    The pickles are `data_batch_1` … `data_batch_5` and `test_batch`, in the folder or in its
    `cifar-10-batches-py`. The archives are `train_jpeg.npz` and `test_jpeg.npz`, each with
    `bytes` (uint8, all files one after another), `offsets` (int64, n + 1) and `labels` (uint8).
    """
    if (folder / "train_jpeg.npz").exists():
        train, test = (_colour(*read_jpegs(folder / f"{p}_jpeg.npz")) for p in ("train", "test"))
        return Data(train, test)
    inner = folder / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else folder
    batches = [read_cifar_batch(folder / f"data_batch_{i}") for i in range(1, 6)]
    images, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
    return Data(_colour(images, labels), _colour(*read_cifar_batch(folder / "test_batch")))


DATASETS: dict[str, Callable[[Path], Data]] = {"digits": digits, "mnist": mnist, "cifar10": cifar10}


def read_idx(path: Path, dimensions: int) -> Images:
    """An IDX file of unsigned bytes, gzipped or not.

    Raises:
        UsageError: not such a file, another number of dimensions, too short or too long.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{path}: damaged gzip file ({error})") from error
    magic = bytes([0, 0, 8, dimensions])  # two zeros, the type unsigned byte, the dimensions
    if raw[:4] != magic:
        raise UsageError(
            f"{path}: not an IDX file of {dimensions} dimensions: it begins with "
            f"{raw[:4].hex() or 'nothing'}, not {magic.hex()}"
        )
    header = 4 + 4 * dimensions
    if len(raw) < header:
        raise UsageError(f"{path}: ends within its header")
    shape = np.frombuffer(raw, ">u4", dimensions, 4).tolist()
    expected = int(np.prod(shape, dtype=object))
    if len(raw) - header != expected:
        raise UsageError(
            f"{path}: {len(raw) - header} bytes of data where its header says {shape}, "
            f"{expected} bytes"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers, nothing else: a pickle may name any function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if name == "_reconstruct" and module in {
            "numpy.core.multiarray",
            "numpy._core.multiarray",
        }:
            return np.zeros(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")


def read_cifar_batch(path: Path) -> tuple[Images, Images]:
    """(images [n, 3, 32, 32], labels [n]) of one batch of CIFAR-10's python version.

    Raises:
        UsageError: not such a file.
    """
    try:
        batch = _ArrayUnpickler(io.BytesIO(_existing(path).read_bytes()), encoding="bytes").load()
        images, labels = batch[b"data"], np.array(batch[b"labels"])
        if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
            raise ValueError(f"its data are {images.dtype} {list(images.shape)}, not [n, 3072]")
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise ValueError("its labels are not whole numbers")
    except (OSError, UsageError):
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to say
        what = f"no entry {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"{path}: not a CIFAR-10 batch ({_one_line(what)})") from error
    images = images.reshape(-1, 3, 32, 32)
    _check(images, labels, (3, 32, 32), path)
    return images, labels.astype(np.uint8)


def read_jpegs(path: Path) -> tuple[Images, Images]:
    """(images [n, 3, 32, 32], labels [n]) of an archive of JPEG files; see `cifar10`.

    Raises:
        UsageError: not such an archive, or a picture that does not decode.
    """
    image = optional("PIL.Image", "pillow")
    try:
        with _existing(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            data, offsets, labels = archive["bytes"], archive["offsets"], archive["labels"]
    except (
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        AttributeError,
    ) as error:
        raise UsageError(f"{path}: not an archive of JPEG files ({_one_line(error)})") from error
    if data.dtype != np.uint8 or offsets.dtype.kind not in "iu" or labels.dtype != np.uint8:
        raise UsageError(f"{path}: bytes, offsets or labels have another type than they should")
    if offsets.ndim != 1 or len(offsets) != labels.size + 1 or (np.diff(offsets) < 0).any():
        raise UsageError(f"{path}: the offsets do not fit the {labels.size} labels")
    if offsets[0] != 0 or offsets[-1] != data.size:
        raise UsageError(f"{path}: the offsets end at {offsets[-1]}, the bytes at {data.size}")
    images = np.empty((labels.size, 3, 32, 32), np.uint8)
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        try:
            with image.open(io.BytesIO(data[start:end].tobytes()), formats=["JPEG"]) as picture:
                pixels = np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise UsageError(f"{path}: picture {i} does not decode ({_one_line(error)})") from error
        if pixels.shape != (32, 32, 3):
            raise UsageError(f"{path}: picture {i} has {pixels.shape[1]}×{pixels.shape[0]} pixels")
        images[i] = pixels.transpose(2, 0, 1)
    _check(images, labels, (3, 32, 32), path)
    return images, labels


def _colour(images: Images, labels: Images) -> TensorDataset:
    inputs = torch.from_numpy(images).float().div_(127.5).sub_(1)
    return TensorDataset(inputs, torch.from_numpy(labels).long())


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    return path


def _first(folder: Path, name: str) -> Path:
    """The file of this name, or gzipped."""
    found: Iterable[Path] = (folder / (name + end) for end in ("", ".gz"))
    path = next((p for p in found if p.is_file()), None)
    if path is None:
        raise UsageError(f"{folder / name} does not exist")
    return path


def _check(images: Images, labels: Any, shape: tuple[int, ...], path: Path) -> None:
    if images.shape[1:] != shape:
        raise UsageError(f"{path}: images of {list(images.shape[1:])}, expected {list(shape)}")
    if len(images) != len(labels) or len(images) == 0:
        raise UsageError(f"{path}: {len(images)} images, but {len(labels)} labels")
    if labels.min() < 0 or labels.max() > 9:
        raise UsageError(f"{path}: labels from {labels.min()} to {labels.max()}, expected 0 to 9")


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
