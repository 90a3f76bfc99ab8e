"""What the first cell of a notebook runs on Colab: install what is missing, and leave torch and numpy alone.

Colab's torch fits its driver and its other packages, and a session that already imported numpy breaks when it is
replaced. So both are pinned to what is there, and a requirement that needs another version becomes a sentence.
This file is run by its path before anything is installed: it imports the standard library only.
"""

import importlib
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

KEEP = ("torch", "numpy")
CONFLICT = ("ResolutionImpossible", "conflicting dependencies", *(f"the requirement {name}" for name in KEEP))


def prepare(home: Path) -> None:
    """Install the course's requirements beside Colab's own packages and put `home` on the path.

    home: the checkout. Raises RuntimeError with one sentence; torch and numpy are then as they were.
    """
    kept = {name: _version(name) for name in KEEP}
    if missing := [name for name, found in kept.items() if found is None]:
        raise RuntimeError(f"This cell is for Colab, which brings {' and '.join(missing)}; here there is none.")
    print("Installing what is missing; this takes about a minute.", flush=True)
    project = tomllib.loads((home / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = [f"{name}=={found}" for name, found in kept.items()]
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(folder) / "keep.txt"
        keep.write_text("\n".join(pins) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "-c", str(keep), *project["dependencies"]]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(_sentence(done.stderr, pins))
    importlib.invalidate_caches()
    if changed := [name for name in KEEP if _version(name) != kept[name]]:
        raise RuntimeError(f"{' and '.join(changed)} changed on installing. Restart the runtime and try again.")
    if str(home) not in sys.path:
        sys.path.insert(0, str(home))
    print("Ready: what was missing is installed; " + " and ".join(pins).replace("==", " ") + " are as they were.")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _sentence(stderr: str, pins: list[str]) -> str:
    """Why pip gave up: a conflict with what must stay, or anything else in pip's own words."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "pip gave no reason")
    if any(sign in stderr for sign in CONFLICT):
        return (
            f"The course cannot be installed beside this session's {' and '.join(pins)}, which must stay as they are. "
            f"Choose a newer runtime version in Colab's Runtime menu, or an older release of the course. pip: {reason}"
        )
    return f"The installation failed; run this cell again, and if it fails again, this is pip's reason: {reason}"


if __name__ == "__main__":
    prepare(Path(__file__).resolve().parents[2])
