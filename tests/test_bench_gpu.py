"""`make gpu-test` and `make gpu-bench`: what they say without a GPU, what they write, and that the measurements run."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, gpu_rows

T4 = {"get_device_name": "Tesla T4", "get_device_capability": (7, 5), "mem_get_info": (14_000_000_000, 15_800_000_000)}


@pytest.fixture
def t4(monkeypatch, tmp_path):
    """A T4 that is not there, and a folder for its records."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "FOLDER", tmp_path / "data")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in T4.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu, "driver", lambda: "580.65.06")


@pytest.mark.parametrize("what", ["test", "bench"])
def test_without_a_gpu_one_sentence_and_success(what, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([what]) == 0
    assert capsys.readouterr().out == gpu.NO_GPU + "\n"


def test_the_record_says_where_and_how(t4, tmp_path):
    path = gpu.record("lora_kernels", "python -m bench.gpu bench lora_kernels", [{"r": 16, "ms": 0.5}])
    assert path == tmp_path / "data" / "tesla-t4" / "lora_kernels.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    assert state["device"] == "Tesla T4" and state["capability"] == "7.5" and state["memory_gb"] == 15.8
    assert state["driver"] == "580.65.06" and state["cuda"] == "13.0"
    assert set(state["versions"]) == {"python", "torch", "triton", "transformers", "peft", "bitsandbytes"}
    assert state["command"] == "python -m bench.gpu bench lora_kernels" and len(state["date"]) == 10
    assert state["rows"] == [{"r": 16, "ms": 0.5}]
    assert list(path.parent.iterdir()) == [path]  # no draft left


def test_bench_writes_what_was_asked_for(t4, monkeypatch, capsys):
    monkeypatch.setattr(gpu_rows, "BENCHES", {"one": lambda repeats: [{"turns": repeats}], "two": None})
    assert gpu.main(["bench", "one", "--repeats", "3"]) == 0
    assert capsys.readouterr().out.split() == ["turns", "3", "written", "to", "data/tesla-t4/one.json"]
    with pytest.raises(SystemExit):
        gpu.main(["bench", "three"])


def test_the_tests_outcomes_are_counted():
    outcomes = gpu.Outcomes()
    for phase in ("a setup passed", "a call passed", "a teardown passed", "b setup passed", "b call failed",
                  "b teardown passed", "c setup skipped", "d setup failed"):  # fmt: skip
        nodeid, when, outcome = phase.split()
        outcomes.pytest_runtest_logreport(SimpleNamespace(nodeid=nodeid, when=when, outcome=outcome))
    assert outcomes.counts == {"passed": 1, "skipped": 1, "failed": 2, "failures": ["b", "d"]}


@pytest.mark.parametrize(
    "bench, options",
    [
        ("lora_kernels", {"products": [("qkv", 24, 1, 4), ("qkv", 24, 3, 4)], "groups": {"qkv": (16, (16, 8, 8))}}),
        ("lora_layers", {"layers": [("gate_up", 24, 4)], "groups": {"gate_up": (16, (24, 24))}}),
        ("dora_norms", {"norms": [(24, 16, 4)]}),
        ("four_bit_unpacking", {"weights": [((24, 64), True), ((24, 64), False)]}),
        ("four_bit_products", {"products": [((24, 64), False, 1), ((24, 64), True, 20)]}),
    ],
)
def test_the_measurements_run_on_a_small_scale(bench, options):
    """On a CPU, where the kernels' references stand in for them: the outputs agree and the tables can be printed."""
    rows = gpu_rows.BENCHES[bench](1, device="cpu", **options)
    assert len(gpu.table(rows).splitlines()) == 1 + len(rows)
    json.dumps(rows)


def test_the_training_step_runs_on_a_small_scale():
    small = gpu_rows.LLAMA | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    rows = gpu_rows.training_step(1, "cpu", small | {"num_attention_heads": 4, "num_key_value_heads": 2}, (2, 8))
    assert [row["by"] for row in rows] == ["ours", "peft"]
    assert all(row["step_ms"] > 0 for row in rows)
