"""The package builds, installs into an empty environment and works from there."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from packaging.requirements import Requirement

from adagrad_kernels import _build
from adagrad_kernels._version import __version__

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    ".ci",
    ".clang-format",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "adagrad_kernels",
    "benchmarks",
    "csrc",
    "docs",
    "examples",
    "pyproject.toml",
    "setup.py",
    "tests",
    "tools",
]
"""Everything that is committed, but for .gitignore."""

PROGRAM = """
import sys
from pathlib import Path
import torch
import adagrad_kernels as ak

home = Path(sys.prefix).resolve()
assert Path(ak.__file__).resolve().is_relative_to(home), ak.__file__
libraries = [p for p in torch.ops.loaded_libraries if "adagrad_kernels" in p]
assert libraries and all(Path(p).resolve().is_relative_to(home) for p in libraries), libraries

torch.manual_seed(0)
g = torch.randn(5, 7)
total, total_sq, norms_sq = ak.ops.sample_statistics(g)
torch.testing.assert_close(total, g.sum(0))
torch.testing.assert_close(total_sq, g.square().sum(0))
torch.testing.assert_close(norms_sq, g.square().sum(1))

model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
opt = ak.AdAdaGrad(model, lr=0.1, criterion=ak.NormTest(0.5), batch_size=4, max_batch_size=64)
for _ in range(3):
    x, y = torch.randn(opt.batch_size, 8), torch.randint(3, (opt.batch_size,))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
    opt.zero_grad()
    assert opt.updated
print("version", ak.__version__)
"""


def run(*command: object, cwd: Path) -> str:
    """The output of a command that sees no PYTHON* variable of this process."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


BUILD = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]


def files(folder: Path) -> set[str]:
    """But for what Python and setuptools leave there."""
    found = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    return {name for name in found if "__pycache__" not in name and ".egg-info/" not in name}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of this tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree)
    return tree


@pytest.fixture(scope="module")
def unpacked(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of the copy, unpacked."""
    work = tmp_path_factory.mktemp("sdist")
    run(*BUILD, work, "--sdist", tree, cwd=work)
    (archive,) = work.glob("*.tar.gz")
    run("tar", "-xf", archive, cwd=work)
    return archive.with_suffix("").with_suffix("")


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from the source distribution."""
    work = tmp_path_factory.mktemp("wheel")
    run(*BUILD, work, "--wheel", unpacked, cwd=work)
    (made,) = work.glob("*.whl")
    return made


@pytest.fixture
def empty_python(tmp_path: Path) -> Path:
    """The interpreter of a new virtual environment without any package."""
    venv.create(tmp_path / "venv", with_pip=False)
    return tmp_path / "venv" / "bin" / "python"


@pytest.mark.packaging
def test_source_distribution_holds_everything(tree: Path, unpacked: Path) -> None:
    """What `make lint`, `test` and `bench` need: all that is here, and what setuptools adds."""
    assert files(unpacked) == files(tree) | {"PKG-INFO", "setup.cfg"}


@pytest.mark.packaging
def test_wheel_holds_everything(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA")))
    assert "adagrad_kernels/_C.abi3.so" in names
    assert any(re.fullmatch(r"adagrad_kernels/_build\.cpython-.*\.so", name) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for path in (ROOT / "adagrad_kernels").rglob("*"):
        if path.suffix in (".py", ".pyi", ".typed"):
            assert path.relative_to(ROOT).as_posix() in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"adagrad_kernels"}
    assert f"\nVersion: {__version__}\n" in metadata.decode()


@pytest.mark.packaging
def test_wheel_works_from_an_empty_environment(
    wheel: Path, empty_python: Path, tmp_path: Path
) -> None:
    # torch and what it needs come from this environment, but after the new one's own packages
    found = run(empty_python, "-c", "import sysconfig as s; print(s.get_path('purelib'))", cwd=ROOT)
    shared = [entry for entry in sys.path if entry.endswith("-packages")]
    Path(found.strip(), "shared.pth").write_text("\n".join(shared) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", empty_python]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    output = run(empty_python, "-c", PROGRAM, cwd=tmp_path)
    assert output.splitlines()[-1] == f"version {__version__}"
    assert "train" in run(empty_python.with_name("adagrad-kernels"), "--help", cwd=tmp_path)


@pytest.mark.packaging
def test_build_asks_for_torch_only_where_there_is_none(empty_python: Path, tmp_path: Path) -> None:
    where = f"import sys; sys.path[:0] = [{str(ROOT / 'tools')!r}]; "
    ask = "import build_backend as b; print(b.get_requires_for_build_wheel())"
    assert run(sys.executable, "-c", where + ask, cwd=tmp_path).strip() == "[]"
    # setuptools, as in an isolated build; its neighbour torch must not count
    packages = str(Path(setuptools.__file__).parents[1])
    path = f"sys.path.append({packages!r}); "
    answer = run(empty_python, "-c", where + path + ask, cwd=tmp_path).strip()
    (requirement,) = re.findall(r"'(torch.*)'", answer)
    assert f'dependencies = ["{requirement}"' in (ROOT / "pyproject.toml").read_text()


def test_the_build_knows_which_torch_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    torch_range = importlib.import_module("torch_range")
    specifier = Requirement(torch_range.REQUIREMENT).specifier
    versions = ["1.13.1", "2.9.1", "2.10.0", "2.11.0", "2.12.1+cpu", "2.14.3", "2.15.0", "3.0.0"]
    assert [torch_range.fits(v) for v in versions] == [specifier.contains(v) for v in versions]
    assert torch_range.fits(torch.__version__)


def test_build_facts() -> None:
    assert re.match(r"(gcc|clang) \d+", _build.compiler)
    assert "-fopenmp" in _build.flags
    assert not any("/" in flag for flag in _build.flags)
    assert re.match(r"2\.\d+", _build.torch_version)
    assert _build.cxx_standard >= 201703
    assert _build.openmp > 0
    assert _build.instruction_sets[0] == "baseline"
    assert _build.cuda.startswith("compiled by nvcc" if _build.cuda_archs else "not compiled: ")
