"""Run one notebook with papermill, render it, say how it went. A process of its own, started by run.py by its path.

It reads one JSON object from stdin: {"notebook", "output", "parameters", "timeout"}; it prints one:
{"seconds", "error": null or {"cell", "source", "kind", "message", "traceback"}}.
"""

import json
import sys
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")  # the tools' own deprecations are not the reader's concern

import nbformat  # noqa: E402
import papermill  # noqa: E402
from nbconvert import HTMLExporter  # noqa: E402
from papermill.exceptions import PapermillExecutionError  # noqa: E402


def work(job: dict) -> dict:
    notebook, output = Path(job["notebook"]), Path(job["output"])
    output.parent.mkdir(parents=True, exist_ok=True)
    began, error = time.monotonic(), None
    try:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            parameters=job["parameters"],
            kernel_name="python3",
            cwd=str(notebook.parent),
            progress_bar=False,
            execution_timeout=job["timeout"],
        )
    except PapermillExecutionError as failed:
        error = {
            "cell": _cell_id(output, failed),
            "source": failed.source,
            "kind": failed.ename,
            "message": failed.evalue,
            "traceback": "\n".join(failed.traceback),
        }
    except Exception as failed:  # a dead kernel or a cell out of time; papermill has several classes for them
        text = str(failed).strip() or "no message"
        error = {"cell": "", "source": "", "kind": type(failed).__name__, "message": text, "traceback": text}
    seconds = time.monotonic() - began
    if output.exists():
        html, _ = HTMLExporter(template_name="lab").from_filename(str(output))
        output.with_suffix(".html").write_text(html, encoding="utf-8")
    return {"seconds": seconds, "error": error}


def _cell_id(output: Path, failed: PapermillExecutionError) -> str:
    """The id of the failed cell in the executed copy, which HTML uses as an anchor."""
    for cell in nbformat.read(output, as_version=4).cells:
        if cell.cell_type == "code" and any(o.output_type == "error" for o in cell.outputs):
            return cell.id
    return ""


if __name__ == "__main__":
    print(json.dumps(work(json.load(sys.stdin))))
