"""The command line of the course: `python -m utils.course COMMAND`; `make` alone lists the usual ones."""

import argparse
import ast
import os
import subprocess
import sys
import time
from pathlib import Path

from utils.course import CourseError
from utils.paths import ROOT


def main(arguments=None) -> int:
    args = _parser().parse_args(arguments)
    try:
        return args.command(args) or 0
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m utils.course", description="Build, run, test and grade.")
    add = parser.add_subparsers(required=True, metavar="COMMAND").add_parser

    command = add("build", help="write both notebooks of every chapter from solutions/*.py")
    command.add_argument("--only", help="a chapter, or how its name starts: 02")
    command.add_argument("--execute", action="store_true", help="then run the worked notebooks and store outputs")
    command.set_defaults(command=_build)

    command = add("execute", help="run worked notebooks and store their outputs")
    command.add_argument("only", nargs="?", help="a chapter, or how its name starts; all of them without it")
    command.set_defaults(command=_execute)

    command = add("check", help="are the committed notebooks what build makes?")
    command.set_defaults(command=_check)

    command = add("run", help="execute notebooks into build/report")
    command.add_argument("--profile", default="tiny", help="tiny, colab or gpu")
    command.add_argument("--jobs", type=int, default=2, help="notebooks at a time")
    command.add_argument("--form", choices=("student", "worked", "both"), default="both")
    command.add_argument("--only", help="a chapter, or how its name starts: 02")
    command.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    command.set_defaults(command=_run)

    command = add("test", help="run every test; further arguments go to pytest")
    command.add_argument("pytest", nargs=argparse.REMAINDER, metavar="...")
    command.set_defaults(command=_test)

    command = add("collect", help="put a class's submissions back onto the release notebook")
    command.add_argument("chapter")
    command.add_argument("folder", help="one notebook or one folder per student")
    command.set_defaults(command=_collect)

    command = add("grade", help="grade what was collected, with nbgrader")
    command.add_argument("chapter")
    command.set_defaults(command=_grade)
    return parser


def _build(args) -> int:
    from utils.course.build import build

    for path in build(ROOT, args.only):
        print(f"wrote {path.relative_to(ROOT).as_posix()}")
    return _execute(args) if args.execute else 0


def _execute(args) -> int:
    from utils.course.execute import execute

    for path in execute(ROOT, args.only):
        print(f"executed {path.relative_to(ROOT).as_posix()}")
    return 0


def _check(args) -> int:
    from utils.course.gate import check

    problems = check(ROOT)
    print("\n".join(problems) or "The notebooks are what their sources make.")
    return 1 if problems else 0


def _run(args) -> int:
    from utils.course.run import run

    forms = ("student", "worked") if args.form == "both" else (args.form,)
    began = time.monotonic()
    results = run(ROOT, args.profile, args.jobs, forms, args.only, dict(map(_parameter, args.param)))
    failed = sum(result.error is not None for result in results)
    seconds = time.monotonic() - began
    print(f"{len(results) - failed} passed, {failed} failed in {seconds:.0f} s; see build/report/index.html")
    return 1 if failed else 0


def _parameter(text: str) -> tuple[str, object]:
    """ "steps=20" -> ("steps", 20); what is no Python literal stays a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise CourseError(f"--param takes NAME=VALUE, not {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _test(args) -> int:
    """pytest over tests/ and, through nbval, over the worked notebooks' stored outputs; one summary at the end."""
    from utils.course.environment import kernel_environment

    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]  # nbval needs whole files
    command += ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg"]
    command += args.pytest or ["tests", "solutions"]
    return subprocess.run(command, cwd=ROOT, env=kernel_environment()).returncode


def _collect(args) -> int:
    from utils.course.collect import collect

    if not args.folder:
        raise CourseError("From where? For example FROM=~/Downloads/submissions.")
    return collect(ROOT, args.chapter, Path(args.folder).expanduser())


def _grade(args) -> int:
    from utils.course.grade import grade

    return grade(ROOT, args.chapter)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUTF8", "1")
    sys.exit(main())
