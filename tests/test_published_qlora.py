"""The published figures about QLoRA: each computed by utils, those that agree and those that do not."""

import json

import bitsandbytes
import pytest
import torch

from utils import LoRA
from utils.architectures import architecture
from utils.memory.counts import llama_parameters
from utils.memory.estimate import facts_of, predict
from utils.memory.states import quantized_base
from utils.paths import DATA
from utils.quantization.blocks import bits_per_number, dequantize_blockwise, nearest_code, quantize_blockwise
from utils.quantization.codebooks import NF4_OFFSET, int4_codebook, nf4_codebook

FIGURES = {figure["name"]: figure for figure in json.loads((DATA / "published" / "qlora.json").read_text())["figures"]}
SIZES = {  # LLaMA: width, inside of the feed-forward part, layers, heads
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "33B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
}


@pytest.fixture(scope="module")
def facts():
    """LLaMA of each size with LoRA of r = 64 on all linear layers."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = {size: dict(zip(names, sizes, strict=True)) for size, sizes in SIZES.items()}
    return {
        size: facts_of(
            architecture("Llama-2-7B", num_key_value_heads=f["num_attention_heads"], **f),
            LoRA(r=64, targets="all-linear"),
        )
        for size, f in fields.items()
    }


def base(facts, **options):
    """Bytes of a base whose linear layers in the blocks are in NF4."""
    return quantized_base(facts.in_blocks, facts.total - facts.trained - facts.in_blocks, **options)


def step_of_65b(facts):
    """GB of a step with the paper's adapters, and of the same with PyTorch's AdamW."""
    step = predict(facts["65B"], "bf16, fp32 moments", 1, 512, checkpointing=True, quantized=True)
    during = max(step.gradients, *(size for moment, size in step.moments.items() if moment != "optimizer step"))
    return (sum(step.states.values()) + during) / 1e9, step.peak / 1e9


def normal():
    return torch.randn(2**20, generator=torch.Generator().manual_seed(0))


def use(index):
    """The least and the most used of 16 codes, in percent."""
    shares = 100 * torch.bincount(index.int(), minlength=16) / len(index)
    return [round(shares.min().item(), 1), round(shares.max().item(), 1)]


def float4(*magnitudes):
    positive = torch.tensor(magnitudes) / max(magnitudes)
    return torch.cat([positive, -positive])


def by_error():
    codes = {"NF4": nf4_codebook(), "INT4": int4_codebook(), "FP4 E2M1": float4(0.0, 0.5, 1, 1.5, 2, 3, 4, 6),
             "FP4 E3M0": float4(0.0, 1, 2, 4, 8, 16, 32, 64)}  # fmt: skip
    values = normal()

    def error(code):
        return (dequantize_blockwise(*quantize_blockwise(values, code), code) - values).norm()

    return sorted(codes, key=lambda name: error(codes[name]))


def signs():
    code = nf4_codebook()
    assert (code - bitsandbytes.functional.get_4bit_type("nf4", device="cpu")).abs().max() < 1e-6
    return [(code < 0).sum().item(), (code == 0).sum().item(), (code > 0).sum().item()]


def scale_bits():
    plain, double = (bits_per_number(double_quant=double) - 4 for double in (False, True))
    return [plain, double, plain - double]


COMPUTED = {
    "NF4": lambda facts: signs(),
    "bits of the scales": lambda facts: scale_bits(),
    "equal bins": lambda facts: use(quantize_blockwise(normal(), nf4_codebook())[0]),
    "order of the formats": lambda facts: by_error(),
    "4-bit base of LLaMA-7B": lambda facts: [round(base(facts["7B"], double_quant=d)) for d in (True, False)],
    "LoRA of LLaMA-7B": lambda facts: round(0.002 * llama_parameters(32000, 4096, 11008, 32, 32, 32) * 2),
    "input gradients of LLaMA-7B": lambda facts: round(567 / 32, 1),
    "Guanaco": lambda facts: [round(base(f) / 1e9, 1) for f in facts.values()],
    "QLoRA on one GPU": lambda facts: round(step_of_65b(facts)[0], 1),
    "a step of LLaMA-65B": lambda facts: round(step_of_65b(facts)[0], 1),
    "MMLU": lambda facts: [round(cells / 8, 2) for cells in (424.3, 417.5, 423.9)],
    "Super-NaturalInstructions": lambda facts: None,
    "parameters of LLaMA": lambda facts: [llama_parameters(32000, *sizes, sizes[-1]) for sizes in SIZES.values()],
}


@pytest.mark.parametrize("name", FIGURES)
def test_what_utils_says(name, facts):
    assert COMPUTED[name](facts) == FIGURES[name]["ours"]


def test_sizes_agree_as_they_are_rounded(facts):
    ours = {name: figure["ours"] for name, figure in FIGURES.items()}
    assert [round(bits, 3) for bits in ours["bits of the scales"]] == [0.5, 0.127, 0.373]
    assert round(ours["LoRA of LLaMA-7B"] / 2**20) == 26 and round(ours["LoRA of LLaMA-7B"] / 1e6) == 27
    assert round(ours["input gradients of LLaMA-7B"]) == 18
    assert [round(n / 1e9, 1) for n in ours["parameters of LLaMA"]] == [6.7, 13.0, 32.5, 65.3]
    assert abs(ours["a step of LLaMA-65B"] / 45.0 - 1) < 0.01 and max(step_of_65b(facts)) < 48


def test_with_one_scale_the_bins_are_nearly_equal():
    values = normal() / torch.distributions.Normal(0, 1).icdf(torch.tensor(NF4_OFFSET))
    least, most = use(nearest_code(values.clamp(-1, 1), nf4_codebook()))
    assert (least, most) == (5.6, 7.1) and str(least) in FIGURES["equal bins"]["why"]


def test_no_reading_gives_the_published_bases(facts):
    """Plain scales or double quantized, other weights in 16 or 32 bits, with and without A and B, in GB or in GiB."""
    published = {"7B": 5, "13B": 10, "33B": 21, "65B": 41}
    hits = []
    for double in (True, False):
        for e in (2, 4):
            bases = {size: base(f, double_quant=double, e=e) for size, f in facts.items()}
            assert all(abs(bases["7B"] / unit - 5048) > 20 for unit in (1e6, 2**20))
            for adapter in (0, 2, 4):
                sizes = {size: bases[size] + adapter * f.trained for size, f in facts.items()}
                hits += [sum(round(b / unit) == published[s] for s, b in sizes.items()) for unit in (1e9, 2**30)]
    assert len(hits) == 24 and max(hits) == 3


def test_every_figure_says_where_it_is_from_and_why_not():
    assert set(COMPUTED) == set(FIGURES)
    for figure in FIGURES.values():
        assert figure["figure"] and figure["value"] and figure["source"]["paper"] and figure["source"]["url"]
        assert figure["agrees"] or figure["why"]
