"""utils.course for teachers: submissions put back onto the release notebook, and graded by stock nbgrader."""

import copy
import csv

import nbformat
import pytest
from toy_course import by_id, notebook

from utils.course import CourseError, __main__
from utils.course.build import build, make
from utils.course.collect import collect
from utils.course.grade import grade
from utils.course.graft import graft
from utils.course.library import definition
from utils.course.source import Exercise, read_source


def answered(toy):
    """(release, a submission with every answer right): the student's form before and after the work."""
    build(toy)
    release = notebook(toy, "chapters")
    submission = copy.deepcopy(release)
    for key in ("square", "Pair", "total"):
        by_id(submission)[key].source = definition(toy, f"toylib:{key}").source
    return release, submission


def test_a_submission_as_it_should_be_needs_no_repair(toy):
    release, submission = answered(toy)
    result = graft(release, submission)
    assert (result.attempted, result.exercises, result.repairs) == (3, 3, ())
    assert by_id(result.notebook)["square"].source == by_id(submission)["square"].source
    assert graft(release, release).attempted == 0


def test_lost_metadata_and_ids(toy):
    release, submission = answered(toy)
    for i, cell in enumerate(submission.cells):
        cell.metadata, cell.id = nbformat.from_dict({}), f"c{i}"
    result = graft(release, submission)
    assert result.attempted == 3
    assert result.repairs == ("3 found by the function's name (square, Pair, total)", "4 check cells put back")
    assert by_id(result.notebook)["Pair"].source == definition(toy, "toylib:Pair").source


def test_edited_and_deleted_cells(toy):
    release, submission = answered(toy)
    by_id(submission)["square-check"].source = "pass"
    by_id(submission)["from-toylib-import-check"].source = "check = lambda f, point=None: f"
    submission.cells = [cell for cell in submission.cells if cell.id not in ("Pair", "total-check")]
    result = graft(release, submission)
    assert result.attempted == 2
    assert result.repairs == ("1 not in the notebook, so blank (Pair)", "2 check cells put back")
    cells = by_id(result.notebook)
    assert cells["square-check"].source == "square = check(square)"
    assert cells["from-toylib-import-check"].source == "from toylib import check"
    assert cells["Pair"].source == by_id(release)["Pair"].source


def test_an_answer_in_a_cell_of_its_own_with_a_helper(toy):
    release, submission = answered(toy)
    by_id(submission)["square"].source = by_id(release)["square"].source
    extra = "import functools\n\ndef times(a, b):\n    return a * b"
    answer = "def square(x):\n    return functools.reduce(times, [x, x])"
    submission.cells += [nbformat.v4.new_code_cell(extra), nbformat.v4.new_code_cell(answer)]
    result = graft(release, submission)
    assert result.attempted == 3
    source = by_id(result.notebook)["square"].source
    namespace = {}
    exec(source, namespace)
    assert namespace["square"](3) == 9
    assert any("helper functions" in repair for repair in result.repairs)


def test_an_answer_that_does_not_parse_is_still_the_students(toy):
    release, submission = answered(toy)
    by_id(submission)["square"].source = "def square(x):\n    return x *"
    result = graft(release, submission)
    assert by_id(result.notebook)["square"].source == "def square(x):\n    return x *"


def test_two_exercises_on_one_function_keep_their_order(toy):
    build(toy)
    cells = read_source(toy / "solutions" / "01_toy.py")
    second = Exercise("toylib:square", "Find the bug", "", (), 1, 1, 1, 1, bug="doubles")
    release = make(toy, "01_toy", cells, "student")
    extra = copy.deepcopy(next(cell for cell in release.cells if cell.id == "square"))
    extra.id, extra.metadata.nbgrader.grade_id = "square-doubles", second.key
    extra.source = "def square(x):\n    return x + x"
    release.cells.append(extra)
    submission = copy.deepcopy(release)
    for cell, answer in zip([c for c in submission.cells if c.id.startswith("square")][1:2], ["x * x"], strict=True):
        cell.source = f"def square(x):\n    return {answer}"
    submission.cells[-1].source = "def square(x):\n    return x**2"
    for cell in submission.cells:
        cell.metadata = nbformat.from_dict({})
    result = by_id(graft(release, submission).notebook)
    assert result["square"].source.endswith("x * x") and result["square-doubles"].source.endswith("x**2")


def test_collecting_a_folder_of_all_sorts(toy, tmp_path, capsys):
    _, submission = answered(toy)
    text = nbformat.writes(submission)
    folder = tmp_path / "in"
    with pytest.raises(CourseError, match="FROM must be a folder"):
        collect(toy, "01_toy", folder)
    assert __main__.main(["collect", "01_toy", ""]) == 1 and __main__.main(["grade", ""]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "From where? For example FROM=~/Downloads/submissions.",
        "Which chapter? For example CH=02_lora.",
    ]
    folder.mkdir()
    with pytest.raises(CourseError, match="is empty: there is nothing to collect"):
        collect(toy, "01_toy", folder)
    for name in ("ann/01_toy.ipynb", "Bo Li_4711/work/01_toy.ipynb", "two/a.ipynb", "two/b.ipynb"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "none").mkdir()
    (folder / "cy_01_toy.ipynb").write_text(text, encoding="utf-8")
    (folder / "01_toy.ipynb").write_text(text, encoding="utf-8")
    (folder / "dee_01_toy.ipynb").write_text(text[:200], encoding="utf-8")
    (folder / "eve_01_toy.ipynb").write_text('{"cells": 3}', encoding="utf-8")
    (folder / "ann.ipynb").write_text(text, encoding="utf-8")
    (folder / "notes.txt").write_text("see attached")
    assert collect(toy, "01", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(p.name for p in (toy / "build/grading/submitted").iterdir()) == ["Bo_Li_4711", "ann", "cy"]
    assert "ann: 3 of 3 exercises attempted." in lines
    said = {line.partition(": left out, ")[0]: line for line in lines if ": left out, " in line}
    assert set(said) == {"two", "none", "01_toy.ipynb", "dee", "eve", "ann", "notes.txt"}
    assert "several notebooks (a.ipynb, b.ipynb)" in said["two"] and "has no notebook" in said["none"]
    assert "cannot be read as a notebook" in said["dee"] and "second notebook of ann" in said["ann"]


def test_stock_nbgrader_gives_the_worked_form_everything_and_the_blank_form_nothing(toy, tmp_path, capsys):
    build(toy)
    release = notebook(toy, "chapters")
    with pytest.raises(CourseError, match="first: make collect"):
        grade(toy, "01_toy")
    worked = notebook(toy, "solutions")
    for cell in worked.cells:
        cell.metadata = nbformat.from_dict({})  # lost on the way, as uploads lose it
    books = {"worked": worked, "blank": release}
    (tmp_path / "in").mkdir()
    for name, book in books.items():
        (tmp_path / "in" / f"{name}_01_toy.ipynb").write_text(nbformat.writes(book), encoding="utf-8")
    assert collect(toy, "01_toy", tmp_path / "in") == 0
    assert grade(toy, "01_toy") == 0
    printed = capsys.readouterr().out
    assert "Grading runs your students' code" in printed
    assert "worked: 7 of 7 points" in printed.splitlines() and "blank: 0 of 7 points" in printed.splitlines()
    with (toy / "build/grading/01_toy_points.csv").open(encoding="utf-8") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    assert rows["worked"]["square-check"] == "2.0" and rows["blank"]["square-check"] == "0.0"
    assert (toy / "build/grading/feedback/worked/01_toy/01_toy.html").exists()
