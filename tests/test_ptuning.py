"""P-Tuning: its encoders by hand, and training that goes on where it was saved. (Against PEFT: test_prompt_peft.)"""

import copy
import json

import peft
import pytest
import torch
from peft_pair import QUIET
from safetensors.torch import load_file, save_file
from small_models import logits, move, small_model

from utils import PTuning, attach, load_adapter
from utils.checkpoint import STATE, WEIGHTS, state_tensors
from utils.methods.prompt import Prompts
from utils.methods.ptuning import PromptEncoder, lstm_step, ptuning_mlp, ptuning_num_params

pytestmark = QUIET
L = 4
ENCODERS = {"mlp": {"hidden": 12}, "lstm": {"encoder": "lstm", "hidden": 6}}


def attached(architecture="llama", **settings):
    """(model, adapter, its part with the encoder)"""
    model = small_model(architecture)
    torch.manual_seed(0)
    adapter = attach(model, PTuning(num_virtual_tokens=L, **settings))
    return model, adapter, next(p for p in adapter.parts.values() if isinstance(p, Prompts))


# ------------------------------------------------------------------------------------------------- the equations


def test_mlp_by_hand():
    first = (torch.tensor([[1.0, 0], [0, -1]]), torch.tensor([1.0, 0]))
    second = (torch.tensor([[2.0, 3]]), torch.tensor([-10.0]))
    # (1, 2) -> (1 + 1, -2) -> ReLU (2, 0) -> 2 * 2 + 3 * 0 - 10; no ReLU after the last layer
    assert ptuning_mlp(torch.tensor([[1.0, 2]]), [first, second]).tolist() == [[-6]]
    assert ptuning_mlp(torch.tensor([[1.0, 2]]), [first]).tolist() == [[2, -2]]


def test_lstm_step_by_hand():
    zero = torch.zeros(1)
    W, U = torch.zeros(4, 1), torch.zeros(4, 1)
    b = torch.tensor([0.0, 0, 100, 0])  # gates at one half, the new value at tanh(100) = 1
    h, c = lstm_step(zero, zero, torch.tensor([3.0]), W, U, b)
    assert c.item() == 0.5 * 3 + 0.5 * 1
    assert h.item() == pytest.approx(0.5 * torch.tanh(torch.tensor(2.0)).item())


def test_lstm_encoder_is_these_steps():
    """One layer: a walk forwards and one backwards over the rows, their states side by side, then the two layers."""
    torch.manual_seed(0)
    encoder = PromptEncoder(5, 3, 2, "lstm", 1, 0.0).double()
    lstm, rows = encoder.lstm_head, encoder.embedding.weight
    directions = []
    for suffix in ("", "_reverse"):
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        W, U, b_in, b_state = (getattr(lstm, n + suffix) for n in names)
        h, c, states = torch.zeros(2).double(), torch.zeros(2).double(), []
        for x in rows.flip(0) if suffix else rows:
            h, c = lstm_step(x, h, c, W, U, b_in + b_state)
            states.append(h)
        states = torch.stack(states)
        directions.append(states.flip(0) if suffix else states)
    head = [(encoder.mlp_head[i].weight, encoder.mlp_head[i].bias) for i in (0, 2)]
    torch.testing.assert_close(encoder(), ptuning_mlp(torch.cat(directions, 1), head))


def test_numbers_of_parameters():
    assert ptuning_num_params(20, 768, 768) == 1_787_136  # the example in the module's docstring
    assert ptuning_num_params(L, 32, 12) == 4 * 32 + (32 * 12 + 12) + (12 * 12 + 12) + (12 * 32 + 32)
    for kind, settings in ENCODERS.items():
        for layers in (1, 2, 3) if kind == "lstm" else (2,):
            _, adapter, part = attached(**settings, layers=layers)
            expected = ptuning_num_params(L, 32, settings["hidden"], kind, layers)
            assert sum(p.numel() for p in adapter.parameters()) == expected
            assert part.exported()["prompt_embeddings"].shape == (L, 32)
    assert attached()[2].encoder.mlp_head[0].out_features == 32  # hidden=None: as wide as the embeddings


