"""The library's own functions as exercise cells: with the body cut out, or with it marked as the solution.

A module is read as text and never imported, so building needs no torch and sees exactly what is in the checkout.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

from utils.course import CourseError

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    source: str  # as the library has it
    stub: str  # signature and docstring, then NotImplementedError
    worked: str  # the source with nbgrader's solution marks around each body


def definition(root: Path, target: str) -> Definition:
    """The function or class that "package.module:name" names, from the files under `root`."""
    module, _, name = target.partition(":")
    path = root.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        raise CourseError(f"The exercise {target} has no library module: {path} does not exist.")
    return parse(path.read_text(encoding="utf-8"), name, target)


def parse(text: str, name: str, where: str) -> Definition:
    """The definition of `name` in a module's text; `where` names it in errors."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    node = next((n for n in ast.parse(text).body if isinstance(n, kinds) and n.name == name), None)
    if node is None:
        raise CourseError(f"The exercise {where} has no source: the module defines no {name}.")
    if ast.get_docstring(node) is None:
        raise CourseError(f"{where} has no docstring; a reader would not know what to write.")
    first = min([node.lineno] + [d.lineno for d in node.decorator_list])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    methods = [node] if isinstance(node, Function) else [n for n in node.body if isinstance(n, Function)]
    bodies = [_body(method, text.splitlines(), where) for method in methods]
    return Definition("\n".join(lines), _replace(lines, first, bodies, _blank), _replace(lines, first, bodies, _marked))


def _body(node: Function, lines: list[str], where: str) -> tuple[int, int, str]:
    """First and last line (from 1) of what follows the docstring, and its indentation."""
    has_docstring = ast.get_docstring(node) is not None
    code = node.body[1:] if has_docstring else node.body
    if not code:
        raise CourseError(f"{where}: {node.name} has a docstring and nothing to solve.")
    if code[0].lineno == node.lineno:
        raise CourseError(f"{where}: write the body of {node.name} on a line of its own.")
    first = node.body[0].end_lineno + 1 if has_docstring else code[0].lineno
    while not has_docstring and lines[first - 2].lstrip().startswith("#"):
        first -= 1  # comments above the first statement explain the answer, so they go with it
    return first, node.end_lineno, " " * code[0].col_offset


def _blank(indent: str, body: list[str]) -> list[str]:
    return [f"{indent}raise NotImplementedError"]


def _marked(indent: str, body: list[str]) -> list[str]:
    return [f"{indent}### BEGIN SOLUTION", *body, f"{indent}### END SOLUTION"]


def _replace(lines, first, bodies, new) -> str:
    """`lines` (which start at line `first` of the module) with each body replaced by new(indent, body lines)."""
    out, at = [], first
    for start, end, indent in bodies:
        out += lines[at - first : start - first]
        body = lines[start - first : end - first + 1]
        while body and not body[0].strip():
            body = body[1:]
        out += new(indent, body)
        at = end + 1
    return "\n".join(out + lines[at - first :])
