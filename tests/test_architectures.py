"""The hand-written sizes give the known totals."""

import pytest

from utils import LoRA, attach
from utils.architectures import architecture, known
from utils.attach import count_parameters

# Totals of the released checkpoints. A tied output head counts once, and RoBERTa and BERT have their pooler.
TOTALS = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Mistral-7B": 7_241_732_096,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "GPT-2": 124_439_808,
    "GPT-2-M": 354_823_168,
    "GPT-2-L": 774_030_080,
    "GPT-3": 174_604_259_328,  # the formula's; the paper of LoRA prints 175,255.8 million
    "OPT-125m": 125_239_296,
    "OPT-1.3b": 1_315_758_080,
    "BERT-base": 109_482_240,
    "BERT-large": 335_141_888,
    "RoBERTa-base": 124_645_632,
    "RoBERTa-large": 355_359_744,
    "T5-small": 60_506_624,
}


def test_every_model_has_a_known_total_and_a_source():
    assert set(known()) == set(TOTALS)
    assert all(set(facts) == {"config", "model", "fields", "source"} for facts in known().values())
    assert all(facts["source"] for facts in known().values())


@pytest.mark.parametrize("name", TOTALS)
def test_total(name):
    model = architecture(name)
    assert count_parameters(model)[1] == TOTALS[name]
    assert all(p.is_meta for p in model.parameters())


def test_another_class_and_a_changed_field():
    model = architecture("BERT-base", "BertForSequenceClassification", num_labels=2)
    assert count_parameters(model)[1] == TOTALS["BERT-base"] + 2 * 768 + 2
    assert architecture("GPT-2", n_layer=1).config.n_layer == 1
    assert known()["GPT-2"]["fields"]["n_layer"] == 12


def test_lora_attaches_without_memory():
    model = architecture("Llama-2-7B")
    attach(model, LoRA(r=8, targets=("q_proj", "v_proj")))
    assert count_parameters(model) == (4_194_304, 6_742_609_920)
    assert all(p.is_meta for p in model.parameters())


def test_gpt3_equals_its_formula():
    d, layers, vocabulary, positions = 12288, 96, 50257, 2048
    formula = layers * (12 * d**2 + 13 * d) + (vocabulary + positions) * d + 2 * d
    assert formula == TOTALS["GPT-3"]


NEAR = [("llama-2-7b", "Llama-2-7B"), ("Lama-2-70B", "Llama-2-70B"), ("?", "T5-small")]


@pytest.mark.parametrize("wrong, near", NEAR)
def test_unknown_name_lists_near_ones(wrong, near):
    with pytest.raises(ValueError, match=near):
        architecture(wrong)
