"""Prompt Tuning: its equations by hand, and what an attached prompt does to a model's inputs and outputs."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from small_models import ALL, COMMON, DECODERS, NO_DROPOUT, TOKENS, VOCAB, WIDTH, batch, bits, logits, small_model

from utils import LoRA, PromptTuning, attach, load_adapter
from utils.checkpoint import file_tensors
from utils.methods.prompt import (
    Prompts,
    extend_labels,
    extend_mask,
    extend_positions,
    prepend,
    prompt_init_from_tokens,
    prompt_init_from_vocabulary,
    prompt_num_params,
)

L = 4


def prompted(architecture, **settings):
    """(model with a random prompt of L rows, adapter, the part)"""
    model = architecture if isinstance(architecture, torch.nn.Module) else small_model(architecture)
    torch.manual_seed(0)
    adapter = attach(model, PromptTuning(num_virtual_tokens=L, init="random", **settings))
    return model, adapter, next(p for p in adapter.parts.values() if isinstance(p, Prompts))


# ------------------------------------------------------------------------------------------------- the equations


def test_prepend_by_hand():
    prompts = torch.tensor([[1.0, 2]])
    text = torch.tensor([[[3.0, 4], [5, 6]], [[7, 8], [9, 10]]])
    assert prepend(prompts, text).tolist() == [[[1, 2], [3, 4], [5, 6]], [[1, 2], [7, 8], [9, 10]]]
    assert prepend(prompts, text.half()).dtype == torch.float16


def test_mask_positions_and_labels_by_hand():
    assert extend_mask(torch.tensor([[0, 1, 1], [1, 1, 0]]), 2).tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]]
    assert extend_mask(torch.tensor([[True, False]]), 1).tolist() == [[True, True, False]]
    assert extend_positions(torch.tensor([[0, 0, 1], [0, 1, 2]]), 2).tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 3, 4]]
    assert extend_positions(torch.tensor([[2, 3]]), 2, first=2).tolist() == [[2, 3, 4, 5]]
    assert extend_labels(torch.tensor([[7, -100]]), 2).tolist() == [[-100, -100, 7, -100]]


def test_starts_by_hand():
    table = torch.nn.Embedding.from_pretrained(torch.tensor([[0.0, 0], [1, 10], [2, 20]]))
    assert prompt_init_from_tokens(table, [2, 1], 3).tolist() == [[2, 20], [1, 10], [2, 20]]  # repeated
    assert prompt_init_from_tokens(table, [2, 1], 1).tolist() == [[2, 20]]  # cut off
    drawn = prompt_init_from_vocabulary(table, 300, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in drawn.tolist()} == {(0, 0), (1, 10), (2, 20)}
    again = prompt_init_from_vocabulary(table, 300, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_number_of_parameters():
    assert prompt_num_params(20, 768) == 15_360  # the example in the module's docstring
    model, adapter, _ = prompted("llama")
    assert sum(p.numel() for p in adapter.parameters()) == prompt_num_params(L, WIDTH) == 128
    assert "1 x prompt of 4 rows" in str(adapter)


# ------------------------------------------------------------------------------------------------- the start


def test_start_is_a_copy_of_embeddings():
    model = small_model("gpt2")  # whose embeddings are the output layer as well
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    adapter = attach(model, PromptTuning(num_virtual_tokens=L, init="text", init_ids=[5, 6, 7]))
    (prompt,) = adapter.parameters()
    assert torch.equal(prompt, before[[5, 6, 7, 5]])
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    model(**batch(model), labels=batch(model)["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.equal(prompt, before[[5, 6, 7, 5]]) and torch.equal(table, before)
    (prompt,) = attach(model, PromptTuning(num_virtual_tokens=L), "drawn").parameters()
    assert all(any(torch.equal(row, known) for known in before) for row in prompt)


def test_start_scales_as_the_model_does():
    model = small_model("gemma")  # multiplies embeddings by the square root of the width
    (prompt,) = attach(model, PromptTuning(num_virtual_tokens=L, init="text", init_ids=[5])).parameters()
    torch.testing.assert_close(prompt[0], model.get_input_embeddings()(torch.tensor(5)))


def test_half_precision_base_has_a_float32_prompt():
    (prompt,) = attach(small_model("llama", torch.bfloat16), PromptTuning()).parameters()
    assert prompt.dtype == torch.float32


# ------------------------------------------------------------------------------------------------- the mechanism


@pytest.mark.parametrize("architecture", DECODERS)
def test_output_is_the_base_on_the_longer_input(architecture):
    model, adapter, part = prompted(architecture)
    inputs = batch(model)
    found = model(**inputs, output_hidden_states=True, output_attentions=True)
    with adapter.disabled():
        embeddings = prepend(part.prompt_embeddings, model.get_input_embeddings()(inputs["input_ids"]))
        mask = extend_mask(inputs["attention_mask"], L)
        expected = model(inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(found.logits, expected.logits[:, L:])
    for own, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(own, theirs[:, L:])
    weights = [a for a in found.attentions if a is not None]  # older versions have none of sdpa for some
    assert all(a.shape[-2:] == (15, 15) for a in weights)  # of 4 + 11: each row sums to one
    given = model(
        inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), attention_mask=inputs["attention_mask"]
    )
    assert torch.equal(given.logits, found.logits)


def test_encoder_of_t5_reads_the_prompt_and_the_decoder_sees_it():
    model, adapter, part = prompted("t5")
    inputs = batch(model)
    found = model(**inputs)
    with adapter.disabled():
        mask = extend_mask(inputs["attention_mask"], L)
        embeddings = prepend(part.prompt_embeddings, model.get_input_embeddings()(inputs["input_ids"]))
        decoder = {"decoder_input_ids": inputs["decoder_input_ids"]}
        expected = model(inputs_embeds=embeddings, attention_mask=mask, **decoder)
        base = model.encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        plain = model(encoder_outputs=base, attention_mask=inputs["attention_mask"], **decoder).logits
    assert torch.equal(found.logits, expected.logits)
    assert found.encoder_last_hidden_state.shape[1] == 15
    # what was encoded without the prompt needs no longer mask
    reused = model(encoder_outputs=base, attention_mask=inputs["attention_mask"], **decoder).logits
    assert torch.equal(reused, plain)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bert", "t5"])
def test_the_base_model_itself(architecture):
    """Without a head, and with positional arguments or a tuple as output."""
    model = small_model(architecture)
    bare = model.encoder if architecture == "t5" else model.base_model
    inputs = {k: v for k, v in batch(model).items() if k != "decoder_input_ids"}
    length = bare(**inputs).last_hidden_state.shape[1]
    _, adapter, part = prompted(bare)
    found = bare(**inputs)
    assert found.last_hidden_state.shape[1] == length == 11
    if architecture != "gpt2":  # whose second argument is the cache
        assert torch.equal(bare(*inputs.values())[0], found[0])
    assert torch.equal(bare(**inputs, return_dict=False)[0], found[0])
    where = "decoder" if architecture == "opt" else type(bare).__name__
    with pytest.raises(ValueError, match=f"{where}: a LearnedPrompts makes the input longer, so it cannot be merged"):
        adapter.merge()
    adapter.detach()
    assert not list(bare._forward_hooks) and not list(bare._forward_pre_hooks)


def test_the_loss_needs_no_longer_labels():
    model, adapter, part = prompted("llama")
    inputs = batch(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    found = model(**inputs, labels=labels)
    expected = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(found.loss, expected)


@pytest.mark.parametrize("cls", [tf.BertForTokenClassification, tf.GPT2ForTokenClassification])
def test_a_class_per_token(cls):
    kind = cls.config_class
    size = COMMON | TOKENS | (NO_DROPOUT if kind is tf.BertConfig else {})
    if kind is tf.GPT2Config:
        size = TOKENS | {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model, adapter, part = prompted(cls(kind(**size, num_labels=3)).eval())
    inputs = batch(model)
    labels = inputs["input_ids"] % 3
    found = model(**inputs, labels=labels)
    assert found.logits.shape == (3, 11, 3)
    torch.testing.assert_close(found.loss, F.cross_entropy(found.logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("segments", [False, True])
def test_segments_of_bert(segments):
    """token_type_ids: the prompt belongs to the first token's segment."""
    model, adapter, part = prompted("bert")
    inputs = batch(model)
    types = torch.ones_like(inputs["input_ids"])
    types[:, 0] = int(segments)
    found = model(**inputs, token_type_ids=types).logits
    with adapter.disabled():
        embeddings = prepend(part.prompt_embeddings, model.get_input_embeddings()(inputs["input_ids"]))
        mask, longer = extend_mask(inputs["attention_mask"], L), torch.ones(3, 15, dtype=torch.long)
        longer[:, : L + 1] = int(segments)
        base = model.bert(inputs_embeds=embeddings, attention_mask=mask, token_type_ids=longer)
    torch.testing.assert_close(found, model.classifier(base.pooler_output))


