"""Take in a class's submissions: each grafted onto the release notebook, where nbgrader looks for it."""

import re
from pathlib import Path

import nbformat

from utils.course import CourseError
from utils.course.build import FORMS, dumps
from utils.course.graft import graft
from utils.course.source import sources

GRADING = Path("build") / "grading"


def collect(root: Path, chapter: str, folder: Path, out: Path | None = None) -> int:
    """Write submitted/<student>/<chapter>/<chapter>.ipynb under `out` (default build/grading); one line per student.

    folder holds, per student, a notebook (alice_02_lora.ipynb) or a folder with one (alice/02_lora.ipynb).
    Returns 0, or 1 when nothing could be taken in. What cannot be read is named and left out.
    """
    chapter = exactly_one(root, chapter)
    out = out or root / GRADING
    release = nbformat.read(root / FORMS["student"] / f"{chapter}.ipynb", as_version=4)
    taken = set()
    for student, path, problem in submissions(folder, chapter):
        if problem is None and student in taken:
            problem = f"there is a second notebook of {student}, {path.name}"
        if problem is None:
            submission, problem = _read(path)
        if problem:
            print(f"{student}: left out, {problem}.")
            continue
        result = graft(release, submission)
        target = out / "submitted" / student / chapter / f"{chapter}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(dumps(result.notebook), encoding="utf-8", newline="\n")
        taken.add(student)
        repaired = f"; repaired: {'; '.join(result.repairs)}" if result.repairs else ""
        print(f"{student}: {result.attempted} of {result.exercises} exercises attempted{repaired}.")
    if not taken:
        print(f"No submission of {chapter} could be taken in from {folder}.")
        return 1
    print(f"{len(taken)} submissions are in {out / 'submitted'}. Next: make grade CH={chapter}")
    return 0


def exactly_one(root: Path, chapter: str) -> str:
    """The full name of a chapter given by its name or how it starts."""
    if not chapter:
        raise CourseError("Which chapter? For example CH=02_lora.")
    found = sources(root, chapter)
    if len(found) > 1:
        raise CourseError(f"{chapter!r} could be any of {', '.join(path.stem for path in found)}.")
    return found[0].stem


def submissions(folder: Path, chapter: str):
    """Yields (student, path or None, problem or None) for everything in the folder, in order of name."""
    if not folder.is_dir():
        raise CourseError(f"FROM must be a folder with the submissions; {str(folder)!r} is none.")
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    if not entries:
        raise CourseError(f"{folder} is empty: there is nothing to collect.")
    for entry in entries:
        if entry.is_dir():
            path, problem = _only_notebook(entry, chapter)
            yield _identity(entry.name), path, problem
        elif entry.suffix == ".ipynb":
            student = _identity(entry.stem.replace(chapter, ""))
            problem = None if student else f"its name does not say whose it is; call it STUDENT_{entry.name}"
            yield student or entry.name, entry, problem
        else:
            yield entry.name, None, "it is neither a notebook nor a folder"


def _identity(text: str) -> str:
    """A name that nbgrader can use as an id and as a folder."""
    return re.sub(r"[^\w.@-]+", "_", text).strip("_-. ")


def _only_notebook(folder: Path, chapter: str):
    found = [path for path in sorted(folder.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
    named = [path for path in found if chapter in path.stem] or found
    exact = [path for path in named if path.stem == chapter]
    chosen = named if len(named) == 1 else exact
    if len(chosen) == 1:
        return chosen[0], None
    if not found:
        return None, "the folder has no notebook"
    return None, f"the folder has several notebooks ({', '.join(path.name for path in named)})"


def _read(path: Path):
    """(notebook, None), or (None, why it cannot be read)."""
    try:
        notebook = nbformat.read(path, as_version=4)
        if not [cell.source for cell in notebook.cells if cell.cell_type == "code"]:
            return None, f"{path.name} has no code cells"
    except Exception as error:  # a stranger's file may be wrong in any way, and the others must still be read
        first = str(error).strip().partition("\n")[0][:120] or type(error).__name__
        return None, f"{path.name} cannot be read as a notebook ({first})"
    return notebook, None
