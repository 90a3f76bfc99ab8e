"""Parameters by formula: by hand for tiny sizes, and equal to transformers for every architecture of the table."""

import pytest
import transformers as tf

from utils.architectures import architecture, known
from utils.memory.counts import (
    bert_parameters,
    gpt2_parameters,
    llama_parameters,
    opt_parameters,
    parameters_of,
    qwen2_parameters,
    t5_parameters,
)


@pytest.mark.parametrize("name", known())
def test_as_transformers_counts(name):
    model = architecture(name)
    assert parameters_of(model.config) == sum(p.numel() for p in model.parameters())


def test_by_hand():
    """One layer, d = 2, one head. Llama: 16 of attention, 3 x 2 x 3, two norms; 5 rows twice; a last norm."""
    assert llama_parameters(vocab=5, d=2, d_ff=3, layers=1, heads=1, kv_heads=1) == 16 + 18 + 4 + 20 + 2
    assert qwen2_parameters(5, 2, 3, 1, 1, 1, tied=True) == 16 + 6 + 18 + 4 + 10 + 2
    assert llama_parameters(5, 4, 3, 1, 2, kv_heads=1) == 2 * 16 + 2 * 8 + 36 + 8 + 40 + 4
    assert gpt2_parameters(vocab=5, d=2, layers=1, positions=7) == 12 * 4 + 13 * 2 + 24 + 4
    assert opt_parameters(5, 2, 8, 1, positions=7) == gpt2_parameters(5, 2, 1, positions=9)
    assert bert_parameters(5, 2, 8, 1, positions=7, segments=2, labels=3) == 74 + 28 + 4 + 6 + 9
    # encoder 16 + 12 + 4, decoder 32 + 12 + 6, embedding, two last norms, two biases of 4 buckets
    assert t5_parameters(5, 2, 3, 1, 1, head_dim=2, buckets=4) == 32 + 50 + 10 + 4 + 8


def test_a_head_wider_than_its_share_and_another_classifier():
    config = tf.LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=5, num_hidden_layers=2,
                            num_attention_heads=2, num_key_value_heads=1, head_dim=6, pad_token_id=0)  # fmt: skip
    with pytest.raises(ValueError, match="there is no formula for heads of 6 in a width of 8"):
        parameters_of(config)
    bert = architecture("BERT-base", "BertForSequenceClassification", num_labels=2)
    assert bert_parameters(30522, 768, 3072, 12, labels=2) == bert.num_parameters()


def test_a_family_without_a_formula():
    with pytest.raises(ValueError, match="no formula for the parameters of 'falcon'"):
        parameters_of(tf.FalconConfig())
