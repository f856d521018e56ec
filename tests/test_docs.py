"""README and docs/: the code runs and prints what they show, what they name is there."""

import ast
import contextlib
import doctest
import functools
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import adagrad_kernels as ak

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
)
COMPLETE = ("README.md", "docs/tutorial.md", "docs/how-it-works.md", "docs/limits.md")
"""Their blocks run one after another; those of other pages are parts of programs."""

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[tuple[int, str, str | None]]:
    """Line number, code and expected output (the `text` block right after it) of Python blocks."""
    text = read(page)
    for found in re.finditer(
        r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, re.DOTALL | re.MULTILINE
    ):
        yield text[: found.start()].count("\n") + 1, found[1], found[2]


def readers_names() -> dict[str, Any]:
    """What someone who tries the README has: models and data."""
    return {
        "ak": ak,
        "torch": torch,
        "F": F,
        "nn": nn,
        "model": nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)),
        "net": nn.Linear(12, 3),
        "dataset": TensorDataset(torch.randn(96, 12), torch.arange(96) % 3),
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder to write to, a process group of one, and a compiler that is quick."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", eager)  # Inductor: test_compile_training.py
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# What torch's compiler warns of while it looks at custom functions and its own modules.
@pytest.mark.filterwarnings("ignore:<class .*Function'> should not be inst:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("page", COMPLETE)
def test_code_runs(page: str, place: None) -> None:
    pytest.importorskip("sklearn")
    names: dict[str, Any] = readers_names() if page == "README.md" else {}
    for line, code, expected in blocks(page):
        padded = "\n" * line + code  # tracebacks show the page's line numbers
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(padded, page, "exec"), names)
        if expected is not None:
            same = doctest.OutputChecker().check_output(expected, out.getvalue(), FLAGS)
            assert same, f"{page}:{line} prints\n{out.getvalue()}"


@pytest.mark.parametrize("page", PAGES)
def test_code_is_python(page: str) -> None:
    for line, code, _ in blocks(page):
        compile("\n" * line + code, page, "exec")


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def anchors(page: str) -> set[str]:
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    return {anchor(found) for found in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page}: {target}"
        if fragment:
            other = found.resolve().relative_to(ROOT).as_posix()
            assert fragment in anchors(other), f"{page}: {target}"


LOGS = {"debug", "info", "warning", "error", "warn"}
FAULTS = {"faults.py", "selfcheck.py"}
"""What these find is raised elsewhere, at the end of the pass."""


def said(file: Path) -> Iterator[ast.AST]:
    """What a module raises or logs, with the variables and functions it is made of."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    definitions: dict[str, list[ast.AST]] = {}
    todo: list[ast.AST] = []
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name, body=body):
                definitions.setdefault(name, []).extend(body[ast.get_docstring(node) is not None :])
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                definitions.setdefault(name, []).append(value)
            case ast.Raise(exc=ast.AST()):
                todo.append(node)
            case ast.Call(func=ast.Attribute(attr=attribute)) if attribute in LOGS:
                todo.append(node)
    if file.name in FAULTS:
        todo += [node for nodes in definitions.values() for node in nodes]
    while todo:
        for node in ast.walk(todo.pop()):
            yield node
            if isinstance(node, ast.Name):
                todo += definitions.pop(node.id, [])


def messages() -> list[str]:
    """Every string that the package raises or logs, with what is formatted into it cut out."""
    return [
        node.value
        for file in (ROOT / "adagrad_kernels").rglob("*.py")
        for node in said(file)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_the_errors_that_the_tutorial_explains() -> None:
    """Each fragment in the table's first column is part of what the package raises or logs."""
    table = read("docs/tutorial.md").partition("## Errors and what they mean")[2]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    fragments = [part for row in rows for part in re.findall(r"`([^`]+)`", row)]
    assert len(fragments) > 15
    known = messages()
    missing = [part for part in fragments if not any(part in text for text in known)]
    assert not missing


def test_the_readme_names_what_there_is() -> None:
    text = read("README.md")
    assert len(text.splitlines()) <= 200
    names = {name for name in ak.__all__ if getattr(getattr(ak, name), "needs", None)}
    names |= set(ak.ops.NAMES) - {"pool_samples"}  # of no use by itself
    assert sorted(name for name in names if f"`{name}" not in text) == []


def test_the_error_that_the_readme_shows() -> None:
    (shown,) = re.findall(r"^UnsupportedLayerError: (.*?)^```", read("README.md"), re.M | re.S)
    with pytest.raises(ak.UnsupportedLayerError) as caught:
        ak.observe(nn.Sequential(nn.Linear(12, 8), nn.Bilinear(8, 8, 3)))
    assert doctest.OutputChecker().check_output(shown, f"{caught.value}\n", FLAGS)


def script(name: str) -> ModuleType:
    """A program in docs/."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures(tmp_path: Path) -> None:
    """The page shows what is drawn; committed are the pictures that the program draws today."""
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    drawn = script("pictures").draw(tmp_path)
    names = {path.name for path in drawn}
    assert names == set(re.findall(r"\(pictures/([\w-]+\.png)\)", read("docs/how-it-works.md")))
    for path in drawn:
        committed = ROOT / "docs" / "pictures" / path.name
        assert committed.stat().st_size < 100_000
        with image.open(path) as now, image.open(committed) as then:
            assert now.size == then.size
            if now.info["Software"] != then.info["Software"]:
                continue  # each Matplotlib places text a little differently
            difference = torch.from_numpy(np.asarray(now) - np.asarray(then, np.float32)).abs()
        changed = (difference > 25).any(-1).double().mean()
        assert changed < 1e-4, f"{path.name} is not what docs/pictures.py draws: run it"


def test_api_reference(tmp_path: Path) -> None:
    """Builds without a warning (an error here); modules that need other libraries are left out."""
    pytest.importorskip("pdoc")
    api = script("api")
    own = [module for module in api.MODULES if ".integrations." not in module]
    api.build(tmp_path, own)
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert {f"{module.replace('.', '/')}.html" for module in own} < pages
    shown = (tmp_path / "adagrad_kernels.html").read_text(encoding="utf-8")
    things = [name for name in ak.__all__ if callable(getattr(ak, name))]
    assert [name for name in things if f'id="{name}"' not in shown] == []
