"""build/report/index.html: which notebooks ran, how long each took, and where one failed."""

import html
import platform
import re
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SHOWN = ("torch", "transformers", "peft", "bitsandbytes", "datasets")
COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }}
h1 {{ font-size: 1.4rem; margin-bottom: 0.2rem; }}
p {{ margin: 0.2rem 0 1rem; color: #555; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; padding: 0.4rem 0.8rem 0.4rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }}
td.time, th.time {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.failed {{ color: #a40000; font-weight: 600; }}
section {{ margin-top: 2rem; }}
h2 {{ font-size: 1.1rem; }}
pre {{ background: #f5f5f5; padding: 0.8rem; overflow-x: auto; font-size: 13px; line-height: 1.4; }}
</style>
<h1>{title}</h1>
<p>{about}</p>
<table>
<thead><tr><th>Chapter<th>Form<th>Status<th class="time">Time</tr></thead>
<tbody>
{rows}
</tbody>
</table>
{failures}
</html>
"""


def write_report(out: Path, results: list, parameters: dict) -> Path:
    """One page for a list of run.Result; returns its path."""
    failed = [result for result in results if result.error]
    title = f"{len(results)} notebooks ran, {len(failed)} failed" if failed else f"{len(results)} notebooks ran"
    settings = ", ".join(f"{name} = {value}" for name, value in parameters.items())
    page = PAGE.format(
        title=title,
        about=html.escape(f"{datetime.now():%d %B %Y, %H:%M}; {settings}; {_versions()}"),
        rows="\n".join(_row(out, result) for result in results),
        failures="\n".join(_failure(out, result) for result in failed),
    )
    path = out / "index.html"
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in SHOWN:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _link(out: Path, result) -> str:
    return result.output.with_suffix(".html").relative_to(out).as_posix()


def _row(out: Path, result) -> str:
    status = "ok"
    if result.error:
        status = f'<a class="failed" href="#{result.name}-{result.form}">failed: {html.escape(_where(result))}</a>'
    name = result.name
    if result.output.with_suffix(".html").exists():
        name = f'<a href="{_link(out, result)}">{name}</a>'
    return f'<tr><td>{name}<td>{result.form}<td>{status}<td class="time">{result.seconds:.1f} s</tr>'


def _failure(out: Path, result) -> str:
    """The failing cell's source and its error, and a link to the cell in the executed copy."""
    error = result.error
    heading = f"{result.name} ({result.form}): {_where(result)}"
    where = ""
    if error["cell"]:
        anchor = f"{_link(out, result)}#cell-id={error['cell']}"
        where = f'<p><a href="{html.escape(anchor)}">The cell in the executed copy</a></p>'
    source = f"<pre>{html.escape(error['source'])}</pre>" if error["source"] else ""
    traceback = html.escape(COLOUR_CODES.sub("", error["traceback"]))
    return (
        f'<section id="{result.name}-{result.form}">\n<h2>{html.escape(heading)}</h2>\n{where}\n{source}\n'
        f"<pre>{traceback}</pre>\n</section>"
    )


def _where(result) -> str:
    error = result.error
    first = error["message"].strip().partition("\n")[0]
    return f"cell {error['cell']}, {error['kind']}: {first}" if error["cell"] else f"{error['kind']}: {first}"
