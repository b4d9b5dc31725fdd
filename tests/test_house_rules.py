"""Sizes, and the few things that code here never does."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Function = ast.FunctionDef | ast.AsyncFunctionDef
Sources = dict[Path, ast.Module]

MAX_FILE, MAX_KERNEL_FILE, MAX_FUNCTION, MAX_PARAMETERS = 300, 450, 60, 8


def _functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def _is_kernel(function: Function) -> bool:
    """Whether Triton compiles it."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def _lines(function: Function) -> int:
    first = function.body[0]
    if ast.get_docstring(function) is None:
        return (function.end_lineno or 0) - function.lineno + 1
    return (function.end_lineno or 0) - (first.end_lineno or 0) + first.lineno - function.lineno


def _options(path: Path, function: Function) -> int:
    """Lines of the option list of a command, which is documentation for its users."""
    return function.body[0].lineno - function.lineno if path.as_posix().startswith("cli/commands/") else 0


def _parameters(function: Function) -> int:
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def _is_call_of(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in names


def _uses_pickle(node: ast.AST) -> bool:
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in modules for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return not node.level and (node.module or "").split(".")[0] in modules
    return _is_call_of(node, "torch.load", "torch.save")


def _trusts_remote_code(node: ast.AST) -> bool:
    if not isinstance(node, ast.keyword) or node.arg != "trust_remote_code":
        return False
    return not (isinstance(node.value, ast.Constant) and node.value.value is False)


def _reads_environment(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv")


def _imports_itself_absolutely(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == "vdit_quant" for alias in node.names)
    return isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "vdit_quant"


def _outside(path: Path, *allowed: str) -> bool:
    return not any(path.as_posix().startswith(prefix) for prefix in allowed)


def _never(sources: Sources, forbidden: Callable[[ast.AST], bool], *allowed: str) -> list[str]:
    return [
        f"{path}:{getattr(node, 'lineno', '?')}"
        for path, tree in sources.items()
        if _outside(path, *allowed)
        for node in ast.walk(tree)
        if forbidden(node)
    ]


def test_files_are_short(package_sources: Sources, root: Path) -> None:
    lengths = {path: len((root / path).read_text(encoding="utf-8").splitlines()) for path in package_sources}
    long = {
        str(path): lines
        for path, lines in lengths.items()
        if lines > (MAX_KERNEL_FILE if path.as_posix().startswith("kernels/_triton/") else MAX_FILE)
    }
    assert not long


def test_functions_are_short(package_sources: Sources) -> None:
    long = {
        f"{path}:{function.name}": _lines(function)
        for path, tree in package_sources.items()
        for function in _functions(tree)
        if not _is_kernel(function) and _lines(function) - _options(path, function) > MAX_FUNCTION
    }
    assert not long


def test_functions_have_few_parameters(package_sources: Sources) -> None:
    many = {
        f"{path}:{function.name}": _parameters(function)
        for path, tree in package_sources.items()
        if _outside(path, "cli/commands/", "runtime/models/")  # options of a command, fields of a model's config
        for function in _functions(tree)
        if not _is_kernel(function) and _parameters(function) > MAX_PARAMETERS
    }
    assert not many


def test_only_the_command_line_prints(package_sources: Sources) -> None:
    assert not _never(package_sources, lambda node: _is_call_of(node, "print"), "cli/")


def test_settings_come_from_the_environment_in_one_place(package_sources: Sources) -> None:
    assert not _never(package_sources, _reads_environment, "kernels/dispatch.py", "cli/")


def test_the_package_imports_itself_relatively(package_sources: Sources) -> None:
    assert not _never(package_sources, _imports_itself_absolutely)


def test_nothing_unpickles_or_runs_downloaded_code(package_sources: Sources, root: Path) -> None:
    scripts = [path for folder in ("benchmarks", "examples") for path in sorted((root / folder).rglob("*.py"))]
    sources = dict(package_sources)
    sources.update({p.relative_to(root): ast.parse(p.read_text(encoding="utf-8")) for p in scripts})
    assert not _never(sources, _uses_pickle)
    assert not _never(sources, _trusts_remote_code)


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (_uses_pickle, "import pickle"),
        (_uses_pickle, "def f():\n    from pickle import loads"),
        (_uses_pickle, "torch.load('x')"),
        (_trusts_remote_code, "f(trust_remote_code=True)"),
        (_trusts_remote_code, "f(trust_remote_code=flag)"),
        (_reads_environment, "os.environ['X']"),
        (_reads_environment, "os.getenv('X')"),
        (_imports_itself_absolutely, "from vdit_quant.quantize import spec"),
        (lambda node: _is_call_of(node, "print"), "def f():\n    print(1)"),
    ],
)
def test_the_checks_see_what_they_look_for(check: Callable[[ast.AST], bool], text: str) -> None:
    assert any(check(node) for node in ast.walk(ast.parse(text)))


def test_the_size_checks_count_right() -> None:
    body = "\n".join(f"    x{i} = {i}" for i in range(60))
    long, documented = (
        next(_functions(ast.parse(f"def f(self, a, *, b):\n{doc}{body}"))) for doc in ("", '    """One\n    two."""\n')
    )
    assert (_lines(long), _lines(documented), _parameters(long)) == (61, 61, 2)
