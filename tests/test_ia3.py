"""(IA)^3: its equations and modules by hand, the bytes they keep, and where its usual modules are not the paper's."""

import json

import pytest
import torch
import transformers as tf
from small_models import ALL, bits, logits, move, output, same_bits, small_model
from torch import nn
from transformers.pytorch_utils import Conv1D
from wrong import Table, check

from utils import IA3, adapters, attach, load_adapter
from utils.architectures import architecture
from utils.checkpoint import CONFIG, file_tensors
from utils.measure import saved_by_shape
from utils.methods.ia3 import IA3Linear, ia3_merge, ia3_num_params, ia3_scale

# d_in 3, d_out 2
W = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
BIAS = torch.tensor([10.0, 20])
X = torch.tensor([1.0, 1, 2])  # W X = [9, 21]
OUT, IN = torch.tensor([2.0, 0]), torch.tensor([1.0, 0, -1])


def linear(kind="linear"):
    """The layer of the numbers above: nn.Linear or GPT-2's Conv1D."""
    layer = Conv1D(2, 3) if kind == "conv1d" else nn.Linear(3, 2)
    layer.weight, layer.bias = nn.Parameter(W.T.clone() if kind == "conv1d" else W.clone()), nn.Parameter(BIAS.clone())
    return layer.requires_grad_(False)


def put(part, values):
    with torch.no_grad():
        part.l.copy_(torch.as_tensor(values).view(part.l.shape))


# ------------------------------------------------------------------------------------------------- the equations


def test_scale_merge_and_count_by_hand():
    assert ia3_scale(torch.tensor([[1.0, 2], [3, 4]]), OUT).tolist() == [[2, 0], [6, 0]]
    weight, bias = ia3_merge(W, BIAS, OUT)
    assert weight.tolist() == [[2, 4, 6], [0, 0, 0]] and bias.tolist() == [20, 0]
    weight, bias = ia3_merge(W, BIAS, IN, feedforward=True)
    assert weight.tolist() == [[1, 0, -3], [4, 0, -6]] and bias is BIAS
    assert ia3_merge(W, None, OUT)[1] is None
    assert ia3_num_params(4096, 4096, 11008, layers=32) == 614_400


def test_scale_in_half_precision():
    y = torch.randn(100, 4).bfloat16()
    scaled = ia3_scale(y, torch.tensor([0.0, 1, 1.5, 1.1]))
    assert scaled.dtype == torch.bfloat16
    assert not scaled[:, 0].any() and torch.equal(scaled[:, 1], y[:, 1])
    torch.testing.assert_close(scaled[:, 3].double(), 1.1 * y[:, 3].double(), rtol=0.01, atol=0)


def test_merge_rounds_once_and_keeps_the_dtype():
    weight, bias = ia3_merge(W.bfloat16(), BIAS.bfloat16(), torch.tensor([1 + 2.0**-9, 1.5]))
    assert weight.dtype == bias.dtype == torch.bfloat16
    assert weight.tolist() == [[1, 2, 3], [6, 7.5, 9]] and bias.tolist() == [10, 30]
    assert ia3_merge(W.double(), None, OUT.double() / 3)[0][0, 0].item() == 2 / 3


# ------------------------------------------------------------------------------------------------- the module


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_modules_by_hand(kind):
    scaled_output = IA3Linear(linear(kind))
    assert scaled_output.l.shape == (2, 1) and scaled_output(X).tolist() == [19, 41]
    put(scaled_output, OUT)
    assert scaled_output(X).tolist() == [38, 0]
    scaled_input = IA3Linear(linear(kind), feedforward=True)
    assert scaled_input.l.shape == (1, 3) and scaled_input(X).tolist() == [19, 41]
    put(scaled_input, IN)
    assert scaled_input(X).tolist() == [1 - 6 + 10, 4 - 12 + 20]
    for part in (scaled_output, scaled_input):
        expected = part(X).tolist()
        merged = part.merged_tensors()
        assert merged["weight"].shape == part.core.weight.shape
        assert ("bias" in merged) == (part is scaled_output)
        assert torch.func.functional_call(part.core, merged, (X,)).tolist() == expected
    (scaled_output(X) * torch.tensor([1.0, 10])).sum().backward()
    assert scaled_output.l.grad.tolist() == [[19], [410]]
    scaled_input(X).sum().backward()
    assert scaled_input.l.grad.tolist() == [[5, 7, 18]]  # x times the column sums of W


