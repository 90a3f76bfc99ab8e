"""Execute the chapters with papermill, some at a time, and leave a report with the executed copies."""

import ast
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import nbformat

from utils.course import CourseError
from utils.course.build import FORMS
from utils.course.environment import kernel_environment
from utils.course.execute import TIMEOUT
from utils.course.report import write_report
from utils.course.source import sources

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Result:
    name: str  # "02_lora"
    form: str  # "student" or "worked"
    output: Path  # the executed copy; its HTML lies beside it
    seconds: float
    error: dict | None  # cell, source, kind, message, traceback

    def line(self) -> str:
        text = f"{'FAILED' if self.error else 'ok':8} {self.name} ({self.form}), {self.seconds:.1f} s"
        if self.error:
            first = self.error["message"].strip().partition("\n")[0]
            text += f": cell {self.error['cell'] or '?'}, {self.error['kind']}: {first}"
        return text


def run(root: Path, profile="tiny", jobs=2, forms=tuple(FORMS), only=None, parameters=None, out=None) -> list[Result]:
    """Execute every selected notebook under a profile and write `out`/index.html (default build/report).

    parameters: {name: value} beside the profile. A parameter that some selected notebook does not have, an unknown
    profile or an unwritable folder raises CourseError before anything runs.
    """
    out = out or root / "build" / "report"
    parameters = {"profile": profile, **(parameters or {})}
    _check_profile(parameters["profile"])
    notebooks = [(form, root / FORMS[form] / f"{s.stem}.ipynb") for s in sources(root, only) for form in forms]
    for _, path in notebooks:
        _check_parameters(path, parameters)
    _fresh(out)
    results = []
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(_one, form, path, out, parameters) for form, path in notebooks]
        for future in as_completed(waiting):
            results.append(future.result())
            _say(f"{results[-1].line()}  [{len(results)} of {len(notebooks)}]")
    order = [(path.stem, form) for form, path in notebooks]
    results.sort(key=lambda result: order.index((result.name, result.form)))
    write_report(out, results, parameters)
    return results


def parameter_names(path: Path) -> list[str]:
    """The names that a notebook's parameters cell assigns."""
    for cell in nbformat.read(path, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", ()):
            assigned = [node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)]
            return [target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)]
    return []


def _check_parameters(path: Path, parameters: dict) -> None:
    if not path.exists():
        raise CourseError(f"{path} is missing: run `make build`.")
    known = parameter_names(path)
    for name in parameters:
        if name not in known:
            raise CourseError(f"{path.stem} has no parameter {name!r}; it has {', '.join(known) or 'none'}.")


def _check_profile(profile: str) -> None:
    from utils.models import PROFILES  # here, because build and check need no models

    if profile not in PROFILES:
        raise CourseError(f"There is no profile {profile!r}; there are {', '.join(PROFILES)}.")


def _fresh(out: Path) -> None:
    """Empty the report's folder, so that what it shows is this run."""
    try:
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        (out / "index.html").touch()
    except OSError as error:
        raise CourseError(f"The report cannot be written to {out}: {error.strerror}.") from error


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")  # in one piece: print() from two threads mixes lines
    sys.stdout.flush()


def _one(form: str, path: Path, out: Path, parameters: dict) -> Result:
    _say(f"running  {path.stem} ({form})")
    output = out / FORMS[form] / path.name
    timeout = TIMEOUT if parameters["profile"] == "tiny" else None
    job = {"notebook": str(path), "output": str(output), "parameters": parameters, "timeout": timeout}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", str(WORKER)],  # -P: modules beside the worker must not shadow installed ones
        input=json.dumps(job),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=kernel_environment(parameters["profile"]),
    )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        text = done.stderr.strip() or f"the process ended with {done.returncode}"
        error = {"cell": "", "source": "", "kind": "worker", "message": text.splitlines()[-1], "traceback": text}
        answer = {"seconds": time.monotonic() - began, "error": error}
    return Result(path.stem, form, output, answer["seconds"], answer["error"])
