"""Our Prompt Tuning and P-Tuning and PEFT's, on the same weights: outputs, gradients, files both ways, generated text.

PEFT's language models return logits for the prompt as well; they are compared from the first token of the text on.
"""

import json

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft_pair import QUIET, assert_near, task, their_tensors
from small_models import ALL, COMMON, DECODERS, ENCODERS, NO_DROPOUT, TOKENS, backward, batch, small_model

from utils import PromptTuning, PTuning, attach, load_adapter
from utils.checkpoint import CONFIG, STATE
from utils.methods.prompt import Prompts

L = 4
pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Position ids are not supported")]
KINDS = {
    "prompt": (PromptTuning, peft.PromptTuningConfig, {}, {}),
    "mlp": (PTuning, peft.PromptEncoderConfig, {"hidden": 12}, {"encoder_hidden_size": 12}),
    "lstm": (
        PTuning,
        peft.PromptEncoderConfig,
        {"encoder": "lstm", "hidden": 6},
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6},
    ),
}


def tensors_by_peft_names(adapter):
    """Name as PEFT has it in the model -> trained tensor."""
    found = {}
    for path, part in adapter.parts.items():
        for key, tensor in part.tensors().items():
            if isinstance(part, Prompts):
                found["prompt_encoder." + key.replace("prompt_embeddings", "embedding.weight")] = tensor
            else:
                found[f"{path}.{key}"] = tensor
    return found


def pair(model, kind, task_type, submodules=None, whole=None):
    """(our model, its adapter, PEFT's model), equal in all numbers. model: () -> a fresh model, always the same one"""
    ours, theirs, settings, fields = KINDS[kind]
    seq2seq = task_type == "SEQ_2_SEQ_LM"
    submodules = submodules or (2 if seq2seq else 1)
    fields = fields | ({"num_transformer_submodules": submodules} if seq2seq else {})
    torch.manual_seed(0)
    reference = peft.get_peft_model(model(), theirs(task_type=task_type, num_virtual_tokens=L, **fields)).eval()
    own = model()
    settings = settings | {"num_transformer_submodules": submodules, "modules_to_save": whole}
    adapter = attach(own, ours(num_virtual_tokens=L, **settings))
    found, expected = tensors_by_peft_names(adapter), their_tensors(reference, "base_model.")
    assert {n: p.shape for n, p in found.items()} == {n: p.shape for n, p in expected.items()}
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.add_(torch.randn(tensor.shape, generator=g), alpha=0.2)
            found[name].copy_(tensor)
    return own, adapter, reference


def small_pair(architecture, kind, dtype=torch.float32, **extra):
    return pair(lambda: small_model(architecture, dtype), kind, task(architecture), **extra)


def output(model, inputs=None):
    """The logits of the text's positions."""
    inputs = inputs or batch(model)
    found = model(**inputs).logits
    prompted = isinstance(model, peft.PeftModel) and found.ndim == 3 and not model.config.is_encoder_decoder
    return found[:, L:] if prompted else found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ALL)
def test_outputs_gradients_and_files(architecture, kind, tmp_path):
    model, adapter, reference = small_pair(architecture, kind)
    found, expected = output(model), output(reference)
    assert_near(found.detach(), expected.detach())
    backward(found)
    backward(expected)
    theirs = their_tensors(reference, "base_model.")
    for name, parameter in tensors_by_peft_names(adapter).items():
        assert_near(parameter.grad, theirs[name].grad)
    with torch.no_grad(), adapter.disabled():
        assert (output(model) - expected).abs().max() > 0.01  # the adapter does something

    # files, both ways
    with torch.no_grad():
        adapter.save(tmp_path / "ours")
        loaded = peft.PeftModel.from_pretrained(small_model(architecture), tmp_path / "ours")
        assert_near(output(loaded), expected)
        reference.save_pretrained(tmp_path / "theirs")
        fresh = small_model(architecture)
        read = load_adapter(fresh, tmp_path / "theirs", trainable=kind == "prompt")
        assert_near(output(fresh), expected)
        read.save(tmp_path / "again")  # and what was read is written in the same form
        loaded = peft.PeftModel.from_pretrained(small_model(architecture), tmp_path / "again")
        assert_near(output(loaded), expected)
    assert not (tmp_path / "again" / STATE).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_t5_with_as_many_rows_as_are_used(kind, tmp_path):
    """PEFT's other half of the rows does nothing (an LSTM runs over it): told so, it works with half of them too."""
    model, adapter, reference = small_pair("t5", kind, submodules=1)
    expected = output(reference).detach()
    assert_near(output(model).detach(), expected)
    adapter.save(tmp_path)
    assert_near(output(peft.PeftModel.from_pretrained(small_model("t5"), tmp_path)).detach(), expected)
    model, adapter, reference = small_pair("t5", "prompt")  # 2 l rows
    backward(output(reference))
    (prompt,) = their_tensors(reference, "base_model.").values()
    assert prompt.shape[0] == 2 * L and not prompt.grad[L:].any() and prompt.grad[:L].any()


