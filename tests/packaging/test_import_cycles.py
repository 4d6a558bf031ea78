"""No modules of the package import each other in a cycle."""

import ast

import pytest
from test_layering import PYTHON, imports_of, module_of

# An op may import a helper inside a function to delay a heavy import (torch.distributed), also a helper that imports
# the op. Elsewhere imports inside functions count.
LAZY_ALLOWED = ("fastrlhf.ops.", "kernels.")


class ImportTime(ast.NodeTransformer):
    """Removes what does not run when a module is imported."""

    def visit_FunctionDef(self, node):
        node.body = [ast.Pass()]
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node):
        self.generic_visit(node)
        return ast.Pass() if "TYPE_CHECKING" in ast.unparse(node.test) else node


def import_graph(sources: dict[str, str], paths: dict) -> dict[str, set[str]]:
    """The modules of ours that each module imports."""
    graph = {}
    for module, source in sources.items():
        # The package imports an op on first use of its name.
        if module == "fastrlhf" or module.startswith(LAZY_ALLOWED):
            source = ast.unparse(ImportTime().visit(ast.parse(source)))
        found = {name for _, name in imports_of(paths[module], source)}
        graph[module] = (found & sources.keys()) - {module}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, directly or through others."""

    def reachable(start):
        seen, stack = set(), [start]
        while stack:
            new = graph[stack.pop()] - seen
            seen |= new
            stack += new
        return seen

    reached = {module: reachable(module) for module in graph}
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in graph
    }
    return [list(group) for group in sorted(groups) if group]


PATHS = {module_of(path): path for path in PYTHON}
SOURCES = {module: path.read_text() for module, path in PATHS.items()}


def test_no_import_cycles():
    assert cycles(import_graph(SOURCES, PATHS)) == []


@pytest.mark.parametrize(
    ("module", "addition"),
    [
        ("fastrlhf.report.content", "from fastrlhf.report.page import page"),
        ("fastrlhf.report.content", "def f():\n    from fastrlhf.report import plots"),
        ("fastrlhf.train.files", "import fastrlhf.train.run"),
        ("fastrlhf.ops._backend", "from fastrlhf.ops import gae"),
    ],
)
def test_a_cycle_is_found(module, addition):
    """An import that closes a cycle is reported."""
    sources = {**SOURCES, module: f"{SOURCES[module]}\n{addition}\n"}
    (found,) = cycles(import_graph(sources, PATHS))
    assert module in found