def test_skipped_outputs_stay_and_are_ones_in_the_file():
    part = IA3Linear(linear(), skip=1)
    put(part, [3.0])
    assert part(X).tolist() == [19, 123]
    assert [t.tolist() for t in part.exported().values()] == [[[1], [3]]]
    assert part.merged_tensors()["bias"].tolist() == [10, 60]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_for_backward(dtype):
    layer = nn.Linear(32, 24).to(dtype).requires_grad_(False)
    x = torch.randn(40, 32, dtype=dtype, requires_grad=True)
    scaled_output, scaled_input = IA3Linear(layer, dtype=torch.float32), IA3Linear(layer, True, dtype=torch.float32)
    kept = saved_by_shape(lambda: scaled_output(x), [scaled_output, x])
    assert kept.pop(((40, 24), dtype)) == 40 * 24 * dtype.itemsize  # what is scaled
    assert kept == ({} if dtype == torch.float32 else {((24,), dtype): 48})  # l in half precision
    kept = saved_by_shape(lambda: scaled_input(x), [scaled_input, x])  # x is there anyway
    assert kept == ({} if dtype == torch.float32 else {((32,), dtype): 64})


@pytest.mark.parametrize("name", ALL)
def test_zeros_merge_and_come_back(name):
    """No weight is left after a merge with l = 0; the base's are kept, so there is nothing to divide by."""
    model = small_model(name)
    adapter = attach(model, IA3())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    before, silenced = bits(model), output(model)
    adapter.merge()
    assert not adapter.parts[next(iter(adapter.parts))].core.weight.all()
    torch.testing.assert_close(output(model), silenced, rtol=0, atol=1e-5)
    adapter.unmerge()
    assert same_bits(bits(model), before) and torch.equal(output(model), silenced)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_starts_as_the_base_to_the_bit(name, dtype):
    model = small_model(name, dtype)
    base = output(model)
    adapter = attach(model, IA3())
    assert all(p.dtype == torch.float32 and (p == 1).all() for n, p in adapter.named_parameters() if "ia3_l" in n)
    assert torch.equal(output(model), base)


def test_two_adapters_do_not_multiply():
    model = small_model("llama")
    first = attach(model, IA3(), "first")
    move(first)
    alone = output(model)
    move(attach(model, IA3(), "second"))
    adapters(model)["first"].activate()
    assert torch.equal(output(model), alone)


# ------------------------------------------------------------------------------------------------- the usual modules


def test_numbers_trained_in_published_models():
    for name, (d_k, d_v, d_ff, layers) in {
        "Llama-2-7B": (4096, 4096, 11008, 32),
        "Mistral-7B": (1024, 1024, 14336, 32),  # 8 heads for keys and values
        "GPT-2": (768, 768, 3072, 12),
    }.items():
        adapter = attach(architecture(name), IA3())
        assert sum(p.numel() for p in adapter.parameters()) == ia3_num_params(d_k, d_v, d_ff, layers)


def test_gpt2_scales_no_queries_unless_asked(tmp_path):
    model = small_model("gpt2")
    adapter = attach(model, IA3())
    c_attn = adapter.parts["transformer.h.0.attn.c_attn"]
    assert c_attn.l.shape == (2 * 32, 1) and "k and v of the output" in str(adapter)
    move(adapter)
    hidden = torch.randn(4, 32)
    scaled = c_attn(hidden) / c_attn.core(hidden)
    assert torch.equal(scaled[:, :32], torch.ones(4, 32)) and (scaled[:, 32:] != 1).all()

    adapter.save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["queries"] is False
    loaded = load_adapter(small_model("gpt2"), tmp_path)
    assert loaded.parts["transformer.h.0.attn.c_attn"].l.shape == (2 * 32, 1)
    adapter.detach()
    names = {"targets": ("c_attn", "mlp.c_proj")}
    for config, width in ((IA3(queries=True), 3), (IA3(**names), 3), (IA3(**names, queries=False), 2)):
        adapter = attach(model, config)
        assert adapter.parts["transformer.h.0.attn.c_attn"].l.shape == (width * 32, 1)
        adapter.detach()


def test_gpt2_scaled_queries_are_scaled_keys():
    model = small_model("gpt2")
    whole = attach(model, IA3(queries=True), "whole")
    move(whole, by=0.3)
    expected = output(model)
    paper = attach(model, IA3(), "paper")
    with torch.no_grad():
        for path, part in paper.parts.items():
            l = whole.parts[path].l
            if part.skip:
                q, k, v = l.chunk(3)
                l = torch.cat([q * k, v])
            part.l.copy_(l)
    torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-5)


