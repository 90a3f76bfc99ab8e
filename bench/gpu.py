"""python -m bench.gpu test | bench [name ...]: what only a GPU can show. Without one it says so and does nothing.

test    the kernels compiled, training on the GPU, and predicted memory: tests/test_kernels*.py and tests/test_gpu*.py
bench   the measurements of bench.gpu_rows, all or the named ones

Both write data/measurements/DEVICE/NAME.json: the device, its capability and driver, versions, the date, the command,
and the rows.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess

import torch

from utils.paths import DATA, ROOT

FOLDER = DATA / "measurements"
NO_GPU = "There is no CUDA GPU here, so nothing was run: `make gpu-test` and `make gpu-bench` need one."
NAMES = ("kernels", "kernels_four_bit", "gpu", "gpu_four_bit", "gpu_memory", "optimizers_8bit")
TESTS = tuple(f"tests/test_{name}.py" for name in NAMES)


def main(arguments=None):
    """Runs what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("test", "bench"))
    parser.add_argument("names", nargs="*", help="of measurements; none: all")
    parser.add_argument("--repeats", type=int, default=20, help="turns of each measurement")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 0
    if given.what == "test":
        return run_tests()
    from bench import gpu_rows

    unknown = [name for name in given.names if name not in gpu_rows.BENCHES]
    if unknown:
        parser.error(f"no measurement called {', '.join(unknown)}: there are {', '.join(gpu_rows.BENCHES)}")
    for name in given.names or gpu_rows.BENCHES:
        rows = gpu_rows.BENCHES[name](given.repeats)
        print(table(rows))
        written(record(name, f"python -m bench.gpu bench {name} --repeats {given.repeats}", rows))
    return 0


def run_tests():
    """Runs the tests in this process, so that their outcomes can be recorded; returns pytest's exit status."""
    import pytest

    outcomes = Outcomes()
    status = pytest.main(["-q", *(str(ROOT / path) for path in TESTS)], plugins=[outcomes])
    written(record("tests", "python -m bench.gpu test", [outcomes.counts]))
    return int(status)


class Outcomes:
    """A pytest plugin that counts, and remembers the names of failures."""

    def __init__(self):
        self.counts = {"passed": 0, "skipped": 0, "failed": 0, "failures": []}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            if report.outcome == "failed":
                self.counts["failures"].append(report.nodeid)


# ------------------------------------------------------------------------------------------------------ the records


def record(name, command, rows):
    """Writes FOLDER/DEVICE/NAME.json and returns its path. rows: a list of dicts of JSON's values"""
    about = machine()
    state = {"name": name, "command": command, "date": datetime.date.today().isoformat(), **about, "rows": rows}
    path = FOLDER / slug(about["device"]) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)  # put in place whole
    return path


def machine():
    """The GPU and the software that measured."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "peft", "bitsandbytes"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None  # no Triton on Windows
    major, minor = torch.cuda.get_device_capability()
    return {
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "memory_gb": round(torch.cuda.mem_get_info()[1] / 1e9, 1),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def driver():
    """The NVIDIA driver's version, or None where nvidia-smi is not to be had."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def slug(device):
    """A folder's name: "Tesla T4" -> "tesla-t4"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def written(path):
    print(f"written to {path.relative_to(ROOT)}")


def table(rows):
    """Rows with equal keys as text."""
    cells = [list(rows[0]), *([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in cells)


if __name__ == "__main__":
    raise SystemExit(main())
