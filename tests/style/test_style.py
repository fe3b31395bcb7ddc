"""The rules of docs/architecture.md and CONTRIBUTING.md that a program can check."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "kvik"
MODULES = sorted(SOURCE.rglob("*.py"))
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Whoever stands further left may import what stands further right; within one group anything goes.
LAYERS = [
    {"__main__", "cli", "server"},
    {"settings", "llm", "async_llm", "openai_format", "ops"},
    {"llm_engine", "startup"},
    {"text"},
    {"distributed", "resolve"},
    {"runtime"},
    {"models", "quantization"},
    {"layers"},
    {"attention", "sampling"},
    {"structured"},
    {"kernels"},
]
# core/ may be imported by everything above distributed/; below it only the plan and the request are known.
EVERYONE = {
    "__init__",
    "config",
    "errors",
    "fields",
    "log",
    "mailbox",
    "metrics",
    "outputs",
    "sampling_params",
    "server_config",
    "tracing",
}
CORE_IS_FOR = {"cli", "server", "settings", "llm", "async_llm", "llm_engine", "startup", "core"}
SHARED_CORE = {"core.plan", "core.request"}
NO_TORCH = {
    "core",
    "structured",
    "text",
    "config",
    "errors",
    "fields",
    "outputs",
    "sampling_params",
    "metrics",
    "tracing",
    "settings",
}


def _name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def _level(package: str) -> int:
    return next(i for i, group in enumerate(LAYERS) if package in group)


def _allowed(importer: str, imported: str) -> bool:
    source, target = importer.split(".")[0], imported.split(".")[0]
    if target in EVERYONE or source == target:
        return True
    if target == "core":
        return source in CORE_IS_FOR or imported in SHARED_CORE
    if source == "core":
        return imported == "distributed.executor"
    return source not in EVERYONE and _level(source) <= _level(target)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_point_one_way(path: Path) -> None:
    name = _name(path)
    if name == "__init__":
        return
    inner = [module.removeprefix("kvik.") for module in _imports(path) if module.startswith("kvik.")]
    wrong = [module for module in inner if not _allowed(name, module)]
    assert not wrong, f"{name} must not import {wrong}"


@pytest.mark.parametrize("path", [p for p in MODULES if _name(p).split(".")[0] in NO_TORCH], ids=_name)
def test_the_token_half_knows_no_tensors(path: Path) -> None:
    heavy = {module for module in _imports(path) if module.split(".")[0] in {"torch", "triton"}}
    assert not heavy


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES, f"{path.name} has {len(text.splitlines())} lines"
    for node in ast.walk(_tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{path.name}:{node.name} has {lines} lines"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name not in ("__init__.py", "__main__.py")], ids=_name)
def test_modules_say_what_they_hold(path: Path) -> None:
    tree = _tree(path)
    assert ast.get_docstring(tree), f"{path} has no docstring"
    names = [
        [ast.literal_eval(item) for item in node.value.elts]
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
        and isinstance(node.value, (ast.List, ast.Tuple))
    ]  # fmt: skip
    assert names, f"{path} has no __all__"
    defined = {getattr(node, "name", None) for node in tree.body}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    assert set(names[0]) <= defined, f"{path}: __all__ names what is not defined here"


def test_public_names_resolve() -> None:
    import kvik

    assert list(kvik.__all__) == sorted(kvik.__all__)
    assert len(kvik.__all__) <= 15
    for name in kvik.__all__:
        assert getattr(kvik, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = kvik.NoSuchName


def test_the_word_cuda_stays_in_its_rooms() -> None:
    rooms = {"config", "runtime.platform", "runtime.graphs", "runtime.gpu_runner", "runtime.token_ring"}
    outside = [
        _name(path)
        for path in MODULES
        if _name(path) not in rooms
        and not _name(path).startswith(("kernels.triton", "cli"))
        and "cuda" in path.read_text()
    ]
    assert not outside


def test_nothing_is_caught_blindly_or_printed() -> None:
    for path in MODULES:
        for node in ast.walk(_tree(path)):
            bare = isinstance(node, ast.ExceptHandler) and node.type is None
            assert not bare, f"{path}:{node.lineno} catches everything"
            printed = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not printed or _name(path).startswith("cli"), f"{path}:{node.lineno} prints"
        text = path.read_text()
        assert "import pickle" not in text and "trust_remote_code=True" not in text


def test_import_is_light() -> None:
    heavy = "('torch', 'triton', 'transformers', 'tokenizers')"
    code = f"import sys, kvik, kvik.cli.main; print(sorted(m for m in sys.modules if m.split('.')[0] in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_engine_on_a_cpu_touches_neither_triton_nor_transformers() -> None:
    code = "import sys, kvik.llm; print(sorted({m.split('.')[0] for m in sys.modules} & {'triton', 'transformers'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def _resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_docs_name_things_that_exist(path: Path) -> None:
    text = path.read_text()
    dotted = set(re.findall(r"`(kvik(?:\.[A-Za-z_]\w*)+)(?:\(\))?`", text))
    missing = sorted(name for name in dotted if not _resolves(name))
    files = set(re.findall(r"`((?:src|tests|tools|docs|benchmarks|[a-z]+)/[\w./-]+\.(?:py|md|json|jsonl|toml))`", text))
    missing += sorted(file for file in files if not (ROOT / file).exists() and not (SOURCE / file).exists())
    for file, symbol in re.findall(r"`([\w/]+\.py):(\w+)`", text):
        source = next((base / file for base in (ROOT, SOURCE) if (base / file).exists()), None)
        if source is None or not re.search(
            rf"^\s*(?:async )?(?:def|class) {symbol}\b|^{symbol}\b", source.read_text(), re.M
        ):
            missing.append(f"{file}:{symbol}")
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
        if not (path.parent / target).exists():
            missing.append(target)
    assert not missing, f"{path.name} names {missing}"


def test_both_readmes_show_the_same_commands() -> None:
    def blocks(name: str) -> list[str]:
        return re.findall(r"```\w*\n(.*?)```", (ROOT / name).read_text(), re.S)

    assert blocks("README.md") == blocks("README.zh-CN.md")
