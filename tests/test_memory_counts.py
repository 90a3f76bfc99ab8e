"""Parameters by arithmetic, against transformers on the meta device."""

import pytest

from utils.architectures import architecture, known
from utils.memory.counts import llama_parameters

LLAMAS = [name for name, facts in known().items() if facts["config"] in ("LlamaConfig", "MistralConfig", "Qwen2Config")]


def test_by_hand():
    """d = 4 with 2 heads, one of them for keys and values: 5 rows of 4 twice, q o k v 16 16 8 8, three 4 x 6."""
    assert llama_parameters(vocab=5, d=4, d_ff=6, layers=1, heads=2, kv_heads=1) == 2 * 20 + 48 + 72 + 8 + 4
    assert llama_parameters(vocab=5, d=4, d_ff=6, layers=3, heads=2, kv_heads=1, tied=True) == 20 + 3 * 128 + 4
    assert llama_parameters(32000, 4096, 11008, 32, 32, 32) == 6_738_415_616


@pytest.mark.parametrize("name", LLAMAS)
def test_transformers_counts_the_same(name):
    model = architecture(name)
    c = model.config
    ours = llama_parameters(
        c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads,
        c.num_key_value_heads, c.tie_word_embeddings,
    )  # fmt: skip
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))  # Qwen2's q, k and v have some
    assert ours + biases == sum(p.numel() for p in model.parameters())
    assert bool(biases) == (c.model_type == "qwen2")
