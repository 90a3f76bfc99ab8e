"""BitFit: which parameters are biases, how many there are in published models, and what half precision would lose."""

import json

import pytest
import torch
import transformers as tf
from small_models import WITH_BIASES, backward, bits, logits, move, output, same_bits, small_model
from torch import nn
from wrong import Table, check

from utils import BitFit, HoulsbyAdapter, LoRA, PfeifferAdapter, adapters, attach, load_adapter
from utils.architectures import architecture
from utils.checkpoint import CONFIG, WEIGHTS, open_tensors
from utils.measure import saved_bytes
from utils.methods.bitfit import TrainedBias, bias_names, bitfit_num_params

# ---------------------------------------------------------------------------------------------- what is trained


def test_bias_names():
    names = ["a.query.weight", "a.query.bias", "a.LayerNorm.bias", "b.query.bias", "b.relative_attention_bias.weight"]
    assert bias_names(names) == ["a.query.bias", "a.LayerNorm.bias", "b.query.bias"]
    assert bias_names(names, ("query",)) == ["a.query.bias", "b.query.bias"]
    assert bias_names(names, ("a.query", "LayerNorm")) == ["a.query.bias", "a.LayerNorm.bias"]
    assert bias_names(names, r"b\..*") == ["b.query.bias"]
    assert bias_names(names, ("uery",)) == []


def test_numbers_in_published_models():
    layer = 11 * 768
    assert bitfit_num_params(architecture("GPT-2")) == 12 * layer + 768 == 102_144
    bert = architecture("BERT-base")
    # BERT's layer has as many; the embeddings' norm and the pooler have one bias each
    assert bitfit_num_params(bert) == 12 * layer + 2 * 768 == 102_912
    assert round(100 * 102_912 / sum(p.numel() for p in bert.parameters()), 2) == 0.09
    assert bitfit_num_params(bert, ("query", "intermediate.dense")) == 12 * (768 + 3072)
    assert bitfit_num_params(architecture("Llama-2-7B")) == bitfit_num_params(architecture("T5-small")) == 0


@pytest.mark.parametrize("name", WITH_BIASES)
def test_what_is_attached_is_what_is_counted(name):
    model = small_model(name)
    trained = [n for n in bias_names(n for n, _ in model.named_parameters()) if not n.startswith("classifier")]
    adapter = attach(model, BitFit(modules_to_save=()))
    assert [n for n, _ in adapter.named_parameters() if not n.startswith("classifier")] == trained
    adapter.detach()
    assert sum(p.numel() for p in attach(model, BitFit(modules_to_save=())).parameters()) == bitfit_num_params(model)


def test_norms_are_trained_and_the_head_is_trained_whole():
    adapter = attach(small_model("bert"), BitFit())
    named = dict(adapter.named_parameters())
    assert "bert.embeddings.LayerNorm.bias" in named and "bert.pooler.dense.bias" in named
    assert {"classifier.weight", "classifier.bias"} <= named.keys()
    assert "classifier" not in attach(small_model("bert"), BitFit(modules_to_save=(), targets=("query",))).parts


def test_a_part_of_the_biases():
    model = small_model("bert")
    adapter = attach(model, BitFit(targets=("query", "intermediate.dense"), layers=(1,), modules_to_save=()))
    layer = "bert.encoder.layer.1"
    assert list(adapter.parts) == [f"{layer}.attention.self.query", f"{layer}.intermediate.dense"]
    adapter.detach()
    adapter = attach(model, BitFit(targets=r".*LayerNorm", exclude=("embeddings.LayerNorm",), modules_to_save=()))
    assert len(adapter.parts) == 4
    assert " ".join(str(adapter).splitlines()[1].split()) == "LayerNorm 4 x bias of a LayerNorm, 32 128 numbers"


def test_a_head_tied_to_its_decoder_has_one_bias():
    """BERT's masked language model keeps one bias in two places; the layer's is the one that is computed with."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = tf.BertForMaskedLM(tf.BertConfig(**sizes, vocab_size=64)).eval()
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    base, count = output(model), bitfit_num_params(model)
    adapter = attach(model, BitFit())
    assert "cls.predictions.decoder.bias" in dict(adapter.named_parameters())
    assert sum(p.numel() for p in adapter.parameters()) == count
    move(adapter)
    adapter.parts["cls.predictions.decoder"].b.data += 1
    assert (output(model) - base).mean() > 0.5
    with adapter.disabled():
        assert torch.equal(output(model), base)
    with pytest.raises(ValueError, match="is the same tensor as cls.predictions.bias: merging would change both"):
        adapter.merge()


# ------------------------------------------------------------------------------------------------- the module


def test_module_by_hand():
    layer, norm = nn.Linear(2, 2), nn.LayerNorm(2, eps=0)
    for base, expected in ((layer, [14, 28]), (norm, [9, 21])):
        with torch.no_grad():
            base.weight.copy_(torch.tensor([[1.0, 1], [2, 2]] if base is layer else [1.0, 1]))
        part = TrainedBias(base)
        assert torch.equal(part.b, base.bias)
        with torch.no_grad():
            part.b.copy_(torch.tensor([10.0, 20]))
        y = part(torch.tensor([1.0, 3]))
        torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float32))
        y.sum().backward()
        assert part.b.grad.tolist() == [1, 1] and base.bias.grad is None
        assert torch.equal(part.merged_tensors()["bias"], part.b)


@pytest.mark.parametrize("name", WITH_BIASES)
def test_computes_what_training_the_biases_in_place_does(name):
    """The plain way: requires_grad on the model's own biases. The same outputs and gradients, and after a step too."""
    plain, model = small_model(name), small_model(name)
    adapter = attach(model, BitFit(modules_to_save=()))
    own = dict(adapter.named_parameters())
    trained = dict(plain.named_parameters())
    plain.requires_grad_(False)
    for key in own:
        trained[key].requires_grad_()
    optimizers = [torch.optim.SGD(p, lr=0.01) for p in ([trained[k] for k in own], adapter.parameters())]
    for _ in range(2):
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            backward(logits(m))
            optimizer.step()
        assert torch.equal(output(model), output(plain))
        assert all(torch.equal(own[k].grad, trained[k].grad) for k in own)
    adapter.merge()  # and merged, the model is the other one
    assert torch.equal(output(model), output(plain))