@pytest.mark.parametrize("architecture", ALL)
def test_bfloat16(architecture):
    """Both keep the numbers in float32 and compute in bfloat16."""
    model, adapter, reference = small_pair(architecture, "mlp", torch.bfloat16)
    found, expected = output(model), output(reference)
    assert (found - expected).norm() < 0.02 * expected.norm()


GENERATION = [{}, {"use_cache": False}, {"num_beams": 3}]


@pytest.mark.parametrize("settings", GENERATION, ids=str)
@pytest.mark.parametrize("architecture", [*DECODERS, "t5"])
def test_generation_token_for_token(architecture, settings):
    """Texts of 11 and of 8 tokens, each length for itself in PEFT, both in one batch, padded on the left, in ours."""
    model, adapter, reference = small_pair(architecture, "prompt")
    inputs = {k: v.flip(1) for k, v in batch(model).items() if k != "decoder_input_ids"}
    settings = settings | {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings = settings | {"return_dict_in_generate": True, "output_scores": True}
    found = model.generate(**inputs, **settings)
    beams = settings.get("num_beams", 1)
    short = {k: v[2:, 3:] for k, v in inputs.items()}
    parts = [(0, 2, {k: v[:2] for k, v in inputs.items()}), (2, 3, short)]
    if architecture == "t5":  # knows no positions, so that padding between prompt and text counts in both
        parts = [(0, 3, inputs)]
    for start, stop, part in parts:
        expected = reference.generate(**part, **settings)
        assert found.sequences[start:stop, -10:].tolist() == expected.sequences[:, -10:].tolist()
        for own, theirs in zip(found.scores, expected.scores, strict=True):  # the small T5 mostly repeats one token
            assert_near(own[start * beams : stop * beams], theirs)
    with adapter.disabled():  # else the comparison above would prove nothing
        assert (found.scores[0] - model.generate(**inputs, **settings).scores[0]).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_padding_on_the_left_changes_what_peft_generates(architecture):
    """It drops the positions that generate() gives. Without a prompt padding does not count."""
    model, adapter, reference = small_pair(architecture, "prompt")
    inputs = {k: v.flip(1)[2:] for k, v in batch(model).items()}
    alone = {k: v[:, 3:] for k, v in inputs.items()}
    settings = {"max_new_tokens": 1, "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True}
    for m, far in ((reference, True), (model, False)):
        one, other = (m.generate(**i, **settings).scores[0] for i in (inputs, alone))
        assert ((one - other).abs().max() > 0.1) == far


# ------------------------------------------------------------------------------------------------- losses and heads


def test_loss_of_a_language_model():
    """Equal where the first token is no target. Where it is, PEFT's last virtual token must predict it as well."""
    model, adapter, reference = small_pair("llama", "prompt")
    inputs = batch(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    first = F.cross_entropy(reference(**inputs).logits[:, L - 1], labels[:, 0])
    own, theirs = model(**inputs, labels=labels).loss, reference(**inputs, labels=labels).loss
    assert_near(theirs * 30, own * 27 + first * 3)  # 11 + 11 + 8 targets, three of them first ones
    labels[:, 0] = -100
    assert_near(model(**inputs, labels=labels).loss, reference(**inputs, labels=labels).loss)


def test_loss_of_t5():
    model, adapter, reference = small_pair("t5", "prompt")
    inputs = {k: v for k, v in batch(model).items() if k != "decoder_input_ids"}
    labels = inputs["input_ids"].flip(1)
    assert_near(model(**inputs, labels=labels).loss, reference(**inputs, labels=labels).loss)


DECODER = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
CLASSIFIERS = {
    "llama": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**COMMON | TOKENS, num_labels=3)),
    "gpt2": lambda: tf.GPT2ForSequenceClassification(tf.GPT2Config(**DECODER | TOKENS, num_labels=3)),
    "opt": lambda: tf.OPTForSequenceClassification(
        tf.OPTConfig(**COMMON | TOKENS, ffn_dim=48, word_embed_proj_dim=32, num_labels=3)
    ),
}


def seeded(make):
    def model():
        torch.manual_seed(3)
        return make().eval()

    return model


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_a_decoders_class_for_a_padded_text(architecture, tmp_path):
    """The last token decides. PEFT passes embeddings only, so the head cannot tell padding from text and reads that."""
    make = seeded(CLASSIFIERS[architecture])
    model, adapter, reference = pair(make, "prompt", "SEQ_CLS")
    inputs = batch(model)
    alone = {k: v[2:, :8] for k, v in inputs.items()}  # the third text, of which 8 tokens are there
    with torch.no_grad():
        found, expected = model(**inputs).logits, reference(**inputs).logits
        assert_near(found[:2], expected[:2])
        assert_near(found[2:], model(**alone).logits)
        assert_near(model(**alone).logits, reference(**alone).logits)
        assert (expected[2:] - reference(**alone).logits).abs().max() > 1e-3
        loss = model(**inputs, labels=torch.tensor([0, 1, 2])).loss
    assert_near(loss, F.cross_entropy(found, torch.tensor([0, 1, 2])))
    adapter.save(tmp_path)
    assert sorted(json.loads((tmp_path / CONFIG).read_text())["modules_to_save"]) == ["score"]
    with torch.no_grad():
        assert_near(peft.PeftModel.from_pretrained(make(), tmp_path)(**alone).logits, found[2:])


@pytest.mark.parametrize("architecture", ENCODERS)
def test_an_encoders_class_is_read_from_the_first_virtual_token(architecture):
    model, adapter, reference = small_pair(architecture, "prompt")
    inputs = batch(model) | {"token_type_ids": torch.zeros(3, 11, dtype=torch.long)}
    if architecture == "bert":  # RoBERTa has one segment only
        inputs["token_type_ids"][:, 5:] = 1
    with torch.no_grad():
        assert_near(output(model, inputs), output(reference, inputs))
        base = model.base_model(**batch(model), output_hidden_states=True)
    assert base.last_hidden_state.shape[1] == L + 11  # not cut: position 0 is the prompt's


def test_a_class_per_token():
    """PEFT has a logit for every virtual token and no label, so that its loss fails."""
    size = COMMON | TOKENS | NO_DROPOUT
    make = seeded(lambda: tf.BertForTokenClassification(tf.BertConfig(**size, num_labels=3)))
    model, adapter, reference = pair(make, "prompt", "TOKEN_CLS")
    inputs = batch(model)
    assert_near(output(model).detach(), output(reference).detach())
    labels = inputs["input_ids"] % 3
    expected = F.cross_entropy(output(reference).flatten(0, 1), labels.flatten())
    assert_near(model(**inputs, labels=labels).loss, expected)
    with pytest.raises(ValueError, match="to match target batch_size"):
        reference(**inputs, labels=labels)


def test_answers_in_a_text():
    """start_positions count from the text's first token. PEFT takes them for positions behind its prompt."""
    size = COMMON | TOKENS | NO_DROPOUT
    make = seeded(lambda: tf.BertForQuestionAnswering(tf.BertConfig(**size)))
    model, adapter, reference = pair(make, "prompt", "QUESTION_ANS", whole=("qa_outputs",))
    inputs = batch(model)
    at = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 5, 6])}
    found, theirs = model(**inputs, **at), reference(**inputs, **at)
    assert_near(found.start_logits, theirs.start_logits[:, L:])
    assert_near(found.end_logits, theirs.end_logits[:, L:])
    losses = (F.cross_entropy(found.start_logits, at["start_positions"]),)
    losses += (F.cross_entropy(found.end_logits, at["end_positions"]),)
    assert_near(found.loss, sum(losses) / 2)