@pytest.mark.parametrize("settings", ENCODERS.values(), ids=ENCODERS)
def test_the_prompt_is_what_pefts_encoder_makes(settings):
    """Weights have the same names and shapes, so that states can be carried over."""
    _, _, part = attached(**settings)
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=L, token_dim=32, num_transformer_submodules=1, encoder_hidden_size=settings["hidden"],
        encoder_reparameterization_type=settings.get("encoder", "mlp").upper(),
    )  # fmt: skip
    theirs = peft.PromptEncoder(config)
    theirs.load_state_dict(part.encoder.state_dict())
    expected = theirs(torch.arange(L)[None])[0]
    torch.testing.assert_close(part.prompts(), expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- files


def steps(model, adapter, optimizer, n):
    for _ in range(n):
        optimizer.zero_grad()
        logits(model).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
@pytest.mark.parametrize("settings", ENCODERS.values(), ids=ENCODERS)
def test_training_goes_on_where_it_was_saved(settings, architecture, tmp_path):
    """With the optimizer's state too: save, load and go on is the same as never to have stopped."""
    model, adapter, _ = attached(architecture, **settings)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    steps(model, adapter, optimizer, 3)
    adapter.save(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    steps(model, adapter, optimizer, 3)

    fresh = small_model(architecture)
    loaded = load_adapter(fresh, tmp_path)
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.01)
    optimizer.load_state_dict(state)
    steps(fresh, loaded, optimizer, 3)
    found, expected = dict(loaded.named_parameters()), dict(adapter.named_parameters())
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
    assert torch.equal(logits(fresh), logits(model))


def test_the_main_file_holds_the_prompt_only(tmp_path):
    model, adapter, part = attached(encoder="lstm")
    adapter.save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {"prompt_embeddings": (L, 32)}
    torch.testing.assert_close(tensors["prompt_embeddings"], part.prompts())
    kept = load_file(tmp_path / STATE)
    assert kept.keys() == state_tensors(adapter).keys()
    assert "model.embedding.weight" in kept and "model.lstm_head.weight_hh_l1_reverse" in kept


def test_saved_in_training_mode_is_the_same_file(tmp_path):
    """Dropout is for training. (PEFT writes a prompt with dropout in it when it saves in training mode.)"""
    model, adapter, part = attached(encoder="lstm", dropout=0.5)
    assert not part.encoder.lstm_head.training  # the model is in eval mode, and so is what was put into it
    assert torch.equal(logits(model), logits(model))
    adapter.save(tmp_path / "eval")
    model.train()
    assert not torch.equal(logits(model), logits(model))
    adapter.save(tmp_path / "train")
    assert part.encoder.lstm_head.training
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=L, encoder_reparameterization_type="LSTM", encoder_hidden_size=6,
        encoder_dropout=0.5,
    )  # fmt: skip
    reference = peft.get_peft_model(small_model("llama"), config).train()
    drawn = [reference.get_prompt_embedding_to_save("default") for _ in range(2)]
    assert not torch.equal(*drawn)
    for file in (WEIGHTS, STATE):
        assert (tmp_path / "eval" / file).read_bytes() == (tmp_path / "train" / file).read_bytes()


def test_without_the_encoder_only_inference(tmp_path):
    """As PEFT writes it, and as a folder is after the state was deleted to ship it."""
    model, adapter, _ = attached()
    expected = logits(model).detach()
    adapter.save(tmp_path)
    (tmp_path / STATE).unlink()
    fresh = small_model("llama")
    with pytest.raises(ValueError, match="holds the prompt and not the encoder.*load it with trainable=False"):
        load_adapter(fresh, tmp_path)
    assert not hasattr(fresh, "_attached_adapters")
    loaded = load_adapter(fresh, tmp_path, trainable=False)
    torch.testing.assert_close(logits(fresh), expected)
    assert not any(p.requires_grad for p in fresh.parameters())
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    assert not (tmp_path / "again" / STATE).exists()
    twin = copy.deepcopy(fresh)
    torch.testing.assert_close(logits(twin), expected)


def test_a_state_of_another_prompt_is_refused(tmp_path):
    model, adapter, _ = attached()
    adapter.save(tmp_path)
    move(adapter)
    adapter.save(tmp_path / "later")
    (tmp_path / STATE).write_bytes((tmp_path / "later" / STATE).read_bytes())
    with pytest.raises(ValueError, match="the encoder in the file for further training does not make the prompt"):
        load_adapter(small_model("llama"), tmp_path)
    tensors = load_file(tmp_path / "later" / STATE)
    del tensors["model.embedding.weight"]
    save_file(tensors, tmp_path / "later" / STATE)
    with pytest.raises(ValueError, match=f"1 tensors are missing in {STATE}: model.embedding.weight"):
        load_adapter(small_model("llama"), tmp_path / "later")


def test_settings_that_pefts_mlp_ignores_are_read(tmp_path):
    model, adapter, _ = attached()
    adapter.save(tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    assert fields["encoder_reparameterization_type"] == "MLP" and fields["encoder_hidden_size"] == 32
    file.write_text(json.dumps(fields | {"encoder_num_layers": 5, "encoder_dropout": 0.3}))
    assert load_adapter(small_model("llama"), tmp_path).config == PTuning(L, hidden=32, modules_to_save=())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"encoder": "gru"}, "encoder is 'gru'; it can be 'mlp', 'lstm'"),
        ({"hidden": 0}, "hidden is 0; it must be a whole number from 1 up"),
        ({"layers": 3}, "layers is 3; it is a setting of the LSTM, and the MLP has none such"),
        ({"dropout": 0.1}, "dropout acts between the layers of an LSTM"),
        ({"encoder": "lstm", "layers": 1, "dropout": 0.1}, "dropout acts between the layers of an LSTM"),
        ({"encoder": "lstm", "dropout": 1}, "dropout is 1; it is a probability"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens is True"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        PTuning(**settings)


def test_merging_is_refused_with_the_reason():
    _, adapter, _ = attached()
    with pytest.raises(ValueError, match="model: a EncodedPrompts makes the input longer, so it cannot be merged"):
        adapter.merge()
