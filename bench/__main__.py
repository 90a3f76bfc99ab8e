"""python -m bench [name ...]: run the benchmarks, print a table each, and write build/bench/NAME.json."""

import argparse
import datetime
import importlib
import json
import platform

import torch

from bench import common
from utils.paths import ROOT

NAMES = ("lora", "dora", "adalora", "prefix", "quantization", "attach")


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, help=f"which to run: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each measurement; the best counts")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark called {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    torch.set_num_threads(1)
    for name in arguments.names:
        bench = importlib.import_module(f"bench.{name}")
        rows = bench.measure(arguments.repeats)
        record = {
            "command": f"python -m bench {name} --repeats {arguments.repeats}",
            "date": datetime.date.today().isoformat(),
            "device": f"one thread of {_cpu()}",
            "versions": {"python": platform.python_version(), **{m: _version(m) for m in common.VERSIONS}},
            "rows": rows,
        }
        path = ROOT / "build" / "bench" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(bench.table(rows) if hasattr(bench, "table") else common.table(bench.TITLE, rows))
        print(f"{record['device']}; written to {path.relative_to(ROOT)}")


def _version(module):
    return importlib.import_module(module).__version__


def _cpu():
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