def test_keeps_nothing_for_backward():
    part = TrainedBias(nn.Linear(32, 24).requires_grad_(False))
    x = torch.randn(40, 32, requires_grad=True)
    assert saved_bytes(lambda: part(x), [part, x]) == 0


# ------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_steps_add_up_over_a_half_precision_base(dtype):
    """A step of 1e-4 from a bias of 1 is nothing in half precision. A hundred of them are 0.01 in the float32 copy."""
    base = nn.Linear(4, 4).to(dtype).requires_grad_(False)
    base.bias.fill_(1)
    assert (base.bias - 1e-4 == 1).all()  # what training the model's own biases would do, each time
    part = TrainedBias(base, torch.float32)
    optimizer = torch.optim.SGD(part.parameters(), lr=1e-4)
    x = torch.zeros(1, 4, dtype=dtype)
    for _ in range(100):
        optimizer.zero_grad()
        part(x).sum().backward()
        optimizer.step()
    assert part.b.grad.dtype == torch.float32
    torch.testing.assert_close(part.b.detach(), torch.full((4,), 0.99), rtol=0, atol=1e-5)
    assert part(x).dtype == dtype and (part(x) < 1).all()
    assert part.merged_tensors()["bias"].dtype == dtype and (part.merged_tensors()["bias"] < 1).all()


def test_dtypes():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        adapter = attach(small_model("gpt2", dtype), BitFit())
        assert {p.dtype for p in adapter.parameters()} == {expected}
    adapter = attach(small_model("gpt2", torch.bfloat16), BitFit(dtype=torch.bfloat16))
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------- in a model


def test_the_file_is_our_own_and_names_the_models_biases(tmp_path):
    model = small_model("gpt2")
    adapter = attach(model, BitFit(targets=("c_attn", "ln_1")))
    move(adapter)
    adapter.save(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["format"] == "peft-from-scratch" and fields["method"] == "BitFit" and "peft_type" not in fields
    names = [n.removeprefix("base_model.model.") for n in open_tensors(tmp_path / WEIGHTS)]
    assert sorted(names) == sorted(
        bias_names((n for n, _ in small_model("gpt2").named_parameters()), ("c_attn", "ln_1"))
    )
    loaded = load_adapter(small_model("gpt2"), tmp_path)
    assert loaded.config == adapter.config


def test_beside_lora():
    model = small_model("opt")
    base, before = output(model), bits(model)
    bitfit = attach(model, BitFit(), "bitfit")
    move(bitfit)
    expected = output(model)
    lora = attach(model, LoRA(r=2, targets="all-linear", init="random_b"), "lora")
    only_lora = output(model)
    adapters(model)["bitfit"].activate()
    assert torch.equal(output(model), expected)
    bitfit.merge()
    torch.testing.assert_close(output(model), expected)
    bitfit.unmerge()
    bitfit.detach()
    lora.activate()
    assert torch.equal(output(model), only_lora)
    lora.detach()
    assert torch.equal(output(model), base) and same_bits(bits(model), before)


@pytest.mark.parametrize("architecture, other", [("bert", PfeifferAdapter()), ("opt", HoulsbyAdapter())], ids=str)
def test_beside_adapters_inside_the_same_layers(architecture, other):
    """A layer that another method's part lives in is a single layer still."""
    alone = [n for n, _ in attach(small_model(architecture), BitFit()).named_parameters()]
    model = small_model(architecture)
    attach(model, other, "other")
    assert [n for n, _ in attach(model, BitFit()).named_parameters()] == alone


# ------------------------------------------------------------------------------------------------- wrong input

TABLE = Table()


@TABLE.row("a model without biases", r"this LlamaForCausalLM has no biases, so BitFit has nothing to train")
def _(model, tmp):
    yield
    attach(model, BitFit())


GPT2 = {
    "a module without bias": ({"targets": ("wte",)}, r"no module with a bias is called wte\. It has: c_attn, .*\."),
    "a name that fits nothing": (
        {"targets": ("c_atn",)},
        r"no module with a bias is called c_atn\. Near .*: c_attn.*\.",
    ),
    "an expression that fits nothing": ({"targets": ".*wte"}, r"targets='\.\*wte' matches no module with a bias"),
    "no targets": ({"targets": ()}, r"targets is empty: name at least one module, or leave it out to train every bias"),
    "a layer that does not exist": ({"layers": (5,)}, r"layers \[5\] do not exist; this model's layers are 0 to 1"),
    "dtype a word": ({"dtype": "half"}, r"dtype is 'half'; it can be None or a floating-point torch\.dtype"),
}
for what, (settings, sentence) in GPT2.items():

    @TABLE.row(what, sentence)
    def _(model, tmp, settings=settings):
        gpt2 = small_model("gpt2")
        yield
        attach(gpt2, BitFit(**settings))


@TABLE.row("a layer that torch never calls", r"attention\.out_proj: torch reads its bias without calling it, so .*")
def _(model, tmp):
    model.attention = nn.MultiheadAttention(8, 2)
    yield
    attach(model, BitFit())


@TABLE.cases()
def test_says_it_in_one_sentence_and_changes_nothing(case, tmp_path):
    check(case, tmp_path)
