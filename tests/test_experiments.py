"""The readers of the data sets, the models, and a training run whose log is checked by hand."""

import gzip
import io
import itertools
import json
import math
import pickle
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import adagrad_kernels as ak
from adagrad_kernels.experiments import data, models, report
from adagrad_kernels.experiments.errors import UsageError, optional
from adagrad_kernels.experiments.evaluation import evaluate
from adagrad_kernels.experiments.methods import CRITERIA, FixedBatch
from adagrad_kernels.experiments.settings import TrainingRun
from adagrad_kernels.experiments.training import run

# Files as their makers wrote them


def idx(array: np.ndarray) -> bytes:
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def write_mnist(folder: Path, rng: np.random.Generator, zipped: bool) -> dict[str, np.ndarray]:
    arrays = {}
    for part, n in (("train", 7), ("t10k", 3)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, n, np.uint8)
    for name, array in arrays.items():
        content = idx(array)
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return arrays


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 wrote its `str`, like the files of CIFAR-10."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_python2_str(self, text: bytes) -> None:
        self.write(pickle.BINSTRING + len(text).to_bytes(4, "little") + text)

    dispatch[bytes] = save_python2_str


def python2_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_cifar(folder: Path, rng: np.random.Generator) -> dict[str, tuple[np.ndarray, list[int]]]:
    batches = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = rng.integers(0, 256, (4, 3072), np.uint8)
        labels = rng.integers(0, 10, 4).tolist()
        batches[name] = pixels, labels
        content = {b"batch_label": name.encode(), b"labels": labels, b"data": pixels}
        (folder / name).write_bytes(python2_pickle(content))
    return batches


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_jpegs(path: Path, pictures: list[bytes], labels: list[int]) -> None:
    offsets = np.cumsum([0, *map(len, pictures)]).astype(np.int64)
    content = np.frombuffer(b"".join(pictures), np.uint8)
    np.savez(path, bytes=content, offsets=offsets, labels=np.array(labels, np.uint8))


# Readers


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_files_are_read_as_they_were_written(tmp_path, zipped):
    arrays = write_mnist(tmp_path, np.random.default_rng(0), zipped)
    read = data.load("mnist", tmp_path)
    for part, dataset in (("train", read.train), ("t10k", read.validation)):
        inputs, labels = dataset.tensors
        assert inputs.dtype == torch.float32
        assert inputs.shape[1:] == (1, 28, 28)
        pixels = (inputs[:, 0] * 255).round().numpy().astype(np.uint8)
        np.testing.assert_array_equal(pixels, arrays[f"{part}-images-idx3-ubyte"])
        assert labels.tolist() == arrays[f"{part}-labels-idx1-ubyte"].tolist()
    assert read.shape == (1, 28, 28)


def test_cifar_pickles_of_python_2_are_read(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batches = write_cifar(folder, np.random.default_rng(0))
    for given in (folder, tmp_path):
        read = data.load("cifar10", given)
        inputs, labels = read.train.tensors
        wanted = np.concatenate([batches[f"data_batch_{i}"][0] for i in range(1, 6)])
        pixels = ((inputs + 1) * 127.5).round().numpy().astype(np.uint8)
        np.testing.assert_array_equal(pixels.reshape(20, 3072), wanted)
        assert labels.tolist() == [n for i in range(1, 6) for n in batches[f"data_batch_{i}"][1]]
        assert read.validation.tensors[1].tolist() == batches["test_batch"][1]
        assert read.shape == (3, 32, 32)


def test_cifar_jpegs_are_read(tmp_path):
    colours = [(200, 30, 90), (10, 250, 60)]
    pictures = [jpeg(np.full((32, 32, 3), c, np.uint8)) for c in colours]
    write_jpegs(tmp_path / "train_jpeg.npz", pictures, [3, 9])
    write_jpegs(tmp_path / "test_jpeg.npz", pictures[:1], [3])
    read = data.load("cifar10", tmp_path)
    inputs, labels = read.train.tensors
    assert labels.tolist() == [3, 9]
    assert len(read.validation) == 1
    for image, colour in zip(inputs, colours, strict=True):
        found = ((image + 1) * 127.5).mean((1, 2))  # JPEG is lossy: a few of 255 grey levels
        assert (found - torch.tensor(colour)).abs().max() < 4


def test_every_fifth_digit_is_held_out():
    read = data.load("digits")
    assert (len(read.train), len(read.validation)) == (1438, 359)
    assert read.shape == (1, 8, 8)
    inputs = torch.cat([read.train.tensors[0], read.validation.tensors[0]])
    assert (inputs.min(), inputs.max()) == (0, 1)
    assert torch.bincount(read.validation.tensors[1]).min() > 20


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, None, "does not exist"),
        (IMAGES, b"", "begins with nothing"),
        (IMAGES, b"\x89PNG and more", "begins with 89504e47, not 00000803"),
        (IMAGES, idx(np.zeros(5, np.uint8)), "begins with 00000801"),
        (IMAGES, bytes([0, 0, 8, 3, 0, 0]), "ends within its header"),
        (IMAGES, idx(np.zeros((7, 28, 28), np.uint8))[:-1], "5487 bytes of data where"),
        (IMAGES, idx(np.zeros((7, 28, 28), np.uint8)) + b"x", "5489 bytes of data where"),
        (IMAGES, b"\xff".join([bytes([0, 0, 8, 3])] + [b"\xff" * 3] * 4), "bytes of data where"),
        (IMAGES, gzip.compress(idx(np.zeros((7, 28, 28), np.uint8)))[:-9], "damaged gzip"),
        (IMAGES, b"\x1f\x8b\x08rubbish rubbish", "damaged gzip"),
        (IMAGES, idx(np.zeros((7, 28, 27), np.uint8)), "images of [28, 27]"),
        (LABELS, idx(np.zeros(6, np.uint8)), "7 images, but 6 labels"),
        (LABELS, idx(np.full(7, 10, np.uint8)), "labels from 10 to 10"),
    ],
)
def test_damaged_mnist_files_are_named(tmp_path, name, content, message):
    write_mnist(tmp_path, np.random.default_rng(0), zipped=False)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        data.load("mnist", tmp_path)
    assert message in str(caught.value)
    assert "train-" in str(caught.value)
    assert "\n" not in str(caught.value)


