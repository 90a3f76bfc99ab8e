"""Fixtures that several test files use."""

import os
import zlib

import pytest
import torch
from toy_course import CHAPTER, TOYLIB

from utils.paths import ROOT


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The root of a course with the chapter 01_toy; kernels started in the test can import its library."""
    root = tmp_path / "toy"
    (root / "solutions").mkdir(parents=True)
    (root / "toylib.py").write_text(TOYLIB, encoding="utf-8")
    (root / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    (root / "solutions" / "01_toy.py").write_text(CHAPTER, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(ROOT)]))
    return root


@pytest.fixture(autouse=True)
def seeded(request):
    """Every test draws from a seed of its own, whatever ran before it: a failure can be had again."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
