"""The gate: committed notebooks are what build makes, worked ones were executed, sources keep to the house style."""

import re
from pathlib import Path

import nbformat

from utils.course.build import FORMS, rendered
from utils.course.outputs import code_cells
from utils.course.source import read_source, sources

LONGEST = 25  # lines of a code cell; about 15 is the aim
INSTALL = re.compile(r"^\s*[!%]\s*(pip|conda)\b", re.MULTILINE)


def check(root: Path) -> list[str]:
    """One sentence per problem; an empty list when everything is as it should be. Writes nothing."""
    return [*_style(root), *_stale(root), *_orphans(root)]


def _stale(root: Path):
    for path, text in rendered(root).items():
        shown = path.relative_to(root).as_posix()
        if not path.exists():
            yield f"{shown} is missing: run `make build`."
        elif path.read_bytes() != text.encode():
            yield f"{shown} differs from what its source makes: run `make build`."
        if path.parent.name == FORMS["worked"]:
            never = [c.id for c in code_cells(nbformat.reads(text, as_version=4)) if c.execution_count is None]
            if never:
                yield (
                    f"{shown} has {len(never)} cells without a run (the first is {never[0]}): "
                    f"run `python -m utils.course execute {path.stem}`."
                )


def _orphans(root: Path):
    """Notebooks that no source makes."""
    names = {source.stem for source in sources(root)}
    for folder in FORMS.values():
        for path in sorted((root / folder).glob("*.ipynb")):
            if path.stem not in names:
                yield f"{path.relative_to(root).as_posix()} has no source solutions/{path.stem}.py."


def _style(root: Path):
    for source in sources(root):
        for cell in read_source(source):
            if cell.kind != "code":
                continue
            where = f"solutions/{source.name}, cell {cell.text.partition(chr(10))[0][:60]!r}"
            lines = cell.text.splitlines()
            if len(lines) > LONGEST:
                yield f"{where} has {len(lines)} lines; the limit is {LONGEST}."
            if INSTALL.search(cell.text):
                yield f"{where} installs something; the set-up does that."
            if any(line.rstrip().endswith(";") for line in lines):
                yield f"{where} ends a line with `;`, which nbval ignores: assign to _ instead."
