"""The rules of the house that a machine can check: imports point down, files fit one sitting, nobody hides state."""

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "longspan"

#: level of each package or module: a file imports from its own package and from lower levels only
LEVELS = {
    "errors": 0,
    "files": 0,
    "autocast": 0,
    "config": 1,
    "compiled": 1,
    "matmul": 1,
    "parent": 1,
    "sums": 1,
    "timers": 1,
    "values": 1,
    "mesh": 2,
    "recomputed": 2,
    "gradients": 3,
    "tensor_parallel": 3,
    "context_parallel": 3,
    "recurrent": 3,
    "expert_parallel": 4,  # an expert's weights may be tensor parallel
    "models": 5,
    "integrations": 5,
    "data": 6,
    "parallelize": 6,
    "pipeline": 6,
    "weights": 6,
    "training": 7,
    "planner": 7,
    "runs": 8,
    "cli": 9,
    "parallel_state": 10,  # a leaf for users
    "megatron": 11,  # another one: it installs the groups that parallel_state returns
}
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def imported(tree):
    """Names of longspan's packages that a file imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("longspan."):
                    yield alias.name.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "longspan":
                yield from (alias.name for alias in node.names if alias.name in LEVELS)
            elif node.module.startswith("longspan."):
                yield node.module.split(".")[1]


def test_tests_are_short_too():
    long = [p.name for p in Path(__file__).parent.rglob("*.py") if p.read_text().count("\n") > 550]
    assert not long


def name_of(path):
    return str(path.relative_to(SOURCE))


def test_files_are_short():
    assert not [name_of(path) for path in FILES if path.read_text().count("\n") > 550]


def test_files_have_a_docstring():
    assert not [
        name_of(path)
        for path, tree in TREES.items()
        if name_of(path) != "__main__.py" and not ast.get_docstring(tree)
    ]


def test_imports_point_down():
    wrong = []
    for path, tree in TREES.items():
        package = name_of(path).split("/")[0].removesuffix(".py")
        if package in ("__init__", "__main__"):
            continue
        others = {other for other in imported(tree) if other != package}
        wrong += [
            f"{name_of(path)} imports longspan.{other}, which is not below it"
            for other in sorted(others)
            if LEVELS[other] >= LEVELS[package]
        ]
    assert not wrong


def test_no_circle_lies_inside_a_package():
    """Imports inside functions count too: a circle that is put off is still one."""
    graph = {}
    for path in FILES:
        module = ".".join(["longspan", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(
            ".__init__"
        )
        tree = TREES[path]
        for_types = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        found = set()
        for node in ast.walk(tree):
            if id(node) in for_types or not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            for alias in node.names:
                inner = ".".join([node.module, alias.name])
                is_file = SOURCE.parent.joinpath(*inner.split(".")).with_suffix(".py").exists()
                found.add(inner if is_file else node.module)
        graph[module] = found
    # packages' own __init__ files hand out names and are not part of a circle
    graph = {m: {o for o in found if o in graph and o != m} for m, found in graph.items()}
    open_, done = [], set()

    def visit(module):
        if module in done or (SOURCE.parent / module.replace(".", "/")).is_dir():
            return
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        open_.append(module)
        for other in sorted(graph[module]):
            visit(other)
        open_.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


def test_models_contain_no_collective():
    words = ("all_reduce", "all_gather", "all_to_all", "isend", "irecv", "broadcast")
    assert not [
        f"{path.name} calls {word}"
        for path in FILES
        if path.parent.name == "models"
        for word in words
        if f".{word}" in path.read_text()
    ]


def test_only_one_file_reads_the_launchers_environment_for_groups_and_none_decides_by_variables():
    readers = {str(p.relative_to(SOURCE)) for p in FILES if "os.environ" in p.read_text()}
    # cli/env.py shows them, cli/validate.py and cli/plan.py keep the hub's library from the network, compiled.py finds the compiler
    starting = {f"runs/{name}.py" for name in ("start", "train", "check")}
    assert (
        readers
        <= {"mesh/mesh.py", "compiled.py", "cli/main.py", "cli/env.py", "cli/validate.py", "cli/plan.py"}
        | starting
    )


def test_global_statements_live_in_parallel_state_only():
    for path in FILES:
        has = any(isinstance(node, ast.Global) for node in ast.walk(TREES[path]))
        assert not has or path.name == "parallel_state.py", path


def test_importing_longspan_and_checking_a_config_need_no_torch():
    code = (
        "import sys, longspan, longspan.config.load, longspan.config.resolve, longspan.cli.main\n"
        "import longspan.config.model, longspan.mesh.topology\n"
        "longspan.TrainConfig; longspan.TransformerConfig\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
