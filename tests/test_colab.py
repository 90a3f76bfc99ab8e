"""The first cell of a notebook, run in a fresh virtual environment that has a torch and a numpy, as Colab has.

The environment's torch and numpy are this machine's own, reached through links; pip sees their real metadata. What pip
installs comes from wheels made here, so the test needs no network.
"""

import hashlib
import importlib.metadata
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from utils.course.build import make
from utils.course.source import read_source
from utils.paths import ROOT

MISSING = ("peft", "datasets")  # of the course's requirements, these are not there yet
TORCH_NEEDS = "typing_extensions sympy mpmath networkx jinja2 markupsafe fsspec filelock"
COLAB = "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')\n"


def site_packages(home: Path) -> Path:
    return next(home.glob("lib/python*/site-packages"), home / "Lib" / "site-packages")


def write_wheel(folder: Path, name: str, version: str, needs=()) -> None:
    """A wheel with one empty module, enough for pip to install it and to read what it needs."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}.py": f'__version__ = "{version}"\n',
        f"{info}/METADATA": metadata + "".join(f"Requires-Dist: {need}\n" for need in needs),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A virtual environment like a Colab session: torch, numpy and most of what the course needs, except MISSING."""
    home = tmp_path_factory.mktemp("colab") / "venv"
    venv.create(home, symlinks=True)
    site = site_packages(home)
    for found in importlib.metadata.distributions():
        name = found.metadata["Name"].lower().replace("_", "-")
        if name in (*MISSING, "peft-from-scratch"):
            continue
        info = site / f"{name.replace('-', '_')}-{found.version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(found.read_text("METADATA"), encoding="utf-8")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")
    linked = home / "linked"  # outside site-packages, where no uninstall could reach the real files
    linked.mkdir()
    for name in f"torch numpy {TORCH_NEEDS} pip".split():
        found = importlib.metadata.distribution(name)
        for top in {Path(str(file)).parts[0] for file in found.files}:
            if top not in ("..", "__pycache__") and "dist-info" not in top:
                (linked / top).symlink_to(found.locate_file(top))
    (site / "linked.pth").write_text(str(linked) + "\n")
    return home


@pytest.fixture
def checkout(tmp_path):
    """A repository to clone: what the cell needs of this one, committed."""
    origin = tmp_path / "origin"
    for name in ("pyproject.toml", "utils/__init__.py", "utils/course/__init__.py", "utils/course/colab.py"):
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        text = '"""Stands for the package."""\n' if name == "utils/__init__.py" else (ROOT / name).read_text("utf-8")
        (origin / name).write_text(text, encoding="utf-8")
    git = ["git", "-C", str(origin), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "all"], check=True)
    return origin


def first_cell(toy, checkout, tmp_path) -> str:
    """The set-up cell that build writes, with the repository and /content replaced by folders of the test."""
    book = make(toy, "01_toy", read_source(toy / "solutions" / "01_toy.py"), "student")
    source = next(cell.source for cell in book.cells if cell.id == "set-up")
    address = "https://github.com/peft-from-scratch/peft-from-scratch"
    assert source.count(address) == 1 and source.count("/content/") == 1
    return source.replace(address, checkout.as_uri()).replace("/content", (tmp_path / "content").as_posix())


def run_in(session, code, wheels, tmp_path, monkeypatch):
    (tmp_path / "content").mkdir(exist_ok=True)
    for name in ("PYTHONPATH", "PIP_CONSTRAINT", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    command = [str(session / "bin" / "python"), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)


def state(session) -> dict:
    """Every file that says which torch and numpy this is, by content and time."""
    files = [
        path
        for path in site_packages(session).glob("*.dist-info/*")
        if path.parent.name.startswith(("torch-", "numpy-"))
    ]
    files += [session / "linked" / name / "version.py" for name in ("torch", "numpy")]
    return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


SAY = "import torch, numpy; print(torch.__version__, numpy.__version__, torch.__file__)\n"


def test_the_cell_installs_what_is_missing_and_keeps_torch_and_numpy(toy, session, checkout, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "peft", "0.99.0", ["torch>=1.13", "numpy>=1.17"])
    write_wheel(wheels, "datasets", "99.0.0", ["numpy>=1.17"])
    write_wheel(wheels, "torch", "99.0.0")  # there to be taken, if anything took it
    write_wheel(wheels, "numpy", "99.0.0")
    before = state(session)
    cell = first_cell(toy, checkout, tmp_path)
    code = COLAB + SAY + cell + "\nimport utils, peft, datasets\nprint(utils.__file__, peft.__version__)\n" + SAY
    done = run_in(session, code, wheels, tmp_path, monkeypatch)
    assert done.returncode == 0, done.stderr
    first, _, ready, library, last = done.stdout.splitlines()
    assert first == last and first.startswith(importlib.metadata.version("torch"))
    assert ready.startswith("Ready: what was missing is installed; torch ") and ready.endswith("are as they were.")
    assert str(tmp_path / "content" / "peft-from-scratch" / "utils") in library and library.endswith("0.99.0")
    assert state(session) == before and len(before) >= 8
    again = run_in(session, COLAB + cell, wheels, tmp_path, monkeypatch)
    assert again.returncode == 0 and state(session) == before, "running the cell twice changes nothing"


def test_a_requirement_that_would_replace_torch_is_a_sentence(toy, session, checkout, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "torch", "99.0.0")
    write_wheel(wheels, "newpeft", "1.0.0", ["torch>=99"])
    pyproject = checkout / "pyproject.toml"
    pyproject.write_text('[project]\nname = "peft-from-scratch"\ndependencies = ["newpeft>=1.0"]\n', encoding="utf-8")
    subprocess.run(
        ["git", "-C", str(checkout), "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qam", "x"],
        check=True,
    )
    before = state(session)
    done = run_in(session, COLAB + first_cell(toy, checkout, tmp_path), wheels, tmp_path, monkeypatch)
    assert done.returncode != 0
    sentence = done.stderr.strip().splitlines()[-1]
    version = importlib.metadata.version("torch")
    assert sentence.startswith(
        f"RuntimeError: The course cannot be installed beside this session's torch=={version} and numpy=="
    )
    assert state(session) == before
    control = [str(session / "bin" / "python"), "-m", "pip", "install", "--dry-run", "newpeft"]
    would = subprocess.run(control, capture_output=True, text=True)
    assert "Would install newpeft-1.0.0 torch-99.0.0" in would.stdout, "without the cell, pip replaces torch"


def test_elsewhere_the_cell_does_nothing(toy, checkout, tmp_path):
    code = first_cell(toy, checkout, tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not (tmp_path / "content").exists()


def test_without_torch_the_cell_says_whom_it_is_for(monkeypatch):
    from utils.course import colab

    monkeypatch.setattr(colab, "_version", lambda name: None if name == "torch" else "2.0")
    with pytest.raises(RuntimeError, match="This cell is for Colab, which brings torch; here there is none"):
        colab.prepare(ROOT)


def test_other_failures_pass_on_pips_reason(monkeypatch):
    from utils.course import colab

    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: Could not connect to the index\n")
    monkeypatch.setattr(colab.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match="run this cell again.*ERROR: Could not connect to the index"):
        colab.prepare(ROOT)
