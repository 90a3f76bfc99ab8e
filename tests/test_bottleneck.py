"""Houlsby, Pfeiffer and parallel adapters: the equations by hand, where each one sits, sizes, traps and bad input."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from small_models import ALL, ENCODERS, WIDTH, backward, batch, logits, move, output, shape_of, small_model

from utils import HoulsbyAdapter, ParallelAdapter, PfeifferAdapter, attach, load_adapter
from utils.checkpoint import CONFIG, WEIGHTS
from utils.methods.bottleneck import (
    Bottleneck,
    ReadingBottleneck,
    adapter_init,
    adapter_num_params,
    bottleneck,
    bottleneck_size,
    first,
)
from utils.methods.families import family_of
from utils.methods.houlsby import TrainedNorm, houlsby, norms
from utils.methods.parallel import parallel
from utils.methods.pfeiffer import pfeiffer

# d 2, m 2: the first number of the bottleneck is h_1, the second h_1 + h_2 - 1; up, the second counts ten times.
W_DOWN, B_DOWN = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([0.0, -1])
W_UP, B_UP = torch.tensor([[1.0, 0], [0, 10]]), torch.tensor([0.5, 0])
KINDS = {"houlsby": HoulsbyAdapter, "pfeiffer": PfeifferAdapter, "parallel": ParallelAdapter}
PLACED = {
    "houlsby": HoulsbyAdapter(size=2, layer_norms=False),
    "pfeiffer": PfeifferAdapter(size=2),
    "parallel": ParallelAdapter(size=2),
    "parallel on the residual": ParallelAdapter(size=2, reads="residual"),
}


def by_hand(h):
    return bottleneck(h, W_DOWN, B_DOWN, W_UP, B_UP)


# ------------------------------------------------------------------------------------------------- the equations


def test_bottleneck_by_hand():
    assert by_hand(torch.tensor([3.0, -1])).tolist() == [3 + 0.5, 10 * 1]
    assert by_hand(torch.tensor([-1.0, 0])).tolist() == [0.5, 0]  # relu lets neither through
    pair = torch.tensor([[3.0, -1], [-1, 0]]).view(2, 1, 2)
    assert by_hand(pair).tolist() == [[[3.5, 10]], [[0.5, 0]]]


def test_activation_is_between_the_matrices():
    h = torch.tensor([-1.0, 0])
    assert bottleneck(h, W_DOWN, B_DOWN, W_UP, B_UP, torch.square).tolist() == [1.5, 40]


def test_the_three_places_by_hand():
    y, r = torch.tensor([3.0, -1]), torch.tensor([-4.0, 1])
    assert houlsby(y, by_hand).tolist() == [3 + 3.5, -1 + 10]
    assert pfeiffer(y, r, by_hand).tolist() == [3 + 0.5, -1]  # reads y + r = [-1, 0]
    assert pfeiffer(y, r, by_hand, norm=lambda x: -x).tolist() == [3 + 1.5, -1]  # [1, 0]: the second is 1 + 0 - 1
    assert parallel(y, r, by_hand, 4.0).tolist() == [3 + 4 * 0.5, -1]
    assert parallel(r, y, by_hand, torch.tensor([2.0])).tolist() == [-4 + 7, 1 + 20]


def test_number_of_parameters_and_size():
    assert adapter_num_params(768, 48) == 74_544
    assert bottleneck_size(768, 16) == 48 and bottleneck_size(100, 16) == 6 and bottleneck_size(8, 0.5) == 16
    with pytest.raises(ValueError, match="reduction=16 leaves nothing of a width of 8"):
        bottleneck_size(8, 16)


def test_init():
    g = torch.Generator().manual_seed(0)
    W_down, W_up = adapter_init(400, 300, generator=g)
    assert W_down.shape == (300, 400) and W_up.shape == (400, 300)
    assert not W_up.any() and 0.99 / 20 < W_down.abs().max() <= 1 / 20
    for W in adapter_init(400, 300, "houlsby", g):
        assert 0.0199 < W.abs().max() <= 0.02 and W.std().item() == pytest.approx(0.0088, rel=0.02)
    for W in adapter_init(400, 300, "bert", g):
        assert W.std().item() == pytest.approx(0.02, rel=0.02)
    with pytest.raises(ValueError, match="init is 'zeros'; it can be 'zero_up', 'houlsby', 'bert'"):
        adapter_init(4, 2, "zeros")


@pytest.mark.parametrize("d, m, part", [(768, 48, 0.054), (4096, 256, 0.29)])
def test_a_normal_start_is_far_from_the_identity_in_a_wide_model(d, m, part):
    g = torch.Generator().manual_seed(0)
    W_down, W_up = adapter_init(d, m, "bert", g)
    h = torch.randn(64, d, generator=g)
    change = bottleneck(h, W_down, torch.zeros(m), W_up, torch.zeros(d))
    assert math.sqrt(m * d / 2) * 0.02**2 == pytest.approx(part, rel=0.02)
    assert (change.norm() / h.norm()).item() == pytest.approx(part, rel=0.1)


# ------------------------------------------------------------------------------------------------- the modules


def test_zero_up_is_the_identity_and_nothing_is_dead():
    torch.manual_seed(0)
    adapter = Bottleneck(d=6, m=4)
    h = torch.randn(20, 6)
    assert not adapter.change(h).any()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    moved = []
    for _ in range(2):
        before = {n: t.detach().clone() for n, t in adapter.tensors().items()}
        optimizer.zero_grad()
        (adapter.change(h) - 1).square().sum().backward()
        optimizer.step()
        moved.append({n for n, t in adapter.tensors().items() if not torch.equal(t, before[n])})
    assert moved[0] == {"up.weight", "up.bias"}
    assert moved[1] == {"up.weight", "up.bias", "down.weight", "down.bias"}


def test_both_zero_would_never_train():
    adapter = Bottleneck(d=6, m=4)
    with torch.no_grad():
        adapter.W_down.zero_()
    for _ in range(3):
        (adapter.change(torch.randn(20, 6)) - 1).square().sum().backward()
        with torch.no_grad():
            for p in adapter.parameters():
                p -= 0.1 * p.grad
    assert adapter.b_up.any() and not any(p.any() for p in (adapter.W_down, adapter.b_down, adapter.W_up))


def test_dropout_is_on_the_bottleneck_and_in_training_only():
    adapter = Bottleneck(d=6, m=40, dropout=0.5, init="bert")
    h = torch.randn(20, 6)
    narrow = F.relu(h @ adapter.W_down.T)
    torch.testing.assert_close(adapter.eval().change(h), narrow @ adapter.W_up.T)
    torch.manual_seed(0)
    found = adapter.train().change(h)
    torch.manual_seed(0)
    torch.testing.assert_close(found, F.dropout(narrow, 0.5) @ adapter.W_up.T)


def test_dropout_follows_the_mode_of_the_model():
    model = small_model("llama")
    adapter = attach(model, HoulsbyAdapter(dropout=0.5))
    move(adapter)
    assert torch.equal(output(model), output(model))  # attached to a model in eval mode
    model.train()
    assert not torch.equal(output(model), output(model))


# ------------------------------------------------------------------------------------------------- the places


def pieces(architecture, layer):
    """(norm, norm, what follows the attention module, the feed-forward part) of a layer, as functions."""
    if architecture in ENCODERS:
        ffn = torch.nn.Sequential(layer.intermediate, layer.output.dense)
        return layer.attention.output.LayerNorm, layer.output.LayerNorm, layer.attention.output.dense, ffn
    if architecture == "opt":
        ffn = torch.nn.Sequential(layer.fc1, torch.nn.ReLU(), layer.fc2)
        return layer.self_attn_layer_norm, layer.final_layer_norm, torch.nn.Identity(), ffn
    if architecture == "t5":
        first, second = layer.layer
        return first.layer_norm, second.layer_norm, torch.nn.Identity(), second.DenseReluDense
    if architecture == "gpt2":
        return layer.ln_1, layer.ln_2, torch.nn.Identity(), layer.mlp
    return layer.input_layernorm, layer.post_attention_layernorm, torch.nn.Identity(), layer.mlp


def layer_by_hand(architecture, layer, post_norm, x, attention, kind, changes):
    """The output of a layer with adapters, written out. x: its input   attention: what its attention module returns"""
    norm_1, norm_2, after_attention, ffn = pieces(architecture, layer)
    a = after_attention(attention)
    if kind == "houlsby":
        a = a + changes[0](a)
    r = norm_1(x + a) if post_norm else x + a
    f_in = r if post_norm else norm_2(r)
    y = ffn(f_in)
    if kind == "houlsby":
        y = y + changes[1](y)
    if kind == "pfeiffer":
        y = y + changes[0](norm_2(r + y) if post_norm else r + y)
    if kind == "parallel":
        y = y + 4 * changes[0](f_in)
    if kind == "parallel on the residual":
        y = y + 4 * changes[0](r)
    return norm_2(r + y) if post_norm else r + y


def check_first_layer(model, architecture, kind):
    """The first layer's output with adapters of random numbers is what `layer_by_hand` makes of the base's modules."""
    adapter = attach(model, PLACED[kind])
    move(adapter, by=0.3)
    family = family_of(model, "the test")[0]
    path = family.layers(model)[0]
    layer, seen = model.get_submodule(path), {}
    attention = layer.get_submodule(family.attention)
    hooks = [
        m.register_forward_hook(lambda m, *call: seen.update({m: call}), with_kwargs=True) for m in (layer, attention)
    ]
    with torch.no_grad():
        model(**batch(model), use_cache=False)
    for hook in hooks:
        hook.remove()
    args, kwargs, found = seen[layer]
    changes = [part.change for place, part in adapter.parts.items() if place.startswith(path + ".")]
    with adapter.disabled(), torch.no_grad():
        attended = attention(*seen[attention][0], **seen[attention][1])[0]
        expected = layer_by_hand(architecture, layer, family.post_norm, first(args, kwargs), attended, kind, changes)
    found = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("kind", PLACED)
def test_each_adapter_is_where_it_belongs(kind, architecture):
    check_first_layer(small_model(architecture), architecture, kind)


@pytest.mark.parametrize("kind", PLACED)
def test_opt_350m_normalises_after_the_sum(kind):
    size = {
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 8,
    }
    torch.manual_seed(0)
    model = tf.OPTForCausalLM(tf.OPTConfig(**size, vocab_size=64, do_layer_norm_before=False, dropout=0.0)).eval()
    check_first_layer(model, "opt", kind)


def test_one_adapter_by_hand_in_a_whole_layer():
    """A Llama layer whose attention and feed-forward part return zero passes x on: what is left are the adapters."""
    model = small_model("llama")
    for path, module in model.named_modules():
        if path.endswith(("o_proj", "down_proj")):
            module.weight.data.zero_()
    layer, x = model.model.layers[0], torch.randn(1, 1, WIDTH)
    call = {"position_embeddings": model.model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.long))}
    assert torch.equal(layer(x, **call), x)
    for kind, expected in (("houlsby", x + 2 + 2), ("pfeiffer", x + 2), ("parallel", x + 4 * 2)):
        adapter = attach(model, PLACED[kind])
        with torch.no_grad():
            for part in adapter.parts.values():
                part.b_up.fill_(2.0)
        torch.testing.assert_close(layer(x, **call), expected)
        adapter.detach()
    adapter = attach(model, PfeifferAdapter(size=1))
    with torch.no_grad():
        part = adapter.parts["model.layers.0.mlp.down_proj"]
        part.W_down.zero_()[0, 3] = 1.0  # the bottleneck holds the fourth number, if it is positive,
        part.W_up[5, 0] = 10.0  # and ten times that goes to the sixth
    expected = x.clone()
    expected[..., 5] += 10 * F.relu(x[..., 3])
    torch.testing.assert_close(layer(x, **call), expected)


# ------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "config, expected",
    [
        (HoulsbyAdapter(size=64), 24 * (2 * 768 * 64 + 768 + 64) + 25 * 2 * 768),
        (HoulsbyAdapter(size=64, layer_norms=False), 2_379_264),
        (HoulsbyAdapter(layer_norms=False), 1_789_056),
        (PfeifferAdapter(), 894_528),
        (ParallelAdapter(), 7_091_712),
        (ParallelAdapter(scale="learned"), 7_091_724),
        (PfeifferAdapter(layers=(0, 11)), 2 * 74_544),
    ],
    ids=repr,
)
def test_counts_of_bert_base(config, expected):
    with torch.device("meta"):
        model = tf.BertModel(tf.BertConfig())
    assert sum(p.numel() for p in attach(model, config).parameters()) == expected


def test_norms_are_trained_too():
    assert len(norms(small_model("llama"))) == 5  # two layers of two, and the last one
    model = small_model("gpt2")
    found = {p: part for p, part in attach(model, HoulsbyAdapter()).parts.items() if isinstance(part, TrainedNorm)}
    assert list(found) == [f"transformer.{n}" for n in ("h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f")]
    norm = found["transformer.ln_f"]
    assert torch.equal(norm.copies["weight"], norm.core.weight) and norm.copies["weight"] is not norm.core.weight
    whole = attach(small_model("bert"), HoulsbyAdapter(modules_to_save=("LayerNorm",)))
    assert not any(isinstance(part, TrainedNorm) for part in whole.parts.values())


def test_small_steps_of_a_norm_add_up_over_a_bfloat16_base():
    model = small_model("llama", torch.bfloat16)
    norm = attach(model, HoulsbyAdapter()).parts["model.norm"]
    with torch.no_grad():
        norm.core.weight.fill_(1.0)
        norm.copies["weight"].fill_(1.0)
    x = torch.ones(1, WIDTH, dtype=torch.bfloat16)
    assert norm(x)[0, 0].item() == 1
    for _ in range(8):  # 2^-10 is an eighth of bfloat16's step at 1
        with torch.no_grad():
            norm.copies["weight"].add_(2**-10)
    assert norm(x)[0, 0].item() == 1 + 2**-7 and norm.core.weight[0].item() == 1


def test_report():
    lines = str(attach(small_model("bert"), HoulsbyAdapter())).splitlines()
    assert lines[1].split() == "dropout 4 x adapter 32 -> 2 -> 32 gelu 648 numbers".split()
    assert lines[2].split() == "LayerNorm 5 x LayerNorm, a trained copy 320 numbers".split()
    assert "scale 4" in str(attach(small_model("bert"), ParallelAdapter()))


# ------------------------------------------------------------------------------------------------- traps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama_gqa", "gpt2", "opt", "t5"])
def test_generated_with_a_cache_as_without(kind, architecture):
    model = small_model(architecture)
    move(attach(model, KINDS[kind]()))
    ids = torch.tensor([[0, 0, 5, 9, 11], [7, 4, 3, 8, 6]])  # the first sequence is padded on the left
    mask = (ids != 0).long()
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = model.generate(ids, **options, use_cache=True)
    assert torch.equal(found, model.generate(ids, **options, use_cache=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_hidden_states_are_the_adapted_ones(kind, architecture):
    """transformers collects them by hooks that it adds at the first call: an adapter attached later comes before."""
    model, fresh = small_model(architecture), small_model(architecture)
    model(**batch(model), output_hidden_states=True)
    torch.manual_seed(0)
    move(attach(model, KINDS[kind]()))
    torch.manual_seed(0)
    move(attach(fresh, KINDS[kind]()))
    found, expected = (m(**batch(m), output_hidden_states=True).hidden_states for m in (model, fresh))
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_t5_keeps_one_projection_in_float32(kind):
    """A half-precision T5 is loaded so, and its sub-layer's output is then float32 between two float16 ones."""
    model = small_model("t5", torch.float16)
    for path, module in model.named_modules():
        if path.endswith("wo"):
            module.float()
    base = output(model)
    adapter = attach(model, KINDS[kind]())
    assert torch.equal(output(model), base)
    move(adapter)
    found = logits(model)
    assert found.dtype == base.dtype and torch.isfinite(found).all() and not torch.equal(found, base)
    backward(found)
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_autocast(kind, architecture):
    model = small_model(architecture)
    move(attach(model, KINDS[kind]()))
    expected = output(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = output(model)
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_detach_leaves_no_hook(kind):
    model = small_model("t5")
    hooks = [len(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    attach(model, KINDS[kind]()).detach()
    assert [len(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)] == hooks


def test_nothing_is_kept_between_two_passes():
    model = small_model("gpt2")
    adapter = attach(model, ParallelAdapter())
    backward(logits(model))
    readers = [p for p in adapter.parts.values() if isinstance(p, ReadingBottleneck)]
    assert readers and all(p.waiting is None for p in readers)


def test_merge_is_refused():
    adapter = attach(small_model("bert"), PfeifferAdapter())
    with pytest.raises(ValueError, match="has a non-linearity between its two matrices, so it cannot be merged"):
        adapter.merge()


def test_file_says_what_it_is_and_a_dead_adapter_is_not_trained(tmp_path):
    adapter = attach(small_model("gpt2"), ParallelAdapter(scale="learned", layers=(1,), modules_to_save=()))
    adapter.save(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["format"] == "peft-from-scratch" and fields["method"] == "ParallelAdapter"
    assert fields["settings"]["scale"] == "learned" and fields["settings"]["layers"] == [1]
    part = load_adapter(small_model("gpt2"), tmp_path).parts["transformer.h.1.mlp.dropout"]
    assert torch.equal(part.W_down, adapter.parts["transformer.h.1.mlp.dropout"].W_down)
    with torch.no_grad():
        adapter.parts["transformer.h.1.mlp.dropout"].W_down.zero_()
    adapter.save(tmp_path)
    model = small_model("gpt2")
    before = shape_of(model)
    with pytest.raises(ValueError, match="both matrices of an adapter are zero: nothing but b_up would ever be train"):
        load_adapter(model, tmp_path)
    assert shape_of(model) == before
    load_adapter(model, tmp_path, trainable=False)
    assert (tmp_path / WEIGHTS).exists()


# ------------------------------------------------------------------------------------------------- bad input


BAD_SETTINGS = [
    ({"reduction": 0}, "reduction is 0; it must be a positive number"),
    ({"size": 0}, "size is 0; it must be a whole number from 1 up"),
    ({"activation": "elu"}, "activation is 'elu'; it can be 'relu', 'gelu', 'gelu_tanh', 'swish', 'tanh'"),
    ({"dropout": 1}, "dropout is 1; it is a probability"),
    ({"init": "zeros"}, "init is 'zeros'; it can be 'zero_up', 'houlsby', 'bert'"),
    ({"layers": 1}, "layers is 1; it can be None or a tuple of layer numbers"),
    ({"dtype": torch.int8}, "dtype is torch.int8; it can be None or a floating-point torch.dtype"),
    ({"modules_to_save": 1}, "modules_to_save is 1; it can be a tuple of names of modules"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings, sentence", BAD_SETTINGS, ids=str)
def test_bad_settings(kind, settings, sentence):
    with pytest.raises(ValueError) as error:
        KINDS[kind](**settings)
    assert str(error.value).startswith(sentence)


def test_bad_settings_of_one_method():
    with pytest.raises(ValueError, match="layer_norms is 'all'; it can be True, False"):
        HoulsbyAdapter(layer_norms="all")
    with pytest.raises(ValueError, match="scale is 0; it must be a positive number"):
        ParallelAdapter(scale=0)
    with pytest.raises(ValueError, match="scale is 'learn'; it must be a positive number"):
        ParallelAdapter(scale="learn")
    with pytest.raises(ValueError, match="reads is 'attention'; it can be 'ffn', 'residual'"):
        ParallelAdapter(reads="attention")


@pytest.mark.parametrize(
    "config, sentence",
    [
        (HoulsbyAdapter(reduction=64), "reduction=64 leaves nothing of a width of 32: make it smaller, or give a size"),
        (PfeifferAdapter(layers=(1, 2)), "layers [2] do not exist; this model's layers are 0 to 1"),
        (ParallelAdapter(layers=()), "layers is empty: ParallelAdapter would adapt nothing"),
        (
            PfeifferAdapter(modules_to_save=("output.LayerNorm",)),
            "bert.encoder.layer.0.output.LayerNorm is trained whole (modules_to_save): an adapter at "
            "bert.encoder.layer.0.output.LayerNorm would not run",
        ),
        (
            ParallelAdapter(modules_to_save=("intermediate",)),
            "bert.encoder.layer.0.intermediate is trained whole (modules_to_save): an adapter at "
            "bert.encoder.layer.0.intermediate would not run",
        ),
    ],
)
def test_what_does_not_fit_the_model(config, sentence):
    model = small_model("bert")
    before = shape_of(model)
    with pytest.raises(ValueError) as error:
        attach(model, config)
    assert str(error.value) == sentence
    assert shape_of(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_parallel_residual_is_refused(kind):
    """GPT-J adds attention and feed-forward part at once: there is no place between them."""
    model = tf.GPTJForCausalLM(tf.GPTJConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=8, n_positions=8, rotary_dim=4))
    with pytest.raises(ValueError, match="Adapter does not know where the family 'gptj' has its parts; it knows llama"):
        attach(model, KINDS[kind]())
