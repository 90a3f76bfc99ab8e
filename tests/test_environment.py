"""pyproject.toml, constraints.txt and environment.yml say the same thing, and the imports need nothing else."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name as canonical
from packaging.version import Version

from utils.course.floors import floors
from utils.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LIBRARY = [Requirement(text) for text in PROJECT["dependencies"]]
TOOLS = [Requirement(text) for extra in PROJECT["optional-dependencies"].values() for text in extra]
DIRECT = [need for need in LIBRARY + TOOLS if need.name != PROJECT["name"]]
# psutil by accelerate: a range of our own would make Colab replace the one that it has loaded. triton by torch, where
# it is built for CUDA: without it utils.kernels uses its references.
BROUGHT = {"psutil", "triton"}
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)


def test_every_requirement_is_pinned_inside_its_range():
    pins = {canonical(name): pin for name, pin in PINS.items()}
    for need in DIRECT:
        assert need.specifier.contains(pins[canonical(need.name)], prereleases=True), need


def test_the_pins_are_plain_versions():
    """No local tag: "2.13.0+cpu" exists on one index only, and 2.13.0 finds it there all the same."""
    for name, pin in PINS.items():
        assert str(Version(pin)) and Version(pin).local is None, name


def test_the_required_packages_are_there():
    wanted = {
        "jupyterlab",
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "datasets",
        "matplotlib",
        "nbval",
        "papermill",
    }
    assert wanted <= {need.name for need in DIRECT}
    assert "nbgrader" in {Requirement(text).name for text in PROJECT["optional-dependencies"]["grade"]}


def test_the_conda_file_has_no_version_but_pythons():
    entries = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    plain, nested = [e for e in entries if isinstance(e, str)], [e for e in entries if isinstance(e, dict)]
    assert nested == [{"pip": ["-c constraints.txt", "-e .[dev]"]}]
    assert [re.sub(r"=.*", "", entry) for entry in plain] == ["python", "pip"]
    python = next(entry.partition("=")[2] for entry in plain if entry.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0")


def test_floors_are_the_lower_ends(tmp_path):
    assert floors(ROOT / "pyproject.toml") == sorted(
        f"{need.name}{str(need.specifier).replace('>=', '==')}" for need in DIRECT
    )
    capped = tmp_path / "pyproject.toml"
    capped.write_text('[project]\nname = "x"\ndependencies = ["torch<3"]\noptional-dependencies = {}\n')
    with pytest.raises(ValueError, match="'torch<3' must read name>=version"):
        floors(capped)


def test_floors_need_no_installed_package():
    command = [sys.executable, "-I", "-S", str(ROOT / "utils/course/floors.py"), str(ROOT / "pyproject.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "torch==" in done.stdout


def imported(path):
    """Top-level modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize(
    "folder, allowed", [("utils", LIBRARY), ("solutions", LIBRARY), ("data", DIRECT), ("tests", DIRECT)]
)
def test_every_import_is_a_declared_requirement(folder, allowed):
    """What utils imports is what Colab installs; only the notebook tools in utils/course need the rest."""
    homes = packages_distributions()
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path.name == "record_adapters.py":  # make compare-adapters runs it in an environment of its own
            continue
        known = DIRECT if path.is_relative_to(ROOT / "utils" / "course") else allowed
        names = {canonical(need.name) for need in known} | BROUGHT
        for module in imported(path):
            beside = (path.parent / f"{module}.py").exists()
            if module in sys.stdlib_module_names or (ROOT / module).is_dir() or beside:
                continue
            found = {canonical(name) for name in homes.get(module, [module])}
            assert found & names, f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not name"


def test_the_repositorys_address_is_in_one_place():
    address = PROJECT["urls"]["Repository"].removeprefix("https://")
    for path in [*(ROOT / "utils").rglob("*.py"), *(ROOT / "solutions").glob("*.py"), ROOT / "Makefile"]:
        assert address not in path.read_text(encoding="utf-8"), path


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"make [\w-]+", script) == ["make test"]
    targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert {"run", "test", "lab", "bench", "build", "grade", "collect", "test-floor"} <= targets