def test_bert_scaled_attention_output_is_scaled_values():
    model = small_model("bert")
    usual = attach(model, IA3(), "usual")
    assert sum(path.endswith("attention.output.dense") for path in usual.parts) == 2
    move(usual, by=0.3)
    expected = output(model)
    paper = attach(model, IA3(exclude=("attention.output.dense",)), "paper")
    assert sum(p.numel() for n, p in paper.named_parameters() if "ia3" in n) == ia3_num_params(32, 32, 48, 2)
    with torch.no_grad():
        for path, part in paper.parts.items():
            if path == "classifier":
                for own, other in zip(part.tensors().values(), usual.parts[path].tensors().values(), strict=True):
                    own.copy_(other)
                continue
            part.l.copy_(usual.parts[path].l)
            if path.endswith("value"):
                part.l.mul_(usual.parts[path.replace("self.value", "output.dense")].l.T)
    torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-5)


def gated_t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    config = tf.T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    return tf.T5ForConditionalGeneration(config).eval()


def test_t5_gate_scaled_is_the_inner_activation_scaled():
    """The authors' code scales wi_1's output, the gate's factor; PEFT's usual modules for T5 scale wo's input."""
    model = gated_t5()
    inner = attach(model, IA3(targets=("wo",)), "inner")
    move(inner, by=0.3)
    expected = output(model)
    gate = attach(model, IA3(targets=("wi_1",), feedforward=()), "gate")
    with torch.no_grad():
        for path, part in gate.parts.items():
            part.l.copy_(inner.parts[path.replace("wi_1", "wo")].l.T)
    torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-5)


def test_t5_without_a_gate_has_no_wi_1():
    """The authors' configuration trains no feed-forward vector there, and says nothing."""
    with pytest.raises(ValueError, match="no module is called wi_1 in this T5.* Near in name: .*wi"):
        attach(small_model("t5"), IA3(targets=("k", "v", "wi_1"), feedforward=()))
    assert logits(small_model("t5")).isfinite().all()


def test_names_that_pefts_rules_would_read_otherwise(tmp_path):
    """T5's wo ends in "o" as well: for PEFT, which lets a name begin anywhere, the file says it by an expression."""
    model = small_model("t5")
    adapter = attach(model, IA3(targets=("o", "wo"), feedforward=("o",)))
    move(adapter)
    assert {p.rsplit(".", 1)[-1] for p, part in adapter.parts.items() if part.feedforward} == {"o"}
    adapter.save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["feedforward_modules"] == r"(?:.*\.)?(?:o)"
    loaded = load_adapter(small_model("t5"), tmp_path)
    assert same_bits(file_tensors(loaded), file_tensors(adapter))


# ------------------------------------------------------------------------------------------------- wrong input

TABLE = Table()
KV = ("k_proj", "v_proj")
SETTINGS = {
    "target that matches nothing": (
        {"targets": ("k_prj",)},
        r"no module is called k_prj in this Llama.* Near .*k_proj.*",
    ),
    "targets empty": ({"targets": ()}, r"targets is empty: name at least one module, or say 'all-linear'"),
    "feedforward that is no target": (
        {"targets": KV, "feedforward": ("down_proj",)},
        r"feedforward: no module is called down_proj among the targets",
    ),
    "feedforward of nothing": (
        {"feedforward": ("down_proj", "wi_1")},
        r"feedforward: no module is called wi_1 among the targets",
    ),
    "feedforward by an expression for nothing": (
        {"feedforward": ".*down"},
        r"feedforward='\.\*down' matches none of the targets",
    ),
    "feedforward by an invalid expression": ({"feedforward": "("}, r"feedforward is not a regular expression: .*"),
    "feedforward a number": ({"feedforward": 3}, r"feedforward is 3; it can be a tuple of names of modules, or .*"),
    "queries a word": ({"queries": "no"}, r"queries is 'no'; it can be None, False, True"),
    "target is an embedding": (
        {"targets": ("embed_tokens",)},
        r"model\.embed_tokens: \(IA\)\^3 adapts nn\.Linear and Conv1D, not Embedding",
    ),
    "dtype a word": ({"dtype": "bfloat16"}, r"dtype is 'bfloat16'; it can be None or a floating-point torch\.dtype"),
}
for what, (wrong, sentence) in SETTINGS.items():

    @TABLE.row(what, sentence)
    def _(model, tmp, wrong=wrong):
        yield
        attach(model, IA3(**wrong))


@TABLE.row("an unknown family", r"no usual modules are known for the model family 'new': name them .*")
def _(model, tmp):
    model.config.model_type = "new"
    yield
    attach(model, IA3(targets=KV))


@TABLE.row("a file that scales queries it says it leaves alone", r"the adapter in .*: the file scales .*")
def _(model, tmp):
    gpt2 = small_model("gpt2")
    move(attach(gpt2, IA3(queries=True)))
    adapters(gpt2)["default"].save(tmp)
    file = tmp / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"queries": False}))
    yield
    load_adapter(gpt2, tmp, "other")


@TABLE.cases()
def test_says_it_in_one_sentence_and_changes_nothing(case, tmp_path):
    check(case, tmp_path)