# ------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("architecture", DECODERS)
def test_cached_steps_are_one_long_pass(architecture):
    model, adapter, part = prompted(architecture)
    ids = batch(model)["input_ids"][:2]
    whole = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :6], use_cache=True)
    assert first.past_key_values.get_seq_length() == L + 6
    found = [first.logits]
    for i in range(6, 11):  # one token at a time, and a mask as generate() gives it: without the prompt
        step = model(
            input_ids=ids[:, i : i + 1],
            attention_mask=torch.ones(2, i + 1, dtype=torch.long),
            past_key_values=first.past_key_values,
        )
        found.append(step.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-5 * whole.abs().max().item())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("architecture", ["llama_gqa", "opt"])
def test_a_cache_does_not_go_into_a_second_generation(architecture, masked):
    """generate() would leave out as many tokens as the cache is long, which is too many by the prompt."""
    model, adapter, part = prompted(architecture)
    ids = batch(model)["input_ids"][:1]
    found = model.generate(input_ids=ids, max_new_tokens=4, return_dict_in_generate=True, pad_token_id=0)
    longer = torch.cat([found.sequences, ids], dim=1)
    inputs = {"input_ids": longer} | ({"attention_mask": torch.ones_like(longer)} if masked else {})
    with pytest.raises(ValueError, match="and no past_key_values"):
        model.generate(**inputs, past_key_values=found.past_key_values, max_new_tokens=4, pad_token_id=0)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("architecture", ["llama_gqa", "gpt2", "opt", "t5"])
