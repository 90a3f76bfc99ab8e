"""Whole models in 4 bits: ours against transformers with bitsandbytes, the same layers, logits, adapters and files.

bitsandbytes is compared with its unpacking in float32 (`plain_cpu`). On CPUs with bfloat16 instructions its layers
otherwise rewrite themselves at the first call in eval mode, with scales rounded to bfloat16, and compute another thing.
"""

import copy

import pytest
import torch
import transformers as tf
from small_models import COMMON, NO_DROPOUT, TOKENS, bits, output, same_bits
from torch import nn
from transformers import BitsAndBytesConfig

from utils import FP4, INT4, NF4, LoRA, attach, dequantize_base, quantize_base
from utils.methods.layers import is_linear4bit
from utils.quantization.base import bitsandbytes_fields, from_bitsandbytes, quantization_report, save_quantized
from utils.quantization.linear import NF4Linear, QuantizedLinear

SIZE = COMMON | TOKENS | {"hidden_size": 64, "intermediate_size": 128}  # rows of whole blocks of 64
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
BUILD = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, num_key_value_heads=2)),
    "tied llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "llama classifier": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**SIZE, num_labels=3)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZE, num_key_value_heads=2)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SIZE, num_key_value_heads=1, head_dim=16)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, **GPT2, **TOKENS, initializer_range=0.15)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZE, hidden_dropout=0, attention_dropout=0)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**SIZE, ffn_dim=128, word_embed_proj_dim=64, dropout=0.0, init_std=0.15)
    ),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZE | NO_DROPOUT, num_labels=3)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**SIZE | NO_DROPOUT, num_labels=3)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=64,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
    ),  # fmt: skip
}
HEADS = {"bert": ["classifier"], "roberta": ["classifier"]}  # transformers quantizes them, unless told not to
every = pytest.mark.parametrize("architecture", BUILD)
EACH = [*((a, torch.float32) for a in ("llama", "qwen2", "gemma", "gpt2", "gpt_neox", "opt", "roberta", "t5")),
        *((a, torch.bfloat16) for a in ("llama", "gpt2", "bert", "t5"))]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Architecture -> a folder with its checkpoint in float32."""
    root, saved = tmp_path_factory.mktemp("bases"), {}

    def folder(architecture):
        if architecture not in saved:
            torch.manual_seed(list(BUILD).index(architecture))
            BUILD[architecture]().save_pretrained(root / architecture)
            saved[architecture] = root / architecture
        return saved[architecture]

    return folder


def base(architecture, folders, dtype=torch.float32, **options):
    kind = type(BUILD[architecture]())
    return kind.from_pretrained(folders(architecture), dtype=dtype, **options).eval()


def plain_cpu(model):
    """bitsandbytes' layers, without their shortcut for inference on a CPU."""
    for module in model.modules():
        if is_linear4bit(module):
            module.support_avx512bf16_for_cpu = False
    return model


def ours(architecture, folders, setting=None, dtype=torch.float32):
    return quantize_base(base(architecture, folders, dtype), setting or NF4())


def theirs(architecture, folders, dtype=torch.float32, heads=True, **fields):
    """By transformers and bitsandbytes. heads: whether a classification head is spared, as in ours"""
    fields = bitsandbytes_fields(compute_dtype=dtype) | fields
    if heads and architecture in HEADS:
        fields["llm_int8_skip_modules"] = HEADS[architecture]
    return plain_cpu(base(architecture, folders, dtype, quantization_config=BitsAndBytesConfig(**fields)))


def four_bit(model):
    return {p for p, m in model.named_modules() if isinstance(m, QuantizedLinear) or is_linear4bit(m)}


# ------------------------------------------------------------------------------------------ layers and logits


@every
def test_the_same_layers_by_default(architecture, folders):
    """But for BERT's and RoBERTa's head: transformers spares a model's last parameter, which there is a bias."""
    own, other = four_bit(ours(architecture, folders)), four_bit(theirs(architecture, folders, heads=False))
    heads = {p for p in other if p.split(".")[0] in HEADS.get(architecture, ())}
    assert own == other - heads and own
    assert bool(heads) == (architecture in HEADS)
    if architecture == "t5":
        assert not any(p.endswith(".wo") for p in own)


def assert_equal(found, expected):
    """The same weights in the same formula: in float32 to its last digits, in bfloat16 to a few of its steps."""
    assert found.dtype == expected.dtype
    step = 1e-5 if found.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=step * max(1, expected.abs().max().item()))


ONCE = {"bnb_4bit_use_double_quant": False}


@pytest.mark.parametrize("architecture, dtype", EACH)
def test_equal_logits(architecture, folders, dtype):
    model = ours(architecture, folders, NF4(double_quant=False), dtype)
    other = theirs(architecture, folders, dtype, **ONCE)
    assert (output(model) - output(base(architecture, folders, dtype))).abs().max() > 1e-3  # 4 bits are not 16
    for mode in (False, True):
        assert_equal(output(model.train(mode)), output(other.train(mode)))


