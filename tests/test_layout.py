"""The layout keeps its promises: imports run one way and in no circle; modules and functions stay small."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    ROOT / f"{name}.py" for name in ("link_training_data", "prepare_training_data", "train_mlx_lora", "evaluate_lora")
]
FILES = SCRIPTS + sorted((ROOT / "common").rglob("*.py")) + sorted((ROOT / "integration").rglob("*.py"))
PACKAGE = "integration.lora_patch"
MAX_LINES, MAX_PARAMETERS = 500, 7
CORE_MODULES, CORE_LINES = 10, 1100

# what each part may import, besides itself, the shared core and the serving package
MAY_IMPORT = {
    "scripts": {"release", "evaluation", "training", "model", "data"},
    "release": {"evaluation", "training", "model"},
    "evaluation": {"model"},
    "training": {"model"},
    "model": set(),
    "data": set(),
    "core": set(),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def part_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] == "integration":
        return "package"
    if parts[0] != "common":
        return "scripts"
    return parts[1] if len(parts) > 1 and (ROOT / "common" / parts[1]).is_dir() else "core"


def imported(module: str) -> set[str]:
    """Return the modules of this repository that a module imports, wherever in it the import stands."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name for name in names if name in MODULES}
    # "from package import module" names the package too; that it is imported first says nothing about the layout
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)} - {module, "common"}


GRAPH = {module: imported(module) for module in MODULES}


def test_imports_run_one_way():
    wrong = []
    for module, others in GRAPH.items():
        part = part_of(module)
        for other in sorted(others):
            target = part_of(other)
            allowed = {part, "package"} | ({"core"} | MAY_IMPORT[part] if part != "package" else set())
            if target not in allowed or (part == "scripts" and target == "scripts"):
                wrong.append(f"{module} -> {other}")
    assert wrong == []


def test_no_import_runs_in_a_circle():
    done, path, circles = set(), [], []

    def visit(module: str) -> None:
        if module in path:
            circles.append(" -> ".join([*path[path.index(module) :], module]))
            return
        if module in done:
            return
        path.append(module)
        for other in sorted(GRAPH[module]):
            visit(other)
        done.add(path.pop())

    for module in GRAPH:
        visit(module)
    assert circles == []


def test_modules_are_short():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_the_shared_core_is_small():
    core = [path for path in FILES if part_of(name_of(path)) == "core" and path.name != "__init__.py"]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in core)
    assert len(core) <= CORE_MODULES, [path.name for path in core]
    assert lines <= CORE_LINES, lines


def test_functions_take_few_parameters():
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                is_command = any("command" in ast.unparse(decorator) for decorator in node.decorator_list)
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([argument for argument in every if argument.arg not in ("self", "cls")])
                if count > MAX_PARAMETERS and not is_command:
                    wrong.append(f"{name_of(path)}.{node.name}: {count}")
    assert wrong == []


def test_the_serving_package_imports_by_relative_names_alone():
    wrong = []
    for module, path in MODULES.items():
        if part_of(module) == "package" and path.parent.name == "lora_patch":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                wrong += [
                    f"{module}: {name}" for name in names if name.split(".")[0] in ("common", "integration", "tests")
                ]
    assert wrong == []