def test_generation_with_and_without_cache(architecture, settings):
    model, adapter, part = prompted(architecture)
    inputs = {k: v.flip(1) for k, v in batch(model).items() if k != "decoder_input_ids"}
    settings = settings | {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [0]}
    found = []
    for cached in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(**inputs, **settings, use_cache=cached).tolist())
    assert found[0] == found[1]
    torch.manual_seed(0)
    with adapter.disabled():
        assert model.generate(**inputs, **settings).tolist() != found[0]


@pytest.mark.parametrize("architecture", DECODERS)
def test_what_is_generated_does_not_depend_on_padding(architecture):
    model, adapter, part = prompted(architecture)
    inputs = {k: v.flip(1) for k, v in batch(model).items()}
    settings = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    padded = model.generate(**inputs, **settings)
    alone = model.generate(**{k: v[2:, 3:] for k, v in inputs.items()}, **settings)  # the third text has 3 of padding
    assert padded.sequences[2, 11:].tolist() == alone.sequences[0, 8:].tolist()
    for one, other in zip(padded.scores, alone.scores, strict=True):
        torch.testing.assert_close(one[2:], other, rtol=0, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bert", "roberta"])
def test_positions_that_the_caller_gives(architecture):
    model, adapter, part = prompted(architecture)
    inputs = batch(model)
    inputs = {k: v[:2] for k, v in inputs.items()}  # no padding
    first = 1 if architecture == "roberta" else 0
    positions = torch.arange(first, first + 11)[None]
    expected = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, position_ids=positions).logits, expected)
    torch.testing.assert_close(model(**inputs, position_ids=positions.expand(2, -1)).logits, expected)
    assert (model(**inputs, position_ids=positions.flip(1)).logits - expected).abs().max() > 1e-3


