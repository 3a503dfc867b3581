"""Text that every machine with Python has: its library's sources, and their documentation.

A docstring is documentation and is cut out of the sources, so that no text is in both. Tests are left out: some
systems install the library without them.
"""

import ast
import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Folders of the library that are not its sources, or not on every machine.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"})
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def source_documents() -> Iterator[str]:
    """Every module's source without its docstrings."""
    yield from (source for source, _ in _library())


def documentation_documents() -> Iterator[str]:
    """The language reference's topics that `help` shows, and the docstrings of every module that has any."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    yield from (documentation for _, documentation in _library() if documentation)


@functools.cache
def _library() -> list[tuple[str, str]]:
    """Source and documentation of the library's modules, in the order of their paths: some 10 MB, parsed once."""
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _LEFT_OUT.intersection(parts) or parts[0].startswith("config-"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (ValueError, SyntaxError):  # files that are there to be wrong, or are in another encoding
            continue
        documentation = "\n\n".join(_docstrings(tree, ".".join(parts).removesuffix(".__init__")))
        found.append((_without_docstrings(text, tree), documentation + "\n" if documentation else ""))
    return found


def _without_docstrings(text: str, tree: ast.Module) -> str:
    lines = text.split("\n")  # as the syntax tree counts them; splitlines would cut at form feeds as well
    cut = {line for node in ast.walk(tree) if isinstance(node, _DOCUMENTED) for line in _docstring_lines(node)}
    return "\n".join(line for number, line in enumerate(lines) if number not in cut)


def _docstring_lines(node: Any) -> range:
    """Lines of the node's docstring, counted from 0; none where the body would be empty without it."""
    first = node.body[0] if len(node.body) > 1 else None
    constant = first.value if isinstance(first, ast.Expr) else None
    if not (isinstance(constant, ast.Constant) and isinstance(constant.value, str)):
        return range(0)
    end = constant.end_lineno or constant.lineno
    shares_a_line = constant.lineno == getattr(node, "lineno", 0) or node.body[1].lineno <= end
    return range(0) if shares_a_line else range(constant.lineno - 1, end)


def _docstrings(node: Any, name: str) -> Iterator[str]:
    if isinstance(node, _DOCUMENTED) and _docstring_lines(node):
        yield f"{name}{_signature(node)}\n\n{ast.get_docstring(node)}"
    for child in ast.iter_child_nodes(node):
        yield from _docstrings(child, f"{name}.{child.name}" if isinstance(child, _DOCUMENTED[1:]) else name)


def _signature(node: ast.AST) -> str:
    return f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
