"""The published figures about memory and sizes: each computed by utils, those that agree and those that do not."""

import json
import re

import pytest
import torch
from peft import LoraConfig
from small_models import small_model
from transformers import BitsAndBytesConfig

from utils import IA3, LoRA, PrefixTuning, attach
from utils.architectures import architecture
from utils.attach import count_parameters
from utils.memory.activations import Run, everything
from utils.memory.blocks import BLOCKS
from utils.memory.counts import gpt2_parameters, llama_parameters, parameters_of, t5_parameters
from utils.memory.shapes import Shape
from utils.memory.states import RECIPES, model_states
from utils.methods.dora import dora_num_params
from utils.methods.lora import lora_init, lora_num_params
from utils.methods.prefix import prefix_num_params
from utils.paths import DATA

FIGURES = {figure["name"]: figure for figure in json.loads((DATA / "published" / "memory.json").read_text())["figures"]}
LLAMA_65B = llama_parameters(32000, 8192, 22016, 80, 64, 64)
T0_3B = (32128, 2048, 5120, 24, 32)
GPT_3 = gpt2_parameters(50257, 12288, 96, 2048)
LLAMA_2_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def a_layer(batch, length, d, heads):
    """(bytes per token and number of the stream, those per token, key and head) of a layer of the paper's kind."""
    shape = Shape("bert", 1, d, 4 * d, heads, heads, d // heads, 100)
    run = Run(batch, length, everything(shape), e=2, attention="eager", device="cuda", dropout=True)
    kept = BLOCKS["bert"](run, shape, True).total - 16 * run.n  # the norms' means and deviations, in float32
    longer = Run(batch, 2 * length, everything(shape), e=2, attention="eager", device="cuda", dropout=True)
    square = (BLOCKS["bert"](longer, shape, True).total - 32 * run.n - 2 * kept) / (2 * run.n * length * heads)
    return [(kept - square * run.n * length * heads) / (run.n * d), square]


def trained(name, method):
    """How many numbers a method trains in an architecture."""
    model = architecture(name)
    attach(model, method)
    return count_parameters(model)[0]


def four_bit_defaults():
    config = BitsAndBytesConfig(load_in_4bit=True)
    return [config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant, str(config.bnb_4bit_compute_dtype)]


def lora_start():
    """The bound that all of A lies within, 1/sqrt(4096), and nearly reaches; and the largest number of B."""
    torch.manual_seed(0)
    A, B = lora_init(4096, 16, 64)
    assert 0.99 / 64 < A.abs().max() <= 1 / 64
    return [1 / 64, B.abs().max().item()]


def saved_file(folder):
    attach(small_model("llama"), LoRA(r=2)).save(folder)
    return next(path.name for path in folder.iterdir() if path.suffix == ".safetensors")


COMPUTED = {
    "states per parameter": lambda: RECIPES["bf16 + master"].per_trained,
    "states of GPT-2 1.5B": lambda: sum(model_states(1.5e9, 0, RECIPES["bf16 + master"]).values()),
    "activations of a layer": lambda: a_layer(2, 16, 64, 4),
    "attention's share": lambda: [5 * 96 * 2048 / 12288, 5 * 128 * 2048 / 20480],
    "full recomputation": lambda: 32 * 2 * 2048 * 4096,
    "full fine-tuning of LLaMA-65B": lambda: RECIPES["bf16, fp32 moments"].per_trained * LLAMA_65B,
    "GPT-3 with LoRA": lambda: [RECIPES["bf16 + master"].per_trained * GPT_3, RECIPES["bf16 + master"].frozen * GPT_3],
    "parameters of T0-3B": lambda: [
        t5_parameters(32128, 2048, 5120, 24, 32, gated=True, tied=t) for t in (True, False)
    ],
    "4-bit defaults": four_bit_defaults,
    "LoRA's defaults": lambda: [LoraConfig().r, LoraConfig().lora_alpha, LoraConfig().lora_dropout],
    "LoRA's start": lora_start,
    "LoRA on Llama-2-7B": lambda: [32 * lora_num_params(LLAMA_2_7B, r) for r in (8, 16)],
    "three LoRAs of one size": lambda: [trained(name, LoRA(r=8)) for name in ("OPT-125m", "GPT-2", "BERT-base")],
    "prefix of GPT-2": lambda: [trained("GPT-2", PrefixTuning(20)), prefix_num_params(20, 12, 768, hidden=512)],
    "prefixes of Llama-2": lambda: [trained(f"Llama-2-{size}", PrefixTuning(20)) for size in ("7B", "70B")],
    "(IA)^3 on Llama-2-7B": lambda: trained("Llama-2-7B", IA3()),
    "an adapter's file": None,
    "DoRA's magnitudes": lambda: dora_num_params([(4096, 11008)], 8) - lora_num_params([(4096, 11008)], 8),
}


@pytest.mark.parametrize("name", FIGURES)
def test_what_utils_says(name, tmp_path):
    if name.startswith("parameters of") and name not in COMPUTED:
        computed = parameters_of(architecture(name.removeprefix("parameters of ")).config)
    else:
        computed = COMPUTED[name]() if COMPUTED[name] else saved_file(tmp_path)
    assert computed == FIGURES[name]["ours"]


def numbers_in(text):
    """The large numbers of a figure as it was published."""
    return [int(n.replace(",", "")) for n in re.findall(r"\d{1,3}(?:,\d{3})+", text)]


@pytest.mark.parametrize("name", [n for n, figure in FIGURES.items() if numbers_in(figure["value"])])
def test_counts_agree_to_the_last_number(name):
    ours = FIGURES[name]["ours"]
    ours = ours if isinstance(ours, list) else [ours]
    assert FIGURES[name]["agrees"] and set(numbers_in(FIGURES[name]["value"])) <= set(ours)


def test_sizes_agree_as_they_are_rounded():
    ours = {name: figure["ours"] for name, figure in FIGURES.items()}
    assert ours["states of GPT-2 1.5B"] == 24e9
    assert 780e9 < ours["full fine-tuning of LLaMA-65B"] < 790e9
    assert RECIPES["bf16 + master"].per_trained * LLAMA_65B > 1.04e12  # with a master copy


def test_what_lora_says_of_gpt_3_follows_from_no_recipe():
    """350 GB is the frozen weights alone; nobody gets 1.2 TB with Adam."""
    figure = FIGURES["GPT-3 with LoRA"]
    assert not figure["agrees"] and "1.2 TB" in figure["value"]
    full, frozen = figure["ours"]
    assert abs(frozen / 350e9 - 1) < 0.01 and full > 2 * 1.2e12
    adam = [recipe.per_trained for recipe in RECIPES.values() if recipe.moments >= 4]
    assert 1.2e12 / GPT_3 < min(adam)


def test_every_figure_says_where_it_is_from_and_why_not():
    for figure in FIGURES.values():
        assert figure["figure"] and figure["value"] and figure["source"]["paper"] and figure["source"]["url"]
        assert figure["agrees"] or figure["why"]
