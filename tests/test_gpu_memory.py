"""Predicted peaks against CUDA's own count, for models of real size: `make gpu-test`. Small ones on a CPU, anywhere."""

import pytest
import torch

from bench.gpu import record
from bench.gpu_memory import CASES, Case, measure, peak_on_cpu, predicted, prepared
from utils.architectures import architecture
from utils.measure import saved_bytes

SMALL = {
    "Llama-2-7B": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
                   "num_key_value_heads": 4, "vocab_size": 500},
    "GPT-2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
              "resid_pdrop": 0.0},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("way", ["full, fp32", "full, bf16", "LoRA"])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_small_ones_on_a_cpu(name, way, checkpointing):
    """The code that the GPU runs, within 5 % of live bytes."""
    case = Case(name, way, 4, 64, checkpointing)

    def base():
        return architecture(name, use_cache=False, **SMALL[name])

    assert predicted(case, "cpu", base()).peak == pytest.approx(peak_on_cpu(case, base()), rel=0.05)


@pytest.mark.filterwarnings("ignore")
def test_four_bits_on_a_cpu():
    """A base of bitsandbytes' layers: what is kept equal to the byte, the peak within 5 %."""
    pytest.importorskip("bitsandbytes")
    case = Case("Llama-2-7B", "QLoRA", 4, 64)

    def base():
        return architecture(case.model, use_cache=False, **SMALL[case.model])

    expected = predicted(case, "cpu", base())
    model, step = prepared(case, "cpu", base())
    kept = saved_bytes(lambda: model(input_ids=step.ids, labels=step.ids).loss, exclude=[model])
    assert sum(expected.kept.values()) == kept
    assert expected.peak == pytest.approx(peak_on_cpu(case, base()), rel=0.05)


@pytest.fixture(scope="module")
def rows():
    found = []
    yield found
    if found:
        record("memory", "python -m bench.gpu test", found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: predicted peaks against CUDA's own count")
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.model}, {c.way}, {c.batch} x {c.length}")
def test_peak_of_a_step(case, rows):
    """Within 5 %; what ran out of memory was predicted to need 90 % of it or more."""
    row = measure(case)
    rows.append(row)
    if row["measured"] is None:
        assert row["predicted"] > 0.9 * torch.cuda.get_device_properties(0).total_memory
    else:
        assert row["ratio"] == pytest.approx(1, abs=0.05)
