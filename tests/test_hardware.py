"""The rules of utils.hardware, for machines that are not here."""

from types import SimpleNamespace

import pytest
import torch

from utils.hardware import KNOWN, Device, ModelSize, describe, settings, tensor_bytes

TINY = ModelSize(parameters=1_000_000, layers=4, width=128, vocabulary=2_000)


@pytest.mark.parametrize(
    "name, dtype, precision, batch_size",
    [
        ("T4", torch.float16, "fp16", 4),
        ("L4", torch.bfloat16, "bf16", 8),
        ("A100", torch.bfloat16, "bf16", 16),
        ("A100-80GB", torch.bfloat16, "bf16", 32),
        ("H100", torch.bfloat16, "bf16", 32),
        ("cpu", torch.float32, "no", 2),
        ("mps", torch.float32, "no", 2),
    ],
)
def test_known_devices(name, dtype, precision, batch_size):
    chosen = settings(name)
    assert (chosen.dtype, chosen.precision, chosen.attention) == (dtype, precision, "sdpa")
    assert chosen.batch_size == batch_size
    assert len(chosen.reasons) == 3 and all(reason.endswith(".") for reason in chosen.reasons)


def test_emulated_bf16_is_not_native(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not KNOWN["T4"].native_bf16 and KNOWN["L4"].native_bf16
    assert "emulation" in settings("T4").reasons[0]


def test_old_gpu_gets_float32():
    assert settings(Device("cuda", "P100", 16, (6, 0))).dtype == torch.float32


def test_batch_size_by_hand():
    # 1 GB usable; fixed: 1e6 * 4 + 1e4 * 16 = 4.16 MB; a row of 64 tokens:
    # 64 * (17 * 4 * 128 * 4 + 2000 * 12) = 64 * 58816 = 3.764 MB; (1000 - 4.16) / 3.764 = 264.5, capped at 32.
    chosen = settings(Device("mps", "mps", 2, free_gb=1 / 0.9), model=TINY, length=64)
    assert chosen.batch_size == 32 and "allows 264;" in chosen.reasons[2]
    assert settings("cpu", model=TINY).batch_size == 16


def test_free_memory_counts_and_not_total():
    busy = Device("cuda", "A100", 40, (8, 0), free_gb=8)
    assert settings(busy).batch_size < settings("A100").batch_size


def test_model_that_does_not_fit_says_so():
    chosen = settings("T4", model=ModelSize(7e9, 32, 4096, 32_000))
    assert chosen.batch_size == 1 and "run out of memory" in chosen.reasons[2]


def test_print_reads_as_sentences():
    text = str(settings("T4"))
    assert text.splitlines()[0] == "T4 (16 GB): float16, sdpa attention, batch size 4"
    assert "GradScaler" in text and text.count("\n- ") == 3


def test_no_gpu_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for ask in (describe, settings):
        with pytest.raises(RuntimeError, match="torch sees none") as caught:
            ask("cuda")
        assert "\n" not in str(caught.value)
    assert describe("cpu").kind == "cpu"


def test_gpu_here_is_read_from_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(14e9), int(15.8e9)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert describe() == Device("cuda", "Tesla T4", 15.8, (7, 5), 14.0)
    assert settings().dtype == torch.float16


def test_apple_gpu_here_is_read_from_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: int(12e9))
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: int(2e9))
    assert describe() == Device("mps", "mps", 12.0, None, 10.0)


@pytest.mark.parametrize("call", [lambda: settings("T5"), lambda: describe("tpu")])
def test_unknown_names(call):
    with pytest.raises(ValueError, match="T4, L4|'cuda', 'mps' or 'cpu'"):
        call()


def test_model_size_of_a_model():
    model = torch.nn.Linear(3, 5)
    model.config = SimpleNamespace(num_hidden_layers=2, hidden_size=3, vocab_size=5)
    assert ModelSize.of(model) == ModelSize(20, 2, 3, 5)


@pytest.mark.parametrize(
    "shape, dtype, expected",
    [((), torch.float32, 4), ((3,), torch.float64, 24), ((4096, 4096), torch.bfloat16, 33_554_432),
     ((2, 0, 5), torch.float16, 0), ((8, 3), torch.bool, 24), ([7, 11], torch.int8, 77)],
)
def test_tensor_bytes(shape, dtype, expected):
    assert tensor_bytes(shape, dtype) == expected == torch.empty(shape, dtype=dtype).nbytes
