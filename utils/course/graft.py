"""Put a student's answers back onto the release notebook.

nbgrader finds cells by metadata, and gives 0 without a word when an upload, a copy and paste, or Colab lost it. Here an
answer is found by its grade_id, else by the function it defines, and everything else is the release notebook's own.
"""

import ast
import builtins
import copy
import re
from dataclasses import dataclass

from utils.course.outputs import code_cells


@dataclass(frozen=True)
class Grafted:
    notebook: object
    exercises: int
    attempted: int
    repairs: tuple[str, ...]  # what had to be mended, as half-sentences


def graft(release, submission) -> Grafted:
    """A copy of `release` with the answers of `submission` in its exercise cells."""
    notebook = copy.deepcopy(release)
    theirs = code_cells(submission)
    by_id = {_grade_id(cell): cell.source for cell in theirs if _grade_id(cell)}
    solutions = [cell for cell in code_cells(notebook) if cell.metadata.get("nbgrader", {}).get("solution")]
    blank = {_grade_id(cell): cell.source.strip() for cell in solutions}
    names = {_grade_id(cell): defined(cell.source)[0] for cell in solutions}
    released = _bound("\n".join(cell.source for cell in code_cells(release)))
    used, by_name, missing, helped, attempted = set(), [], [], [], 0
    for cell in solutions:
        key = _grade_id(cell)
        name = names[key]
        answer = by_id.get(key)
        if answer is None or answer.strip() == blank[key] or name not in defined(answer):
            elsewhere = [
                i
                for i, other in enumerate(theirs)
                if i not in used and name in defined(other.source) and _is_answer(other, key, names, blank)
            ]
            if elsewhere:
                # Several exercises may ask for one function: then the first free cell is the first one's.
                shared = list(names.values()).count(name) > 1
                found = elsewhere[0] if shared else elsewhere[-1]
                used.add(found)
                answer = theirs[found].source
                by_name.append(key)
        if answer is None:
            missing.append(key)
            continue
        attempted += answer.strip() != blank[key]
        helpers = _helpers(answer, theirs, released)
        if helpers:
            helped.append(key)
        cell.source = "\n\n".join([*helpers, answer])
    return Grafted(notebook, len(solutions), attempted, tuple(_repairs(release, by_id, by_name, missing, helped)))


def defined(source: str) -> list[str]:
    """Names of the top-level functions and classes; a cell that does not parse is searched by pattern."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return re.findall(r"(?m)^(?:async +def|def|class) +(\w+)", source)
    return [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]


def _grade_id(cell) -> str | None:
    return cell.metadata.get("nbgrader", {}).get("grade_id")


def _is_answer(cell, key: str, names: dict, blank: dict) -> bool:
    """May this cell answer exercise `key`: not another exercise's own cell, and not the blank of any."""
    other = _grade_id(cell)
    return (other == key or other not in names) and cell.source.strip() not in blank.values()


def _repairs(release, by_id: dict, by_name: list, missing: list, helped: list):
    checks = [cell for cell in code_cells(release) if cell.metadata.get("nbgrader", {}).get("grade")]
    changed = [cell for cell in checks if by_id.get(_grade_id(cell), "").strip() != cell.source.strip()]
    if by_name:
        yield f"{len(by_name)} found by the function's name ({', '.join(by_name)})"
    if missing:
        yield f"{len(missing)} not in the notebook, so blank ({', '.join(missing)})"
    if changed:
        yield f"{len(changed)} check cells put back"
    if helped:
        yield f"helper functions of other cells taken along for {', '.join(helped)}"


def _bound(source: str) -> set[str]:
    """Every name that code assigns, defines or imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
    return found


def _helpers(answer: str, cells: list, released: set[str]) -> list[str]:
    """Functions, classes and imports from the student's other cells that the answer needs and the release lacks."""
    offered = {}
    for cell in cells:
        try:
            body = ast.parse(cell.source).body
        except SyntaxError:
            continue
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)):
                text = ast.get_source_segment(cell.source, node)
                offered |= {name: text for name in _bound_at_top(node)}
    try:
        wanted, known = [ast.parse(answer)], _bound(answer) | released | set(dir(builtins))
    except SyntaxError:
        return []
    taken = []
    while wanted:
        for node in ast.walk(wanted.pop()):
            if isinstance(node, ast.Name) and node.id not in known and node.id in offered:
                known.add(node.id)
                if offered[node.id] not in taken:
                    taken.insert(0, offered[node.id])
                    wanted.append(ast.parse(offered[node.id]))
    return taken


def _bound_at_top(node) -> set[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return {node.name}
