"""From solutions/NN_name.py to chapters/NN_name.ipynb (the reader's) and solutions/NN_name.ipynb (the worked one).

The same sources give the same bytes: no timestamps, ids that come from headings and names rather than positions,
and stored outputs that stay only with the cell that made them.
"""

import ast
import hashlib
import inspect
import re
import textwrap
import tomllib
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from utils.course import CourseError
from utils.course.library import definition, parse
from utils.course.outputs import keep_outputs
from utils.course.source import Cell, Exercise, read_source, sources

FORMS = {"student": "chapters", "worked": "solutions"}  # form -> the folder its notebooks live in
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
PARAMETERS = """\
# "tiny" runs on any laptop; "colab" is for a 16 GB T4, "gpu" for 24 GB and more.
profile = "tiny\""""
SETUP = """\
# On Colab: fetch the course and install what is missing. Anywhere else this cell does nothing.
import runpy
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules:
    address = "{address}"
    home = Path("/content/{folder}")
    if not home.exists():
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", address, str(home)], check=True)
    runpy.run_path(str(home / "utils" / "course" / "colab.py"), run_name="__main__")"""


def build(root: Path, only: str | None = None) -> list[Path]:
    """Write both notebooks of every chapter; returns the paths whose bytes changed."""
    changed = []
    for path, text in rendered(root, only).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != text.encode():
            path.write_text(text, encoding="utf-8", newline="\n")
            changed.append(path)
    return changed


def rendered(root: Path, only: str | None = None) -> dict[Path, str]:
    """What build would write: path -> text. Reads the existing worked notebooks for their outputs."""
    texts = {}
    for source in sources(root, only):
        cells = read_source(source)
        for form, folder in FORMS.items():
            path = root / folder / f"{source.stem}.ipynb"
            notebook = make(root, source.stem, cells, form)
            if form == "worked":
                keep_outputs(notebook, path)
            texts[path] = dumps(notebook)
    return texts


def dumps(notebook) -> str:
    """The notebook as text; raises if it is not valid nbformat."""
    nbformat.validate(notebook)
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def make(root: Path, name: str, cells: list[Cell], form: str):
    """One notebook of chapter `name`, without outputs. form: "student" or "worked"."""
    made = [*_opening(root, name, cells, form)]
    number = 0
    for cell in cells[1:]:
        if cell.exercise:
            number += 1
            made += _exercise(root, cell.exercise, number, form)
        elif "parameters" not in cell.tags:
            made.append(_plain(cell))
    notebook = new_notebook(cells=_with_ids(made))
    notebook.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata.language_info = {"name": "python"}
    notebook.nbformat_minor = 5
    return notebook


