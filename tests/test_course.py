"""utils.course: the builder, the gate and the runner, on a toy chapter."""

import re
import shutil

import nbformat
import pytest
from toy_course import by_id, edit, notebook

import utils.checks
from utils.course import CourseError, __main__
from utils.course.build import build, rendered
from utils.course.execute import _refuse_unfit, execute
from utils.course.gate import check
from utils.course.library import definition, parse
from utils.course.outputs import code_cells
from utils.course.run import parameter_names, run
from utils.course.source import read_source


def pretend_executed(root):
    """Store an output in every code cell of the worked notebook, without a kernel."""
    build(root)
    book = notebook(root, "solutions")
    for count, cell in enumerate(code_cells(book), 1):
        cell.execution_count = count
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"{cell.id}\n")]
    (root / "solutions" / "01_toy.ipynb").write_text(nbformat.writes(book) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------- reading


BAD_SOURCES = {
    "a title without its number": ("# # 1. Toy", "# # Toy", "# 1. Title"),
    "another chapter's number": ("# # 1. Toy", "# # 2. Toy", "# 1. Title"),
    "a tag misspelt": ("nbval-ignore-output", "nbval-ignore-ouput", "unknown tag 'nbval-ignore-ouput'"),
    "an unknown attribute": ('slug="sum"', 'name="sum"', "unknown attribute 'name'"),
    "an unknown attribute of an exercise": ("importance=2", 'importance=2 colour="red"', "unknown attribute 'colour'"),
    "a difficulty out of range": ("difficulty=1 importance=2", "difficulty=6 importance=2", "from 1 to 5, not 6"),
    "no points": (" points=2", "", "points must be a whole number"),
    "a target without a function": ("toylib:square", "toylib", "must look like"),
    "a module that is not there": ("toylib:square", "toylab:square", "no library module"),
    "a function that is not there": ("toylib:square", "toylib:cube", "defines no cube"),
    "an exercise twice": ("toylib:total", "toylib:square", "square appears twice"),
    "an exercise without a heading": ("# ## Square a number", "# Square a number", "starts with `## Title`"),
    "a remark without points": (" remark_points=1", "", "come together"),
    "an exercise that is code": (
        '# %% [markdown] exercise="toylib:total"',
        '# %% exercise="toylib:total"',
        "[markdown]",
    ),
    "an empty cell": ("# %%\nprint(square(4))", "# %%\n", "empty cell"),
}


@pytest.mark.parametrize("fault", BAD_SOURCES)
def test_a_fault_in_a_source_is_one_sentence_and_nothing_is_written(toy, fault):
    old, new, says = BAD_SOURCES[fault]
    edit(toy, old, new)
    with pytest.raises(CourseError, match=re.escape(says)):
        build(toy)
    assert not (toy / "chapters").exists()


def test_no_chapter_of_that_name(toy):
    with pytest.raises(CourseError, match="No chapter is called '07'; there are 01_toy"):
        build(toy, "07")
    shutil.rmtree(toy / "solutions")
    with pytest.raises(CourseError, match="No chapter sources"):
        build(toy)


def test_hints_run_to_the_next_hint_or_the_end(toy):
    exercise = next(cell.exercise for cell in read_source(toy / "solutions" / "01_toy.py") if cell.exercise)
    assert exercise.text == "Complete `square`."
    assert exercise.hints == (("the idea", "multiply.\nTwice the same."), ("the shapes", "there are none."))


# ------------------------------------------------------------------------------------------------- the library's source


def test_a_function_is_cut_after_its_docstring(toy):
    square = definition(toy, "toylib:square")
    assert square.stub == (
        'def square(x):\n    """The square of x.\n\n    x: a number\n    """\n    raise NotImplementedError'
    )
    assert square.worked.endswith(
        "    ### BEGIN SOLUTION\n    # multiplied, not raised: this is the idea\n    return x * x\n    ### END SOLUTION"
    )
    assert "\n".join(line for line in square.worked.splitlines() if "SOLUTION" not in line) == square.source


def test_a_class_keeps_its_shape_and_loses_each_body(toy):
    pair = definition(toy, "toylib:Pair")
    assert pair.stub == (
        'class Pair:\n    """Two numbers."""\n\n    names = ("first", "second")\n\n'
        '    def __init__(self, first, second):\n        """Keep both."""\n        raise NotImplementedError\n\n'
        "    @staticmethod\n    def zero():\n        raise NotImplementedError"
    )
    assert pair.worked.count("### BEGIN SOLUTION") == pair.worked.count("### END SOLUTION") == 2


def test_what_cannot_be_cut_is_refused():
    for text, says in {
        "def f(x):\n    return x\n": "no docstring",
        'def f(x):\n    """Does nothing."""\n': "nothing to solve",
        'class C:\n    """One."""\n\n    def f(self): return 1\n': "line of its own",
    }.items():
        with pytest.raises(CourseError, match=says):
            parse(text, "f" if text.startswith("def") else "C", "here")


# ------------------------------------------------------------------------------------------------- building


def test_the_same_sources_give_the_same_bytes_anywhere(toy, tmp_path):
    first = {path.relative_to(toy): text for path, text in rendered(toy).items()}
    assert len(build(toy)) == 2 and build(toy) == []
    other = tmp_path / "elsewhere"
    shutil.copytree(toy, other, ignore=shutil.ignore_patterns("*.ipynb"))
    assert len(build(other)) == 2
    for path, text in first.items():
        assert (toy / path).read_bytes() == (other / path).read_bytes() == text.encode()


def test_the_student_form_holds_the_blanks_and_the_worked_form_the_library(toy):
    build(toy)
    student, worked = notebook(toy, "chapters"), notebook(toy, "solutions")
    assert by_id(student)["square"].source == definition(toy, "toylib:square").stub
    assert by_id(worked)["square"].source == definition(toy, "toylib:square").worked
    assert "```python\ndef square(x):" in by_id(student)["square-hints"].source
    assert "Answer" not in by_id(worked)["square-hints"].source
    assert by_id(student)["square-check"].source == "square = check(square)"
    assert by_id(student)["Pair-short"].source == 'Pair = check(Pair, "short")'
    assert by_id(student)["Pair-text"].source.startswith(
        "## Exercise 2. Keep two numbers\n\ndifficulty 2 of 5 · importance 1 of 5 · about 1 minute\n\n"
    )
    assert not any(cell.outputs for cell in code_cells(student))


def test_the_opening_cells(toy):
    build(toy)
    for folder in ("chapters", "solutions"):
        book = notebook(toy, folder)
        assert [cell.id for cell in book.cells[:3]] == ["title", "parameters", "set-up"]
        assert f"/blob/main/{folder}/01_toy.ipynb" in book.cells[0].source
        assert len(book.cells[2].source.splitlines()) <= 12
        assert book.metadata.kernelspec.name == "python3"
    edit(toy, "# %% [markdown]\n# ## The idea", '# %% tags=["parameters"]\nsteps = 3\n\n# %% [markdown]\n# ## The idea')
    build(toy)
    assert parameter_names(toy / "chapters" / "01_toy.ipynb") == ["profile", "steps"]
    assert [cell.id for cell in notebook(toy, "chapters").cells].count("parameters") == 1


def test_ids_stay_when_cells_are_inserted(toy):
    build(toy)
    before = [cell.id for cell in notebook(toy, "solutions").cells]
    assert len(set(before)) == len(before)
    edit(toy, "# %% [markdown]\n# ## The idea", "# %%\nx = 1\n\n# %%\nx = 1\n\n# %% [markdown]\n# ## The idea")
    build(toy)
    after = [cell.id for cell in notebook(toy, "solutions").cells]
    new = [name for name in after if name not in before]
    assert [name for name in after if name in before] == before
    assert new[0] == "x-1" and re.fullmatch("x-1-[0-9a-f]{6}", new[1])


def test_outputs_stay_with_unchanged_code_and_go_with_the_rest(toy):
    pretend_executed(toy)
    assert build(toy) == [], "what was stored is kept as it is"
    edit(toy, "print(square(4))", "print(square(5))")
    edit(toy, "# Ten minutes.", "# Eleven minutes.")
    build(toy)
    cells = by_id(notebook(toy, "solutions"))
    assert cells["square-check"].outputs and cells["sum"].outputs
    changed = next(cell for cell in cells.values() if "square(5)" in cell.source)
    assert changed.outputs == [] and changed.execution_count is None
    edit(toy, "from toylib import check", 'from toylib import check\n\nz = "é"')
    toylib = toy / "toylib.py"
    toylib.write_text(toylib.read_text().replace("return x * x", "return x**2"), encoding="utf-8")
    build(toy)
    cells = by_id(notebook(toy, "solutions"))
    assert not cells["square"].outputs and cells["square-check"].outputs


def test_widgets_and_other_noise_are_not_kept(toy):
    pretend_executed(toy)
    path = toy / "solutions" / "01_toy.ipynb"
    book = notebook(toy, "solutions")
    book.metadata.widgets = {"state": {}}
    cell = by_id(book)["sum"]
    view = {"text/plain": "bar", "application/vnd.jupyter.widget-view+json": {"model_id": "x"}}
    cell.outputs = [nbformat.v4.new_output("execute_result", data=view, execution_count=77)]
    cell.metadata.execution = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
    path.write_text(nbformat.writes(book) + "\n", encoding="utf-8")
    assert any("differs from what its source makes" in problem for problem in check(toy))
    build(toy)
    text = path.read_text(encoding="utf-8")
    assert "widget" not in text and "2026" not in text and '"execution_count": 77' not in text and "bar" in text


def test_a_bug_to_find_is_the_named_mistake_under_the_librarys_signature(toy, monkeypatch):
    def doubles(x):
        """Twice x, by mistake."""
        # this gives it away
        return x + x

    class Registry:
        attempt = staticmethod(doubles)

        def mistake(self, name):
            assert name == "doubles"
            return self

    monkeypatch.setattr(utils.checks, "find", lambda name: Registry())
    edit(toy, "minutes=3 points=2", 'minutes=3 points=2 bug="doubles"')
    build(toy)
    cells = by_id(notebook(toy, "chapters"))
    assert cells["square-doubles"].source == (
        'def square(x):\n    """The square of x.\n\n    x: a number\n    """\n    return x + x'
    )
    assert cells["square-doubles-check"].source == "square = check(square)"
    assert by_id(notebook(toy, "solutions"))["square-doubles"].source == definition(toy, "toylib:square").worked


def test_nbgraders_own_validator_accepts_both_forms(toy):
    from nbgrader.nbgraderformat import MetadataValidator

    build(toy)
    for folder in ("chapters", "solutions"):
        book = notebook(toy, folder)
        MetadataValidator().validate_nb(book)
        points = {
            c.metadata.nbgrader.grade_id: c.metadata.nbgrader.get("points")
            for c in book.cells
            if c.metadata.get("nbgrader")
        }
        assert {key: value for key, value in points.items() if value} == {
            "square-check": 2, "Pair-check": 1, "Pair-short": 1, "total-check": 3,
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------- the gate


def test_the_gate_names_what_is_wrong(toy):
    pretend_executed(toy)
    assert check(toy) == []
    student = toy / "chapters" / "01_toy.ipynb"
    student.write_text(student.read_text().replace("Ten minutes", "Five minutes"), encoding="utf-8")
    shutil.copy(student, toy / "chapters" / "05_gone.ipynb")
    edit(toy, "print(square(4))", "\n".join(f"v{i} = {i}" for i in range(26)) + ";\n!pip install x")
    problems = "\n".join(check(toy))
    assert "chapters/01_toy.ipynb differs from what its source makes: run `make build`" in problems
    assert "chapters/05_gone.ipynb has no source" in problems
    assert "1 cells without a run (the first is v0-0)" in problems
    assert "has 27 lines" in problems and "installs something" in problems and "ends a line with `;`" in problems
    student.unlink()
    assert "chapters/01_toy.ipynb is missing" in "\n".join(check(toy))


# ------------------------------------------------------------------------------------------------- running


def test_outputs_are_stored_once_and_for_all(toy):
    execute(toy)
    path = toy / "solutions" / "01_toy.ipynb"
    stored = path.read_bytes()
    cells = by_id(notebook(toy, "solutions"))
    assert cells["square-check"].outputs[0].text == "square: right. Good.\n"
    assert [cell.execution_count for cell in code_cells(notebook(toy, "solutions"))] == list(range(1, 13))
    assert b"iopub" not in stored and check(toy) == []
    edit(toy, "print(square(4))", "print(square(4) / 0)")
    with pytest.raises(CourseError, match="01_toy.ipynb did not run.*(?s:.*)ZeroDivisionError"):
        execute(toy)
    kept = by_id(notebook(toy, "solutions"))
    assert kept["sum"].outputs == cells["sum"].outputs


def test_what_is_not_fit_to_store(toy):
    def cell(name, text, graded=False):
        output = nbformat.v4.new_output("stream", name=name, text=text)
        made = nbformat.v4.new_code_cell("f = check(f)", outputs=[output])
        made.metadata.nbgrader = {"grade": graded}
        return made

    path = toy / "solutions" / "01_toy.ipynb"
    _refuse_unfit(cell("stdout", "f: right. Good.\n", graded=True), path)
    with pytest.raises(CourseError, match="wrote to stderr"):
        _refuse_unfit(cell("stderr", "Warning\n"), path)
    with pytest.raises(CourseError, match="should find the library's own answer right, and said: f: wrong."):
        _refuse_unfit(cell("stdout", "f: wrong.\n", graded=True), path)


def test_a_failing_notebook_makes_the_run_fail_and_the_report_shows_where(toy, monkeypatch, capsys):
    build(toy)
    student = toy / "chapters" / "01_toy.ipynb"
    book = notebook(toy, "chapters")
    by_id(book)["print-square-4"].source = "print(square(4) / 0)  # <b>"
    student.write_text(nbformat.writes(book), encoding="utf-8")
    monkeypatch.setattr(__main__, "ROOT", toy)
    assert __main__.main(["run", "--jobs", "2"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^ok +01_toy \(worked\), [\d.]+ s  \[\d of 2\]$", printed, re.MULTILINE)
    assert re.search(
        r"^FAILED +01_toy \(student\), [\d.]+ s: cell print-square-4, ZeroDivisionError", printed, re.MULTILINE
    )
    assert "1 passed, 1 failed" in printed
    report = (toy / "build" / "report" / "index.html").read_text(encoding="utf-8")
    assert "print(square(4) / 0)  # &lt;b&gt;" in report and "ZeroDivisionError: division by zero" in report
    for link in ("solutions/01_toy.html", "chapters/01_toy.html"):
        assert f'href="{link}' in report and (toy / "build" / "report" / link).exists()
    assert 'id="cell-id=print-square-4"' in (toy / "build" / "report" / "chapters" / "01_toy.html").read_text("utf-8")
    executed = nbformat.read(toy / "build" / "report" / "solutions" / "01_toy.ipynb", as_version=4)
    assert any(
        'profile = "tiny"' in cell.source for cell in executed.cells if "injected-parameters" in cell.metadata.tags
    )


def test_a_run_refuses_what_it_does_not_know(toy):
    with pytest.raises(CourseError, match="chapters/01_toy.ipynb is missing: run `make build`"):
        run(toy)
    build(toy)
    with pytest.raises(CourseError, match="01_toy has no parameter 'stpes'; it has profile"):
        run(toy, parameters={"stpes": 3})
    with pytest.raises(CourseError, match="There is no profile 'huge'; there are tiny"):
        run(toy, profile="huge")
    (toy / "build").write_text("a file where the folder should be")
    with pytest.raises(CourseError, match="The report cannot be written to"):
        run(toy)


def test_the_command_line_says_one_sentence(monkeypatch, toy, capsys):
    monkeypatch.setattr(__main__, "ROOT", toy)
    build(toy)
    assert __main__.main(["run", "--param", "stpes=3"]) == 1
    assert capsys.readouterr().err == "01_toy has no parameter 'stpes'; it has profile.\n"
    assert __main__._parameter("steps=3") == ("steps", 3) and __main__._parameter("name=a b") == ("name", "a b")
    assert __main__.main(["check"]) == 1 and "without a run" in capsys.readouterr().out
