"""The chapters themselves: built, executed, and running blank. Their stored outputs are compared by nbval."""

import pytest

from utils.course.gate import check
from utils.course.run import run
from utils.course.source import sources
from utils.paths import ROOT


def test_the_committed_notebooks_are_what_build_makes():
    assert check(ROOT) == []


@pytest.mark.parametrize("chapter", [source.stem for source in sources(ROOT)])
def test_a_blank_chapter_runs_to_its_end(chapter, tmp_path):
    (result,) = run(ROOT, forms=("student",), only=chapter, out=tmp_path / "report")
    assert result.error is None, result.error["traceback"]