class Attack:
    """Unpickled without care, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_run_nothing(tmp_path):
    write_cifar(tmp_path, np.random.default_rng(0))
    proof = tmp_path / "proof"
    attack = pickle.dumps({b"data": Attack(proof)})
    pickle.loads(attack)
    assert proof.exists()
    proof.unlink()
    (tmp_path / "test_batch").write_bytes(attack)
    with pytest.raises(UsageError, match=r"test_batch: .*not allowed"):
        data.load("cifar10", tmp_path)
    assert not proof.exists()


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "not a CIFAR-10 batch"),
        (b"no pickle at all", "not a CIFAR-10 batch"),
        (python2_pickle({b"data": PIXELS, b"labels": [1, 2]})[:-50], "not a CIFAR-10 batch"),
        (python2_pickle([1, 2]), "not a CIFAR-10 batch"),
        (python2_pickle({b"data": PIXELS}), "no entry b'labels'"),
        (python2_pickle({b"data": PIXELS[:, :9], b"labels": [1, 2]}), "not [n, 3072]"),
        (python2_pickle({b"data": PIXELS.astype("f4"), b"labels": [1, 2]}), "float32"),
        (python2_pickle({b"data": PIXELS, b"labels": [b"x", b"y"]}), "not whole numbers"),
        (python2_pickle({b"data": PIXELS, b"labels": [1]}), "2 images, but 1 labels"),
        (python2_pickle({b"data": PIXELS, b"labels": [1, -1]}), "labels from -1 to 1"),
    ],
)
def test_damaged_cifar_pickles_are_named(tmp_path, content, message):
    write_cifar(tmp_path, np.random.default_rng(0))
    (tmp_path / "data_batch_3").unlink()
    if content is not None:
        (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        data.load("cifar10", tmp_path)
    assert message in str(caught.value)
    assert "data_batch_3" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_jpeg_archives_are_named(tmp_path):
    picture = jpeg(np.zeros((32, 32, 3), np.uint8))
    small = jpeg(np.zeros((16, 16, 3), np.uint8))
    path = tmp_path / "train_jpeg.npz"

    def message() -> str:
        with pytest.raises(UsageError, match=r"train_jpeg\.npz") as caught:
            data.load("cifar10", tmp_path)
        return str(caught.value)

    path.write_bytes(b"not a zip file")
    assert "not an archive" in message()
    write_jpegs(path, [picture] * 3, [1, 2, 3])
    path.write_bytes(path.read_bytes()[:-30])
    assert "not an archive" in message()
    np.savez(path, bytes=np.zeros(3, np.uint8))
    assert "not an archive" in message()
    np.savez(path, bytes=np.array([Attack(tmp_path / "proof")]), offsets=0, labels=0)
    assert "not an archive" in message()
    assert not (tmp_path / "proof").exists()
    write_jpegs(path, [picture, b"no picture"], [1, 2])
    assert "picture 1 does not decode" in message()
    write_jpegs(path, [picture, picture[: len(picture) // 2]], [1, 2])
    assert "picture 1 does not decode" in message()
    write_jpegs(path, [picture, small], [1, 2])
    assert "picture 1 has 16×16 pixels" in message()
    write_jpegs(path, [picture, picture], [1])
    assert "do not fit the 1 labels" in message()
    data_bytes = np.frombuffer(picture, np.uint8)
    np.savez(path, bytes=data_bytes, offsets=np.array([0, 10]), labels=np.zeros(1, np.uint8))
    assert "the offsets end at 10" in message()


def test_a_missing_optional_package_is_one_line():
    with pytest.raises(UsageError, match=r'pip install "adagrad_kernels\[experiments\]"'):
        optional("no_such_module_anywhere", "matplotlib")


# Models


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("logistic", (1, 28, 28), 784 * 10 + 10),
        ("cnn", (1, 28, 28), 28_938),
        ("cnn", (3, 32, 32), 541_094),
        ("mlp", (1, 28, 28), 784 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 10 + 10),
        ("resnet18", (3, 32, 32), 11_173_962),
        ("cnn", (1, 8, 8), 16 * 25 + 16 + 32 * 16 * 25 + 32 + 32 * 4 * 10 + 10),
    ],
)
def test_models_have_the_published_sizes(name, shape, parameters):
    model = models.build(name, shape, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.randn(2, *shape)).shape == (2, 10)
    ak.observe(model).detach()  # every layer of them can be measured


# Training


def read_records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("optimizer", "lr"), [("adadagrad", 0.05), ("adadagradnorm", 1.0)])
def test_the_log_obeys_the_norm_test(tmp_path, optimizer, lr):
    eta, cap, micro = 0.7, 200, 16
    settings = TrainingRun(
        optimizer=optimizer, lr=lr, model="logistic", eta=eta, batch_size=4, max_batch_size=cap,
        max_micro_batch_size=micro, samples=4000,
    )  # fmt: skip
    summary = run(settings, tmp_path / "run")
    records = read_records(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(1, summary["steps"] + 1))
    assert records[0]["batch_size"] == 4
    samples, grown = 0, 0
    for r, after in zip(records, [*records[1:], None], strict=True):
        b = r["batch_size"]
        samples += b
        assert r["samples"] == samples
        assert b % r["micro_batches"] == 0
        assert b // r["micro_batches"] <= micro
        assert r["reason"] == ""
        variance, norm_sq = r["variance_trace"], r["grad_norm_sq"]
        assert r["ratio"] == pytest.approx(variance / b / (eta**2 * norm_sq), rel=1e-12)
        wanted = b
        if variance / b > eta**2 * norm_sq:
            assert r["suggestion"] == math.ceil(variance / (eta**2 * norm_sq))
            wanted = min(r["suggestion"], cap)
        else:
            assert r["suggestion"] == b
        signal = norm_sq - variance / b
        if signal > 0:
            assert r["noise_scale"] == pytest.approx(variance / signal, rel=1e-12)
        else:
            assert r["noise_scale"] is None
        if after is None:
            break
        # The controller's rule: M equal micro-batches of at most `micro` samples, rounded up to
        # that (by less than M), or down where rounding up would pass the cap.
        size, count = after["batch_size"], after["micro_batches"]
        assert b <= size <= cap
        if wanted == b:
            assert size == b
        else:
            grown += 1
            assert wanted - count < size < wanted + count
            assert size >= wanted or wanted + count > cap
    assert grown > 2
    assert samples >= 4000 > samples - records[-1]["batch_size"]
    assert summary["samples"] == samples
    assert summary["mean_batch_size"] == pytest.approx(samples / len(records))
    assert summary["validation_accuracy"] == records[-1]["accuracy"] > 0.5


def test_the_first_record_is_what_autograd_gives(tmp_path):
    """Loss, ‖ḡ‖² and tr Σ̂ of the first batch, one sample at a time in float64."""
    settings = TrainingRun(batch_size=6, max_micro_batch_size=3, samples=6, seed=5)
    run(settings, tmp_path / "run")
    (record,) = read_records(tmp_path / "run")
    digits = data.load("digits")
    torch.manual_seed(5)
    model = models.build("cnn", digits.shape, 10)
    loader = ak.AdaptiveDataLoader(digits.train, ak.BatchSizeController(6, 6), seed=5)
    x, y = next(iter(loader))
    model.double()
    gradients, losses = [], []
    for i in range(6):
        loss = torch.nn.functional.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in grads]))
        losses.append(loss.item())
    g = torch.stack(gradients)
    single = 6 * torch.finfo(torch.float32).eps * 16  # sums over 5×5×16 products, 6 samples
    assert record["micro_batches"] == 2
    assert record["loss"] == pytest.approx(sum(losses) / 6, rel=single)
    assert record["grad_norm_sq"] == pytest.approx(g.mean(0).square().sum().item(), rel=single)
    assert record["variance_trace"] == pytest.approx(g.var(0).sum().item(), rel=single)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_test_grows_the_batch(tmp_path, name):
    """By its own suggestion, wherever it failed; the strictest asks for more than the cap."""
    settings = TrainingRun(criterion=name, theta=0.3, nu=1.0, max_batch_size=128, samples=1500)
    run(settings, tmp_path / "run")
    records = read_records(tmp_path / "run")
    assert records[-1]["batch_size"] > 8
    for r, after in itertools.pairwise(records):
        failed = r["ratio"] is None or r["ratio"] > 1
        limit = 128 if r["suggestion"] is None else min(r["suggestion"], 128)
        assert after["batch_size"] == (max(limit, r["batch_size"]) if failed else r["batch_size"])


def test_fixed_batches_follow_torch_adagrad(tmp_path):
    """The baseline is plain torch: the same weights as a loop without this package's optimizers."""
    settings = TrainingRun(optimizer="adagrad", model="logistic", batch_size=32, samples=640)
    run(settings, tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert {r["reason"] for r in read_records(tmp_path / "run")} == {"a fixed batch is not tested"}
    digits = data.load("digits")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = models.build("logistic", digits.shape, 10)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=settings.lr)
    order = torch.randperm(1438, generator=torch.Generator().manual_seed(0))
    x, y = digits.train.tensors
    for k in range(20):
        batch = order[32 * k : 32 * k + 32]
        torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    for name, value in model.state_dict().items():
        assert torch.equal(saved[name], value), name


