"""Nothing that comes from outside may run code here: no file of the project calls what would let it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("moba_train", "kernels", "launch", "docs", "data")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

MODULES = {"cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "yaml", "imp"}
"""Modules that build objects, or code, from bytes; their import is refused."""
PICKLE = {"dumps", "UnpicklingError"}
"""What anyone may use of pickle: writing."""
UNPICKLERS = {"moba_train/train/megatron_io.py": {"Unpickler"}}
"""Who may use more of it: the reader of `.metadata`, whose unpickler resolves a list of names and no other."""
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp", "runpy.run_path",
    "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.serialization.add_safe_globals",
    "torch.serialization.safe_globals", "np.lib.format.read_array", "numpy.lib.format.read_array",
    "pandas.read_pickle", "pd.read_pickle", "np.fromregex",
}  # fmt: skip
METHODS = {"load_checkpoint", "from_pretrained"}
"""Methods of libraries that unpickle files by themselves (DeepSpeed's engine, Transformers)."""
REQUIRED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
"""Calls that are safe with an argument, which must be written out."""


def offences(tree: ast.AST, more_of_pickle: set[str]) -> Iterator[str]:
    """What a module does that it may not, each with its line."""
    for node in ast.walk(tree):
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                if name.split(".")[0] in MODULES or (name == "pickle" and isinstance(node, ast.ImportFrom)):
                    yield f"{line} imports {name}"
        of_pickle = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"
        if of_pickle and node.attr not in PICKLE | more_of_pickle:
            yield f"{line} uses pickle.{node.attr}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if called in CALLS or (called.split(".")[-1] in METHODS and "." in called):
            yield f"{line} calls {called}"
        if called in REQUIRED and keywords.get(REQUIRED[called][0]) is not REQUIRED[called][1]:
            yield f"{line} calls {called} without {'='.join(map(str, REQUIRED[called]))}"
        if keywords.get("allow_pickle") or keywords.get("trust_remote_code") or keywords.get("shell"):
            yield f"{line} calls {called} with {ast.unparse(node)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_of_the_project_unpickles_or_evaluates_what_it_reads(path: Path) -> None:
    more_of_pickle = UNPICKLERS.get(path.relative_to(ROOT).as_posix(), set())
    assert list(offences(ast.parse(path.read_text("utf-8")), more_of_pickle)) == []


def test_the_one_unpickler_resolves_a_closed_list() -> None:
    tree = ast.parse((ROOT / "moba_train/train/megatron_io.py").read_text("utf-8"))
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} == {"pickle.Unpickler", "pickle.UnpicklingError"}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    [unpickler] = [c for c in classes if any(ast.unparse(base) == "pickle.Unpickler" for base in c.bases)]
    assert [f.name for f in unpickler.body if isinstance(f, ast.FunctionDef)] == ["find_class"]
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert calls.count(unpickler.name) == 1


@pytest.mark.parametrize(
    "text",
    [
        "pickle.loads(content)",
        "from pickle import loads",
        "pickle.Unpickler(stream)",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "engine.load_checkpoint(path)",
        "subprocess.run(text, shell=True)",
        "import yaml",
    ],
)
def test_a_forbidden_call_is_found(text: str) -> None:
    assert list(offences(ast.parse(text), set())) != []


def test_what_is_safe_is_allowed() -> None:
    text = "torch.load(path, weights_only=True); np.load(path, allow_pickle=False); load_checkpoint(path); model.eval()"
    assert list(offences(ast.parse(text), set())) == []
