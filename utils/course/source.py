"""Reading a chapter's source, solutions/NN_name.py: jupytext py:percent with a few attributes of our own.

    # %% [markdown]                       text; the first cell starts with `# N. Title`
    # %%                                  code; may carry tags=["nbval-ignore-output"] and slug="a-stable-id"
    # %% [markdown] exercise="utils.methods.lora:lora_forward" difficulty=2 importance=5 minutes=8 points=2
    # ## Title of the exercise
    #
    # Text.
    #
    # Hint (the idea): runs to the next Hint line or the end of the cell.

An exercise may also have `bug="name"` (the student's cell starts from that mistake of the exercise's check) and
`remark="name" remark_points=1` (a second graded cell, for what a right answer may still be missing).
"""

import re
from dataclasses import dataclass
from pathlib import Path

import jupytext

from utils.course import CourseError

TAGS = {"parameters", "nbval-ignore-output", "raises-exception"}
NUMBERS = {"difficulty": (1, 5), "importance": (1, 5), "minutes": (1, 120), "points": (1, 20)}
HINT = re.compile(r"^Hint \(([^)]+)\): ", re.MULTILINE)


@dataclass(frozen=True)
class Exercise:
    target: str  # "utils.methods.lora:lora_forward"
    title: str
    text: str
    hints: tuple[tuple[str, str], ...]  # (label, text)
    difficulty: int
    importance: int
    minutes: int
    points: int
    bug: str | None = None
    remark: str | None = None
    remark_points: int = 0

    @property
    def name(self) -> str:
        return self.target.partition(":")[2]

    @property
    def key(self) -> str:
        """What nbgrader calls grade_id: the function's name, and the mistake's where the exercise is to find it."""
        return f"{self.name}-{self.bug}" if self.bug else self.name


@dataclass(frozen=True)
class Cell:
    kind: str  # "markdown", "code" or "exercise"
    text: str
    tags: tuple[str, ...] = ()
    slug: str | None = None
    exercise: Exercise | None = None


def sources(root: Path, only: str | None = None) -> list[Path]:
    """The chapters' sources in order; `only` is a whole name or how it starts, so "02" finds 02_lora."""
    every = sorted((root / "solutions").glob("[0-9][0-9]_*.py"))
    if not every:
        raise CourseError(f"No chapter sources: {root / 'solutions'} has no file named like 02_lora.py.")
    found = [path for path in every if only is None or path.stem == only or path.stem.startswith(only)]
    if not found:
        raise CourseError(f"No chapter is called {only!r}; there are {', '.join(p.stem for p in every)}.")
    return found


def read_source(path: Path) -> list[Cell]:
    """The cells of one chapter. Raises CourseError, naming the file and the cell, for anything it cannot use."""
    try:
        raw = jupytext.read(path, fmt="py:percent").cells
    except Exception as error:  # jupytext has no error class of its own
        raise CourseError(f"{path.name} cannot be read as py:percent: {error}") from error
    cells = [_cell(path.name, cell) for cell in raw]
    number = int(path.stem[:2])
    if not cells or cells[0].kind != "markdown" or not cells[0].text.startswith(f"# {number}. "):
        raise CourseError(f"{path.name}: the first cell must be markdown and start with `# {number}. Title`.")
    keys = [cell.exercise.key for cell in cells if cell.exercise]
    for key in keys:
        if keys.count(key) > 1:
            raise CourseError(f"{path.name}: the exercise {key} appears twice.")
    return cells


def _cell(file: str, raw) -> Cell:
    meta = {key: value for key, value in raw.metadata.items() if key != "lines_to_next_cell"}
    text = raw.source.strip("\n")
    where = f"{file}, cell {text.partition(chr(10))[0][:60]!r}"
    if not text.strip():
        raise CourseError(f"{file} has an empty cell.")
    if "exercise" in meta:
        return Cell("exercise", text, slug=meta.pop("slug", None), exercise=_exercise(where, raw, meta, text))
    tags = tuple(meta.pop("tags", ()))
    slug = meta.pop("slug", None)
    if meta:
        raise CourseError(f"{where}: unknown attribute {sorted(meta)[0]!r}; a plain cell has tags and slug.")
    if unknown := set(tags) - TAGS:
        raise CourseError(f"{where}: unknown tag {sorted(unknown)[0]!r}; known are {', '.join(sorted(TAGS))}.")
    return Cell(raw.cell_type, text, tags, slug)


def _exercise(where: str, raw, meta: dict, text: str) -> Exercise:
    if raw.cell_type != "markdown":
        raise CourseError(f"{where}: an exercise is a [markdown] cell; its code comes from the library.")
    target = meta.pop("exercise")
    if not re.fullmatch(r"[\w.]+:\w+", str(target)):
        raise CourseError(f'{where}: exercise={target!r} must look like "utils.methods.lora:lora_forward".')
    values = {}
    for key, (low, high) in NUMBERS.items():
        value = meta.pop(key, None)
        if not isinstance(value, int) or not low <= value <= high:
            raise CourseError(f"{where}: {key} must be a whole number from {low} to {high}, not {value!r}.")
        values[key] = value
    for key in ("bug", "remark", "remark_points"):
        if key in meta:
            values[key] = meta.pop(key)
    if bool(values.get("remark")) != bool(values.get("remark_points")):
        raise CourseError(f"{where}: remark and remark_points come together.")
    if meta:
        raise CourseError(f"{where}: unknown attribute {sorted(meta)[0]!r} of an exercise.")
    heading, _, rest = text.partition("\n")
    if not heading.startswith("## "):
        raise CourseError(f"{where}: an exercise starts with `## Title`.")
    parts = HINT.split(rest)  # text, label, hint, label, hint, ...
    hints = tuple((label, hint.strip()) for label, hint in zip(parts[1::2], parts[2::2], strict=True))
    return Exercise(target, heading[3:].strip(), parts[0].strip(), hints, **values)