# ------------------------------------------------------------------------------------------------- PEFT's files


def test_other_starts_load_as_the_prompt_they_became(tmp_path):
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=L, prompt_tuning_init="SAMPLE_VOCAB", modules_to_save=None
    )
    reference = peft.get_peft_model(small_model("gpt2"), config).eval()
    reference.save_pretrained(tmp_path)
    model = small_model("gpt2")
    adapter = load_adapter(model, tmp_path)
    assert_near(output(model).detach(), output(reference).detach())
    assert adapter.config.init == "random" and adapter.config.num_virtual_tokens == L


def test_a_minimal_file(tmp_path):
    model, adapter, reference = small_pair("llama", "prompt")
    adapter.save(tmp_path)
    fields = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": L}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    fresh = small_model("llama")
    load_adapter(fresh, tmp_path)
    assert_near(output(fresh).detach(), output(reference).detach())
    assert_near(output(peft.PeftModel.from_pretrained(small_model("llama"), tmp_path)), output(reference))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"num_virtual_tokens": None}, "num_virtual_tokens is None; it must be a whole number"),
        ({"num_virtual_tokens": L + 1}, "have another shape: prompt_embeddings"),
        ({"num_transformer_submodules": 2}, "have another shape: prompt_embeddings"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "peft_type is 'MULTITASK_PROMPT_TUNING'"),
    ],
)
def test_files_that_do_not_fit(fields, words, tmp_path):
    _, adapter, _ = small_pair("llama", "prompt")
    adapter.save(tmp_path)
    file = tmp_path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=words):
        load_adapter(small_model("llama"), tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "opt", "bert", "t5"])
def test_a_model_without_head(architecture, tmp_path):
    """PEFT puts the prompt in front only if the file names a task: for such a model it is FEATURE_EXTRACTION."""

    def bare():
        if architecture != "t5":
            return small_model(architecture).base_model
        torch.manual_seed(0)
        return tf.T5EncoderModel(small_model("t5").config).eval()

    model = bare()
    inputs = {k: v for k, v in batch(small_model("llama")).items()}
    adapter = attach(model, PromptTuning(num_virtual_tokens=L))
    adapter.save(tmp_path)
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(bare(), tmp_path)
        assert_near(loaded(**inputs)[0][:, L:], model(**inputs)[0])
