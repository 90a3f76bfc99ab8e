"""Plans: what fits which GPU, what to change when it does not, names, goals, and the command."""

import json

import pytest

from utils import LoRA
from utils.architectures import architecture
from utils.memory.__main__ import main
from utils.memory.estimate import facts_of, predict
from utils.memory.plan import CONTEXT_GIB, LOST, WAYS, find, gpus, next_remedy, plan, skeleton, try_way

FULL, FULL_8, ADAPTER, QLORA = WAYS


@pytest.fixture(scope="module")
def llama():
    return architecture("Llama-2-7B")


@pytest.fixture(scope="module")
def facts(llama):
    return facts_of(llama), facts_of(llama, LoRA(r=16, targets="all-linear"))


def test_a_7b_model_on_a_t4(llama):
    """15 GB of weights leave no room for gradients; with LoRA only checkpointing helps; in 4 bits it is easy."""
    answer = plan(llama, "T4", length=1024)
    fits = {(row.way.name, row.checkpointing): row.batch for row in answer.rows}
    assert not any(batch for (name, _), batch in fits.items() if name.startswith("full"))
    assert fits["LoRA r=16", False] == 0 and 1 <= fits["LoRA r=16", True] < fits["QLoRA r=16", True]
    assert answer.best.way is ADAPTER and answer.best.checkpointing
    assert "no bfloat16" in str(answer) and "does not fit; next: gradient checkpointing" in str(answer)
    assert answer.room == 16 * 2**30 * (1 - LOST) - CONTEXT_GIB * 2**30


def test_the_largest_batch_fits_and_the_next_does_not(facts):
    for way, room in ((ADAPTER, 40 * 2**30), (QLORA, 14 * 2**30)):
        row = try_way(facts[1], way, False, room, 512, largest=64)
        assert 1 <= row.batch < 64 and row.peak <= room
        more = predict(facts[1], way.recipe, row.batch + 1, 512, quantized=way.quantized)
        assert (
            more.peak > room and predict(facts[1], way.recipe, row.batch, 512, quantized=way.quantized).peak == row.peak
        )


def remedy(facts, way, gib, length, checkpointing=False):
    room = gib * 2**30
    step = predict(facts, way.recipe, 1, length, checkpointing=checkpointing, quantized=way.quantized)
    assert step.peak > room
    return next_remedy(way, checkpointing, step, room)


def test_what_to_change_next(facts):
    full, lora = facts
    assert remedy(full, FULL, 80, 512) == "8-bit moments, or an adapter"
    assert remedy(full, FULL_8, 24, 512) == "an adapter"
    assert remedy(lora, ADAPTER, 8, 512) == "the base in 4 bits (QLoRA)"
    assert remedy(lora, QLORA, 3, 512) == "FSDP, or a smaller base"
    assert remedy(lora, ADAPTER, 16, 2048).startswith("gradient checkpointing")
    assert remedy(lora, ADAPTER, 15, 16384, checkpointing=True).startswith(
        ("the loss in chunks", "shorter rows")
    )


def test_goals(llama):
    order = {
        goal: [row.way for row in plan(llama, "H100", length=512, goal=goal).rows] for goal in ("quality", "tasks")
    }
    assert order["quality"][0] is FULL and order["tasks"][0] is ADAPTER
    fast = plan(llama, "H100", length=512, goal="speed").rows
    assert not any(row.checkpointing for row in fast[:4]) and fast[0].way is not QLORA
    with pytest.raises(ValueError, match="goal is 'fun'; it can be 'quality', 'speed', 'tasks'"):
        plan(llama, "H100", goal="fun")


def test_names_in_any_case_and_near_ones():
    assert find("rtx 4090", gpus(), "GPU") == find("RTX_4090", gpus(), "GPU") == "RTX-4090"
    assert skeleton("llama-2-7b").config.num_hidden_layers == 32
    with pytest.raises(ValueError, match="no GPU is called 'A100'; near: A100-40GB, A100-80GB"):
        plan("GPT-2", "A100")
    with pytest.raises(ValueError, match="no model is called 'llama-7b'; near: Llama-2-7B"):
        plan("llama-7b", "T4")
    with pytest.raises(ValueError, match="no GPU is called '\\?'; near: T4, P100"):
        plan("GPT-2", "?")


@pytest.fixture
def folder(tmp_path):
    config = architecture("GPT-2", n_layer=3).config
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    return tmp_path


def test_a_local_config(folder):
    model = skeleton(str(folder))
    assert len(model.transformer.h) == 3 and all(p.is_meta for p in model.parameters())
    assert plan(str(folder), "T4", length=128).best.way is FULL
    assert skeleton(str(folder / "config.json")).config.n_layer == 3


def test_a_config_that_cannot_be_read_and_one_without_formulas(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no config could be read from"):
        plan(str(tmp_path / "empty"), "T4")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"],
                                                      "num_hidden_layers": 1, "hidden_size": 8}))  # fmt: skip
    with pytest.raises(ValueError, match="mamba"):
        plan(str(tmp_path), "T4")


def test_every_gpu_has_what_a_plan_needs():
    for gpu in gpus().values():
        assert gpu["memory_gib"] >= 8 and isinstance(gpu["bf16"], bool) and gpu["bandwidth_gb_s"] > 100


def test_the_command(capsys):
    main(["plan", "--model", "gpt-2", "--gpu", "t4", "--length", "256", "--goal", "tasks"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("gpt-2, 256 tokens, on a T4: 14.6 GiB")
    assert lines[1].split()[:2] == ["way", "checkpointing"] and lines[2].startswith("LoRA r=16")
    with pytest.raises(SystemExit, match="no model is called 'gpt-22'; near: GPT-2"):
        main(["plan", "--model", "gpt-22", "--gpu", "t4"])
