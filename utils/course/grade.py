"""Grade a collected chapter with stock nbgrader: points, feedback pages, a table."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

from utils.course import CourseError
from utils.course.build import FORMS
from utils.course.collect import GRADING, exactly_one
from utils.course.environment import kernel_environment

TIMEOUT = 300  # seconds that one cell of a student may take
UNSAFE = "Grading runs your students' code. bwrap is not there or does not work here, so it runs with your rights."
SAFE = "Grading runs your students' code; bwrap keeps it from the network and lets it write to build/grading only."


def grade(root: Path, chapter: str, out: Path | None = None) -> int:
    """Autograde, feedback and export; prints one line per student. Returns 1 if a submission could not be graded."""
    chapter = exactly_one(root, chapter)
    out = (out or root / GRADING).resolve()
    students = sorted(path.parent.parent.name for path in out.glob(f"submitted/*/{chapter}/{chapter}.ipynb"))
    if not students:
        raise CourseError(f"No {chapter} is in {out / 'submitted'}; first: make collect CH={chapter} FROM=folder")
    source = out / "source" / chapter
    source.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / FORMS["worked"] / f"{chapter}.ipynb", source)
    wrapper = sandbox(root, out)
    print(SAFE if wrapper else UNSAFE)
    log = out / "nbgrader.log"
    log.write_text("", encoding="utf-8")
    _nbgrader(out, log, ["generate_assignment", chapter, "--force", "--create"])
    limit = f"--Execute.timeout={TIMEOUT}"
    _nbgrader(out, log, ["autograde", chapter, "--force", limit], wrapper, must=False)
    _nbgrader(out, log, ["generate_feedback", chapter, "--force"], must=False)
    _nbgrader(out, log, ["export", "--to", str(out / "grades.csv")])
    rows = points(out, chapter)
    for student in students:
        row = rows.get(student)
        print(f"{student}: {row['points']:g} of {row['of']:g} points" if row else f"{student}: not graded, see {log}")
    _write_points(out / f"{chapter}_points.csv", rows)
    print(f"In {out}: {chapter}_points.csv by exercise, grades.csv for all chapters, feedback/ for the students.")
    return 1 if set(students) - set(rows) else 0


def points(out: Path, chapter: str) -> dict[str, dict]:
    """student -> {"points", "of", and each check's points}, from nbgrader's gradebook; graded submissions only."""
    from nbgrader.api import Gradebook

    rows = {}
    with Gradebook(f"sqlite:///{out / 'gradebook.db'}") as gradebook:
        for submission in gradebook.assignment_submissions(chapter):
            student = submission.student.id
            if not (out / "autograded" / student / chapter / f"{chapter}.ipynb").exists():
                continue
            cells = {grade.name: grade.score for notebook in submission.notebooks for grade in notebook.grades}
            rows[student] = {"points": submission.score, "of": submission.max_score, **cells}
    return rows


def sandbox(root: Path, out: Path) -> list[str]:
    """The bwrap command under which student code runs, or [] where bwrap is missing or not permitted.

    Everything is read-only except `out`, the home folder is empty but for the checkout and its Python, no network.
    """
    program = shutil.which("bwrap")
    if program is None:
        return []
    command = [program, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"]
    command += ["--tmpfs", str(Path.home())]
    for needed in dict.fromkeys([root.resolve(), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]):
        command += ["--ro-bind", str(needed), str(needed)]
    command += ["--bind", str(out), str(out), "--unshare-net", "--unshare-pid", "--die-with-parent"]
    trial = subprocess.run([*command, sys.executable, "-c", "import nbgrader"], capture_output=True)
    return command if trial.returncode == 0 else []


def _nbgrader(out: Path, log: Path, arguments: list[str], wrapper=(), must: bool = True) -> None:
    """One nbgrader command in `out`, its words appended to the log. must: its failure ends the grading."""
    command = [*wrapper, sys.executable, "-m", "nbgrader", *arguments]
    environment = kernel_environment() | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, encoding="utf-8")
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ nbgrader {' '.join(arguments)}{os.linesep}{done.stdout}{done.stderr}")
    if done.returncode and must:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CourseError(f"nbgrader {arguments[0]} failed: {last} (the whole of it is in {log})")


def _write_points(path: Path, rows: dict[str, dict]) -> None:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["student", *columns])
        table.writeheader()
        table.writerows({"student": student, **row} for student, row in sorted(rows.items()))