def test_fixed_batches_are_the_mean_of_their_micro_batches():
    p = torch.nn.Parameter(torch.zeros(1))
    batch = FixedBatch(torch.optim.SGD([p], lr=1.0), batch_size=4)
    batch.controller.limit_micro_batches(2)
    for slope in (1.0, 3.0):
        assert p.item() == 0
        (slope * p).sum().backward()
        batch.step()
        batch.zero_grad()
    assert batch.updated
    assert p.item() == -2
    assert p.grad is None


def test_evaluation_leaves_no_trace():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.Dropout(0.5))
    observer = ak.observe(model)
    digits = data.load("digits").validation
    first, second = evaluate(model, digits), evaluate(model, digits)
    assert first == second  # dropout is off
    assert observer.micro_batches == 0
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model[1].weight.data.zero_()
    model[1].bias.data.copy_(torch.eye(10)[4])
    share = (digits.tensors[1] == 4).double().mean().item()
    loss, accuracy = evaluate(model, digits)
    assert accuracy == pytest.approx(share)
    right, wrong = math.log(9 + math.e) - 1, math.log(9 + math.e)
    assert loss == pytest.approx(share * right + (1 - share) * wrong, rel=1e-6)


def test_a_loss_that_is_not_finite_keeps_the_batch_size(tmp_path, caplog):
    settings = TrainingRun(model="logistic", lr=3e38, batch_size=4, max_batch_size=64, samples=200)
    summary = run(settings, tmp_path / "run")
    records = read_records(tmp_path / "run")
    lost = [r for r in records if r["loss"] is None]
    assert len(lost) > 2
    assert records[-len(lost) :] == lost  # it never comes back
    for r in lost:
        assert r["batch_size"] == lost[0]["batch_size"] < 64
        assert r["reason"] == "the gradient statistics are not finite"
        assert r["ratio"] is None
        assert r["grad_norm_sq"] is None
    assert summary["training_loss"] is None
    assert "batch size stays" in caplog.text
    assert "not finite" in report.table({"run": summary})