@pytest.mark.parametrize("architecture", ["llama classifier", "gpt2", "bert", "t5"])
def test_equal_logits_double_quantized(architecture, folders):
    """Of a few scales ours is the one beside bitsandbytes': see test_quantization_bnb. With the same scales, equal."""
    model, other = ours(architecture, folders), theirs(architecture, folders)
    expected = output(other)
    assert (output(model) - expected).abs().max() < 1e-2 * expected.abs().max()
    state = other.state_dict()
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)
    assert_equal(output(model), expected)
    twin = from_bitsandbytes(copy.deepcopy(other))
    assert four_bit(twin) == four_bit(other) and not any(map(is_linear4bit, twin.modules()))
    assert torch.equal(output(twin), output(model)) and same_bits(bits(twin), bits(model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fp4(architecture, folders):
    found = output(ours(architecture, folders, FP4()))
    assert_equal(found, output(theirs(architecture, folders, bnb_4bit_quant_type="fp4", **ONCE)))


def test_what_load_in_4bit_alone_gives(folders):
    """FP4, not double quantized, computed in float32."""
    other = plain_cpu(base("llama", folders, quantization_config=BitsAndBytesConfig(load_in_4bit=True)))
    assert_equal(output(ours("llama", folders, FP4(compute_dtype=torch.float32))), output(other))


def test_the_shortcut_that_is_off_here(folders):
    """Where the processor has it, bitsandbytes' layers change themselves in eval mode, and cannot be taken over."""
    other = theirs("llama", folders)
    before = output(other)
    for module in other.modules():
        if is_linear4bit(module):
            module.support_avx512bf16_for_cpu = True
    try:
        after = output(other)
    except (AttributeError, OSError, RuntimeError):
        pytest.skip("this processor has no bfloat16 instructions")
    if torch.equal(before, after):
        pytest.skip("this processor has no bfloat16 instructions")
    assert (after - before).abs().max() < 0.1 * before.abs().max()
    with pytest.raises(ValueError, match="rearranged"):
        from_bitsandbytes(other)


# ----------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("architecture, setting, dtype", [
    ("llama", NF4(), torch.float32),
    ("tied llama", NF4(double_quant=False), torch.bfloat16),
    ("gpt2", FP4(block_size=32), torch.float32),
    ("roberta", NF4(targets=("query", "value")), torch.float32),
    ("t5", NF4(), torch.float32),
])  # fmt: skip
def test_saved_as_transformers_does(architecture, setting, dtype, folders, tmp_path):
    """Ours -> a folder -> transformers and bitsandbytes -> ours, with equal logits at each stop."""
    model = ours(architecture, folders, setting, dtype)
    expected, state = output(model), bits(model)
    save_quantized(model, tmp_path)
    assert same_bits(bits(model), state) and not hasattr(model.config, "quantization_config")
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert four_bit(loaded) == four_bit(model) and loaded.dtype == dtype
    assert_equal(output(plain_cpu(loaded.eval())), expected)
    assert same_bits(bits(loaded), state)
    assert torch.equal(output(from_bitsandbytes(loaded)), expected)


def test_a_folder_of_transformers_is_read(folders, tmp_path):
    other = theirs("llama", folders)
    expected = output(other)
    other.save_pretrained(tmp_path)
    loaded = from_bitsandbytes(tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert_equal(output(loaded), expected)
    assert all(isinstance(loaded.get_submodule(p), NF4Linear) for p in four_bit(other))


def test_what_cannot_be_saved_so(folders, tmp_path):
    model = ours("llama", folders)
    attach(model, LoRA())
    for bad, sentence in (
        (model, "has the adapter 'default'"),
        (ours("llama", folders, INT4()), "no transformers model all of whose 4 bits are NF4, or FP4"),
        (base("llama", folders), "no transformers model"),
        (quantize_base(nn.Sequential(nn.Linear(4, 4)), NF4()), "this Sequential is no transformers model"),
        (quantize_base(ours("llama", folders, NF4(targets=("q_proj",))), FP4(targets=("v_proj",))), "NF4, or FP4"),
    ):
        with pytest.raises(ValueError, match=sentence):
            save_quantized(bad, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_dequantized_by_both(folders):
    """transformers' dequantize() and ours leave equal models, from the same bytes."""
    other = theirs("llama", folders)
    model = dequantize_base(copy.deepcopy(other))
    assert not four_bit(model) and type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert_equal(output(model), output(other))
    assert same_bits(bits(model), bits(other.dequantize()))
    again = dequantize_base(ours("llama", folders), torch.bfloat16)
    assert again.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_the_report_counts(folders):
    """q and o: 4,096 numbers each; k and v: 2,048; gate, up and down: 8,192. Two layers: 73,728, in 1,152 blocks."""
    model = ours("llama", folders)
    text = quantization_report(model)
    size = 73_728 // 2 + 1_152 + 14 * 4  # half a byte each, a byte per block, and a float32 scale of scales per layer
    assert f"in 4 bits: 73,728 numbers, {size:,} bytes, {8 * size / 73_728:.3f} bits each" in text
    assert f"beside it: {2 * 64 * 64 + 5 * 64:,} numbers" in text  # two embeddings and five norms
    assert "nf4" in text and "q_proj" in text and "lm_head 4,096" in text
    assert quantization_report(base("llama", folders)) == "LlamaForCausalLM: nothing is in 4 bits"
