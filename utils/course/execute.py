"""Run worked notebooks and store their outputs in solutions/*.ipynb."""

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from utils.course import CourseError
from utils.course.build import build, dumps
from utils.course.environment import kernel_environment
from utils.course.outputs import code_cells, store
from utils.course.source import sources

TIMEOUT = 900  # seconds for one cell on the tiny profile


def execute(root: Path, only: str | None = None) -> list[Path]:
    """Build, run each worked notebook from top to bottom, store its outputs; returns the notebooks written.

    Raises CourseError, and leaves that notebook's stored outputs alone, if a cell fails, writes to stderr, or is a
    check that does not say "right".
    """
    build(root, only)
    os.environ.update(kernel_environment())
    done = []
    for source in sources(root, only):
        path = source.with_suffix(".ipynb")
        notebook = nbformat.read(path, as_version=4)
        ran = _run(nbformat.from_dict(notebook), path)
        for count, (cell, new) in enumerate(zip(code_cells(notebook), code_cells(ran), strict=True), 1):
            _refuse_unfit(new, path)
            store(cell, new.outputs, count)
        path.write_text(dumps(notebook), encoding="utf-8", newline="\n")
        done.append(path)
    return done


def _run(notebook, path: Path):
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # each kernel warns that its local port is not encrypted
        coalesce_streams=True,  # otherwise the number of stored pieces depends on timing
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        return client.execute()
    except (CellExecutionError, DeadKernelError, TimeoutError) as error:
        raise CourseError(f"{path.name} did not run, its stored outputs are as they were:\n{error}") from error


def _refuse_unfit(cell, path: Path) -> None:
    printed = {name: "" for name in ("stdout", "stderr")}
    for output in cell.outputs:
        if output.output_type == "stream":
            printed[output.name] += output.text
    where = f"{path.name}, cell {cell.id}"
    if printed["stderr"]:
        raise CourseError(f"{where} wrote to stderr, which is not stored: {printed['stderr'].strip()[:300]}")
    if cell.metadata.get("nbgrader", {}).get("grade") and ": right." not in printed["stdout"]:
        raise CourseError(f"{where} should find the library's own answer right, and said: {printed['stdout'].strip()}")