def repository(root: Path) -> str:
    """The repository's address, from the one place that has it."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    try:
        return project["urls"]["Repository"].rstrip("/").removesuffix(".git")
    except KeyError:
        raise CourseError("pyproject.toml has no Repository under [project.urls].") from None


def _opening(root: Path, name: str, cells: list[Cell], form: str):
    """Title with the badge, the parameters, the Colab cell."""
    address = repository(root)
    slug = address.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{slug}/blob/main/{FORMS[form]}/{name}.ipynb"
    title, _, rest = cells[0].text.partition("\n")
    yield _markdown("title", f"{title}\n\n{BADGE}({link})\n\n{rest.strip()}")
    own = [cell.text for cell in cells if "parameters" in cell.tags]
    yield _code("parameters", "\n".join([PARAMETERS, *own]), tags=("parameters",))
    yield _code("set-up", SETUP.format(folder=slug.rpartition("/")[2], address=address))


def _plain(cell: Cell):
    wanted = cell.slug or _slug(cell.text)
    return _markdown(wanted, cell.text) if cell.kind == "markdown" else _code(wanted, cell.text, cell.tags)


def _exercise(root: Path, exercise: Exercise, number: int, form: str):
    """The cells of one exercise: text, the cell to fill in, hints, and the check that is worth its points."""
    library = definition(root, exercise.target)
    key, name = exercise.key, exercise.name
    minutes = f"about {exercise.minutes} minute{'s' if exercise.minutes > 1 else ''}"
    yield _markdown(
        f"{key}-text",
        f"## Exercise {number}. {exercise.title}\n\n"
        f"difficulty {exercise.difficulty} of 5 · importance {exercise.importance} of 5 · {minutes}\n\n{exercise.text}",
    )
    if form == "worked":
        code = library.worked
    else:
        code = _with_bug(exercise, library.source) if exercise.bug else library.stub
    yield _code(key, code, nbgrader=_nbgrader(key, solution=True))
    folded = [(f"Hint {i}: {label}", hint) for i, (label, hint) in enumerate(exercise.hints, 1)]
    if form == "student":  # the worked form shows the answer in the cell above
        folded.append(("Answer", f"```python\n{library.source}\n```"))
    if folded:
        yield _markdown(f"{key}-hints", "\n\n".join(map(_folded, folded)))
    yield _code(f"{key}-check", f"{name} = check({name})", nbgrader=_nbgrader(f"{key}-check", exercise.points))
    if exercise.remark:
        wanted = f"{key}-{exercise.remark}"
        grader = _nbgrader(wanted, exercise.remark_points)
        yield _code(wanted, f'{name} = check({name}, "{exercise.remark}")', nbgrader=grader)


def _folded(item: tuple[str, str]) -> str:
    return f"<details><summary>{item[0]}</summary>\n\n{item[1]}\n\n</details>"


def _nbgrader(grade_id: str, points: int | None = None, solution: bool = False) -> dict:
    meta = {"grade": points is not None, "grade_id": grade_id, "locked": not solution, "schema_version": 3}
    meta |= {"solution": solution, "task": False}
    return meta | ({"points": points} if points is not None else {})


def _with_bug(exercise: Exercise, source: str) -> str:
    """The library's signature and docstring over the body of the mistake that the exercise names."""
    from utils.checks import find  # imports torch, so only where an exercise asks for it

    attempt = find(exercise.name).mistake(exercise.bug).attempt
    wrong = ast.parse(textwrap.dedent(inspect.getsource(attempt))).body[0]
    right = ast.parse(source).body[0]
    if not isinstance(wrong, ast.FunctionDef) or not isinstance(right, ast.FunctionDef):
        raise CourseError(f"{exercise.key}: a bug to find must be written with def, and so must the library's own.")
    if [a.arg for a in wrong.args.args] != [a.arg for a in right.args.args]:
        raise CourseError(f"{exercise.key}: the mistake's parameters differ from those of {exercise.name}.")
    body = wrong.body[1:] if ast.get_docstring(wrong) is not None else wrong.body
    head = parse(source, exercise.name, exercise.target).stub.splitlines()[:-1]
    # unparsed, which drops comments: the mistake's own would give it away
    return "\n".join([*head, textwrap.indent("\n".join(map(ast.unparse, body)), "    ")])


def _markdown(wanted: str, text: str):
    return new_markdown_cell(text, id=wanted)


def _code(wanted: str, text: str, tags: tuple[str, ...] = (), nbgrader: dict | None = None):
    metadata = ({"tags": list(tags)} if tags else {}) | ({"nbgrader": nbgrader} if nbgrader else {})
    return new_code_cell(text, id=wanted, metadata=metadata)


def _slug(text: str) -> str:
    """An id from a cell's first line: "## The idea" -> the-idea."""
    return re.sub(r"[^a-z0-9_]+", "-", text.partition("\n")[0].lower()).strip("-_")[:40].rstrip("-") or "cell"


def _with_ids(cells: list) -> list:
    """Distinct ids: the first cell that wants an id has it, the next ones add a hash of what they say."""
    taken: set[str] = set()
    for cell in cells:
        wanted = cell.id
        if wanted in taken:
            wanted = f"{wanted}-{hashlib.sha256(cell.source.encode()).hexdigest()[:6]}"
        while wanted in taken:
            wanted += "x"
        taken.add(wanted)
        cell.id = wanted
    return cells