def test_generation_switched_off_is_the_base():
    base = small_model("llama")
    inputs = {k: v.flip(1) for k, v in batch(base).items()}
    expected = base.generate(**inputs, max_new_tokens=8, do_sample=False)
    model, adapter, part = prompted("llama")
    with adapter.disabled():
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


# ------------------------------------------------------------------------------------------------- training and files


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
def test_training_goes_on_after_loading(architecture, tmp_path):
    def steps(model, adapter, n):
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        for _ in range(n):
            optimizer.zero_grad()
            logits(model).square().mean().backward()
            optimizer.step()

    model, adapter, _ = prompted(architecture)
    steps(model, adapter, 3)
    adapter.save(tmp_path)
    assert not (tmp_path / "training_state.safetensors").exists()  # the prompt is all there is
    steps(model, adapter, 3)
    fresh = small_model(architecture)
    loaded = load_adapter(fresh, tmp_path)
    steps(fresh, loaded, 3)
    found, expected = file_tensors(loaded), file_tensors(adapter)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0; it must be a whole number from 1 up"),
        ({"num_virtual_tokens": 2.0}, "num_virtual_tokens is 2.0"),
        ({"init": "uniform"}, "init is 'uniform'; it can be 'vocab', 'text', 'random'"),
        ({"init": "text"}, "init='text' and init_ids, the numbers of that text's tokens, go together"),
        ({"init_ids": (1,)}, "init='text' and init_ids"),
        ({"init": "text", "init_ids": "a text"}, "init_ids must be token numbers"),
        ({"init": "text", "init_ids": (-1,)}, "init_ids must be token numbers"),
        ({"num_transformer_submodules": 3}, "num_transformer_submodules is 3; it can be 1, 2"),
        ({"modules_to_save": 3}, "modules_to_save is 3"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        PromptTuning(**settings)


def test_what_does_not_fit_the_model():
    model = small_model("gpt2")
    before = bits(model)
    with pytest.raises(ValueError, match="init_ids has token 64; the vocabulary ends at 63"):
        attach(model, PromptTuning(init="text", init_ids=(3, VOCAB)))
    with pytest.raises(ValueError, match="num_virtual_tokens is 64, which leaves no position of the model's 64"):
        attach(model, PromptTuning(num_virtual_tokens=64))
    assert bits(model).keys() == before.keys() and not hasattr(model, "_attached_adapters")
    with pytest.raises(ValueError, match="this Linear has none that it knows"):
        attach(torch.nn.Linear(2, 2), PromptTuning())
    size = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    config = tf.CLIPConfig(text_config=COMMON | TOKENS, vision_config=COMMON | size, projection_dim=8)
    with pytest.raises(ValueError, match="one stack of layers, or before the encoder of two; this CLIPModel has"):
        attach(tf.CLIPModel(config), PromptTuning())


def test_masks_of_another_form_and_no_input():
    model, adapter, part = prompted("llama")
    with pytest.raises(
        ValueError, match=r"a prompt needs an attention mask of shape \(batch, length\), or none: with a static cache"
    ):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 1, 3, 3))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):  # as the base says it
        model(attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), inputs_embeds=torch.ones(1, 3, WIDTH))
    assert logits(model).shape == (3, 11, VOCAB)


@pytest.mark.parametrize("architecture", ALL)
def test_a_prompt_over_another_adapter_on_the_embeddings_starts_from_the_base(architecture):
    model = small_model(architecture)
    table = model.get_input_embeddings()
    expected = table(torch.tensor([5, 6])).detach()
    name = next(n for n, m in model.named_modules() if m is table)
    attach(model, LoRA(targets=(name,), init="random_b"), "lora")
    adapter = attach(model, PromptTuning(num_virtual_tokens=2, init="text", init_ids=(5, 6)))
    found = next(p for p in adapter.parts.values() if isinstance(p, Prompts)).prompt_embeddings
    assert torch.equal(found, expected)