def test_one_sample_a_batch_is_never_tested(tmp_path, caplog):
    run(TrainingRun(model="logistic", batch_size=1, samples=5), tmp_path / "run")
    records = read_records(tmp_path / "run")
    assert [r["batch_size"] for r in records] == [1] * 5
    assert all("one sample has no variance" in r["reason"] for r in records)
    assert "start from 2" in caplog.text


# The report


def test_smoothing_weighs_samples():
    loss = np.array([1.0, 3.0, math.nan, 5.0])
    size = np.array([10.0, 30.0, 10.0, 1e9])
    a, b = 1 - math.exp(-10 / 20), 1 - math.exp(-30 / 20)
    second = ((1 - b) * a * 1 + b * 3) / ((1 - b) * a + b)
    found = report.smooth(loss, size, samples=20)
    np.testing.assert_allclose(found, [1.0, second, math.nan, 5.0], rtol=1e-12)


def test_the_log_of_a_running_run_is_read(tmp_path):
    record = {"samples": 8, "step": 1, "batch_size": 8, "loss": None}
    (tmp_path / "log.jsonl").write_text(json.dumps(record) + "\n" + '{"samples": 16, "st')
    log = report.read_log(tmp_path)
    assert log["samples"].tolist() == [8]
    assert math.isnan(log["loss"][0])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("", "no step yet"), ("[]\n", "not the log"), ("{x\n", "not the log")],
)
def test_what_is_not_a_log_is_said(tmp_path, content, message):
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        report.read_log(tmp_path)
