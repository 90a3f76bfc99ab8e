"""Which modules are meant, what is frozen, and the report."""

import pytest
import transformers as tf
from small_models import small_model

from utils import LoRA, attach
from utils.attach import count_parameters, freeze
from utils.targeting import match_targets, task_head


def test_match_targets():
    paths = ["a.q_proj", "a.k_proj", "b.q_proj", "b.q_proj.inner", "q_proj"]
    assert match_targets(paths, ["q_proj"]) == ["a.q_proj", "b.q_proj", "q_proj"]
    assert match_targets(iter(paths), ("b.q_proj", "q_proj")) == ["a.q_proj", "b.q_proj", "q_proj"]  # each once
    assert match_targets(paths, []) == []
    with pytest.raises(ValueError, match="no module is called proj, k"):  # a part of a word is no name
        match_targets(paths, ["proj", "q_proj", "k"])


def test_freeze_and_count():
    model = small_model("gpt2")
    assert count_parameters(model) == (29568, 29568)  # the tied head counts once
    kept = freeze(model, keep=("transformer.ln_f", "transformer.h.1.attn.c_attn.bias"))
    assert kept == ["transformer.h.1.attn.c_attn.bias", "transformer.ln_f.weight", "transformer.ln_f.bias"]
    assert count_parameters(model) == (96 + 32 + 32, 29568)
    assert freeze(model, keep=("transformer.h.1.attn.c_attn.bia",)) == []


def words(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_report():
    model = small_model("qwen2")
    options = {"rank_pattern": {"v_proj": 4}, "bias": "lora_only", "modules_to_save": ("norm",)}
    adapter = attach(model, LoRA(r=8, alpha=16, targets=("q_proj", "v_proj"), **options), "mine")
    total = 19744 + 2 * 8 * (32 + 32) + 2 * 4 * (32 + 16) + 32
    trained = total - 19744 + 2 * (32 + 16)
    assert words(str(adapter)) == [
        "LoRA adapter 'mine' on Qwen2ForCausalLM, active",
        "q_proj 2 x (32, 32) r=8 alpha=16 scale 2 1,024 numbers",
        "v_proj 2 x (16, 32) r=4 alpha=16 scale 4 384 numbers",
        "norm 1 x Qwen2RMSNorm, trained whole 32 numbers",
        "biases 4 96 numbers",
        f"trains {trained:,} of {total:,} numbers ({100 * trained / total:.2f} %), {4 * trained:,} bytes",
    ]
    assert repr(adapter) == "Adapter('mine', LoRA, 5 modules)"
    adapter.merge()
    assert "merged" in str(adapter).splitlines()[0]
    with adapter.disabled():
        assert "switched off" in str(adapter).splitlines()[0]


def test_a_classifier_trains_its_head_unless_told_not_to():
    assert "classifier" in attach(small_model("roberta"), LoRA()).parts
    assert "classifier" not in attach(small_model("roberta"), LoRA(modules_to_save=())).parts


@pytest.mark.parametrize(
    "kind, head",
    [
        (tf.BertForTokenClassification, "classifier"),
        (tf.BertForQuestionAnswering, "qa_outputs"),
        (tf.BertModel, None),
        (tf.T5ForSequenceClassification, "classification_head"),
        (tf.T5ForTokenClassification, "classifier"),
        (tf.T5ForQuestionAnswering, "qa_outputs"),
        (tf.LlamaForSequenceClassification, "score"),
        (tf.LlamaForCausalLM, None),
    ],
)
def test_heads_that_a_task_trains_whole(kind, head):
    name = kind.__name__.partition("For")[0].removesuffix("Model").lower()
    settings = small_model(name).config
    assert task_head(kind(settings)) == head
