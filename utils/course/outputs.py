"""Stored outputs of worked notebooks: kept while the code that made them is unchanged, and free of run-to-run noise."""

from pathlib import Path

import nbformat

DROPPED_MIMES = ("application/vnd.jupyter.widget-view+json",)  # GitHub refuses notebooks with widget views


def keep_outputs(notebook, stored: Path) -> None:
    """Copy outputs from the notebook at `stored` to the cells of `notebook` with the same id and the same code."""
    try:
        old = {cell.id: cell for cell in nbformat.read(stored, as_version=4).cells if cell.cell_type == "code"}
    except (OSError, ValueError, AttributeError, nbformat.ValidationError):
        return  # none yet, or not a notebook any more: there is nothing to keep
    for count, cell in enumerate(code_cells(notebook), 1):
        match = old.get(cell.id)
        if match is not None and match.source == cell.source and match.execution_count is not None:
            store(cell, match.outputs, count)


def store(cell, outputs: list, count: int) -> None:
    """Give a cell its outputs, as the count-th code cell of a run from top to bottom."""
    cell.outputs = [_clean(output, count) for output in outputs]
    cell.execution_count = count


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _clean(output, count: int):
    if "data" in output:
        output.data = {mime: value for mime, value in output.data.items() if mime not in DROPPED_MIMES}
    if output.output_type == "execute_result":
        output.execution_count = count
    return output
