"""`adagrad-kernels profile` on a model of the user's, and the function behind it."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layer_cases import Attention, Custom, between
from torch import Tensor, nn

import adagrad_kernels as ak
from adagrad_kernels import profiling
from adagrad_kernels.cli import main
from adagrad_kernels.costs import Cost
from adagrad_kernels.coverage import Coverage
from adagrad_kernels.profiling import LayerProfile, Profile, StepProfile, profile
from adagrad_kernels.profiling_report import FIXED

TESTS = ["norm test", "inner-product test", "norms + coordinates"]
MODELS = '''
"""Models, and things that are none."""
import sys
import helper
from torch import nn

def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.GroupNorm(2, 4), nn.Flatten(),
        nn.Linear(helper.WIDTH, 5),
    )

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, tokens):
        return {"logits": None} if len(tokens) == 7 else (self.head(self.embedding(tokens)), None)

def bag():
    return nn.Sequential(nn.EmbeddingBag(11, 4, scale_grad_by_freq=True), nn.Linear(4, 4))

def summed():
    class Sum(nn.Linear):
        def forward(self, x):
            return nn.Linear.forward(self, x).sum()
    return nn.Sequential(nn.Linear(4, 4), nn.Flatten(0))

def frozen():
    return nn.Linear(4, 4).requires_grad_(False)

def folded():
    return nn.Sequential(nn.Linear(4, 4), nn.Flatten(0, 1), nn.Linear(4, 4))

def number():
    return 3

def broken():
    return nn.Linear(-1, 4)

def leaves():
    sys.exit(3)

def stops():
    raise KeyboardInterrupt

class LeavesLater(nn.Linear):
    def __init__(self):
        super().__init__(3, 4)

    def forward(self, x):
        sys.exit("no more")
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "helper.py").write_text("WIDTH = 4 * 6 * 6\n")
    (tmp_path / "wrong.py").write_text("import no_such_module\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit()\n")
    (tmp_path / "text.txt").write_text("not Python\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_profile_from_the_shell(folder: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(ak.__file__).parents[1])}
    command = [
        sys.executable, "-m", "adagrad_kernels", "profile", "models.py:cnn", "--input-shape",
        "6,3,8,8", "--threads", "1", "--repeats", "3", "--coordinates",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    tables = [table.splitlines() for table in done.stdout.split("\n\n")]
    coverage, layers, steps = tables
    names = ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    assert [line.split()[0] for line in coverage[1:7]] == names
    layers = [line for line in layers if not line.startswith(tuple(FIXED.splitlines()))]
    assert [line.split()[:2] for line in layers[1:]] == [
        ["0", "Conv2d"], ["2", "GroupNorm"], ["4", "Linear"],
    ]  # fmt: skip
    for line in layers[1:]:
        plain, observed = (float(word) for word in line.split()[-2:])
        assert 0 < plain < 1000
        assert 0 < observed < 1000
    assert "Adagrad" in steps[0]
    assert [line[:19].strip() for line in steps[2:]] == TESTS
    for line in steps[2:]:
        ratio, low, _, high, ms = line[19:].split()
        assert 0 < float(low) <= float(ratio) <= float(high)
        assert 0 < float(ms) < 1000
    assert not (folder / "runs").exists()


def test_profile_of_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["profile", "models.py:Language", "--input-shape", "6,5", "--repeats", "1"]
    assert main([*arguments, "--input-dtype", "int64", "--vocab", "11"]) == 0
    out = capsys.readouterr().out
    assert "sorted tokens" in out
    assert "embedding  Embedding" in out


def test_profile_with_vmap(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own.py").write_text(
        "import torch\n"
        "class Own(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.ones(4))\n"
        "    def forward(self, x):\n"
        "        return x * self.scale\n"
    )
    arguments = ["profile", "own.py:Own", "--input-shape", "6,4", "--repeats", "1"]
    assert main([*arguments, "--fallback", "vmap"]) == 0
    assert "unknown" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "(the model itself)" in capsys.readouterr().err


def test_profile_of_folded_layers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["profile", "models.py:folded", "--input-shape", "2,3,4", "--repeats", "1"]
    assert main([*arguments, "--folded", "2", "--loss", "mean"]) == 0
    out = capsys.readouterr().out
    assert out.count("direct") == 4  # both layers take three positions a sample
    assert main([*arguments, "--folded", "3"]) == 2
    assert "folded: '3' is no module of the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "shape", "options", "message"),
    [
        ("nowhere.py:cnn", "2,3", "", "nowhere.py does not exist"),
        ("models.py", "2,3", "", "expected MODEL.py:FUNCTION, got 'models.py'"),
        ("text.txt:cnn", "2,3", "", "text.txt is not a Python file"),
        ("wrong.py:cnn", "2,3", "", "wrong.py cannot be imported: ModuleNotFoundError: No module"),
        ("models.py:mlp", "2,3", "", "models.py has no function 'mlp'; it has cnn, Language, bag"),
        ("models.py:number", "2,3", "", "number() of models.py returned int, not an nn.Module"),
        ("models.py:broken", "2,3", "", "broken() of models.py failed: RuntimeError: "),
        ("models.py:leaves", "2,3", "", "leaves() of models.py failed: SystemExit: 3"),
        ("script.py:cnn", "2,3", "", "script.py cannot be imported: SystemExit"),
        ("models.py:LeavesLater", "2,3", "", "[2, 3], float32: SystemExit: no more"),
        ("models.py:cnn", "2,3,8", "", "the model fails on an input of shape [2, 3, 8], float32: "),
        ("models.py:cnn", "2,0", "", "argument --input-shape: invalid shape value: '2,0'"),
        ("models.py:cnn", "2,3,8,8", "--device abacus", "device 'abacus': "),
        ("models.py:cnn", "2,3,8,8", "--repeats 0", "repeats must be at least 1, got 0"),
        ("models.py:cnn", "2,3,8,8", "--vocab 5", "--input-dtype int64 and --vocab go together"),
        ("models.py:Language", "2,3", "--input-dtype int64", "and --vocab go together"),
        (
            "models.py:Language", "7,3", "--input-dtype int64 --vocab 11",
            "the model returns dict, not a tensor",
        ),
        ("models.py:summed", "2,4", "", "the model's has the shape [8]: take --loss mean"),
        ("models.py:frozen", "2,4", "", "no gradient of the model: "),
        ("models.py:folded", "2,3,4", "", "the layers disagree about the number of samples"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(
    folder: Path, capsys, model: str, shape: str, options: str, message: str
) -> None:
    assert main(["profile", model, "--input-shape", shape, *options.split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("adagrad-kernels: ")
    assert message in lines[0]


def test_an_interruption_is_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "models.py:stops", "--input-shape", "2,3"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_unsupported_layer_is_named_with_the_ways_out(folder: Path, capsys) -> None:
    arguments = ["profile", "models.py:bag", "--input-shape", "3,2", "--input-dtype", "int64"]
    assert main([*arguments, "--vocab", "11"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "layer '0' (EmbeddingBag) has trainable parameters" in line
    assert "Freeze the parameters" in line
    assert line.endswith("Here: --fallback vmap.")


def squares(output: Tensor) -> Tensor:
    return output.square().mean()


def test_the_model_stays_as_it_is(threads: None) -> None:
    model = Attention(batch_first=True).eval()
    before = copy.deepcopy(model.state_dict())
    found = profile(model, torch.randn(4, 5, 4), loss=squares, repeats=1)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    assert type(model.attention) is nn.MultiheadAttention
    assert not model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    # Attention is one unit, with the layer inside it.
    assert [(layer.name, layer.layer) for layer in found.layers] == [
        ("linear", "Linear"), ("attention", "MultiheadAttention"),
    ]  # fmt: skip
    costs = found.coverage.costs()
    whole = found.layers[1].cost
    assert whole == costs["attention"] + costs["attention.out_proj"]


def test_a_layer_that_costs_more_shows_it() -> None:
    """A module measured by vmap computes one gradient a sample, a linear layer beside it none."""
    model = nn.Sequential(*between(Custom(), 4)[:2])
    found = profile(model, torch.randn(64, 5), loss=squares, fallback="vmap", repeats=5)
    linear, custom = found.layers
    assert (linear.cost is None, custom.cost is None) == (False, True)
    assert custom.overhead == custom.observed / custom.plain - 1
    with pytest.raises(ak.UnsupportedLayerError):
        profile(model, torch.randn(6, 5), loss=squares, repeats=1)
    assert [step.name for step in found.steps] == TESTS


def test_steps_take_turns_with_one_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio is that of two neighbours: what slows the machine for a turn is in both."""
    seconds = {
        "plain": [2.0, 4.0, 200.0],
        "norm": [3.0, 8.0, 300.0],
        "inner": [4.0, 4.0, 400.0],
        "coordinates": [5.0, 6.0, 700.0],
    }
    seen = []

    def turns(runs, *_: object, **__: object) -> dict[str, list[float]]:
        seen.append(list(runs))
        return dict(zip(runs, list(seconds.values())[: len(runs)], strict=True))

    monkeypatch.setattr(profiling, "take_turns", turns)
    found = profile(nn.Linear(4, 3), torch.randn(5, 4), loss=squares, repeats=3)
    assert seen[-1] == [found.baseline, *TESTS]
    norm, _, coordinates = found.steps
    assert norm.plain == coordinates.plain == 4
    assert (norm.seconds, coordinates.seconds) == (8, 6)
    assert norm.ratios == (1.5, 2.0, 1.5)
    assert norm.quartiles == (1.5, 1.5, 1.75)
    assert coordinates.ratio == 2.5
    assert "1.50 to 1.75" in str(found)


@pytest.mark.parametrize(
    ("plain", "observed", "told"),
    [
        (30e-6, 70e-6, True),  # 133 % where 2 % are estimated
        (30e-6, 31e-6, False),
        (5e-3, 9e-3, False),  # not a matter of microseconds
    ],
)
def test_the_fixed_overhead_of_quick_layers_is_explained(
    plain: float, observed: float, told: bool
) -> None:
    cost = Cost("direct", flops=100, bytes=100, extra_flops=2, extra_bytes=2)
    layer = LayerProfile("0", "Linear", cost, plain, observed)
    step = StepProfile("norm test", 1.0, 1.5, (1.5,))
    found = Profile(Coverage(), [layer], [step], "plain")
    assert (FIXED in str(found)) == told
