"""One model with our adapter and one with PEFT's, the same numbers in both: what every test of parity starts from.

    model, adapter, reference = pair("gpt2", LoRA(r=4, ...), peft.LoraConfig(r=4, ...))
    assert_near(logits(model), logits(reference))
"""

import re

import peft
import pytest
import torch
from small_models import ENCODERS, backward, logits, small_model

from utils import attach
from utils.checkpoint import PREFIX, file_tensors

TOLERANCE = 1e-5  # of outputs and of gradients, both relative to the largest entry where that is above 1

QUIET = [  # what PEFT says on these models, and no test is about
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # PEFT finds GPT-2's Conv1D out by itself
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # PEFT 0.21 on transformers 5.23
]


def task(architecture):
    """PEFT's task_type of a small model."""
    return {"t5": "SEQ_2_SEQ_LM"}.get(architecture, "SEQ_CLS" if architecture in ENCODERS else "CAUSAL_LM")


def peft_model(architecture, config, dtype=torch.float32):
    """A PEFT model of the configuration, with every trained number random: PEFT's own start is often the identity."""
    model = peft.get_peft_model(small_model(architecture, dtype), config)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=g)
                start = 0 if "lora_A" in name or "lora_B" in name or "lora_embedding" in name else parameter
                parameter.copy_(start + 0.2 * noise)
    return model.eval()


def their_tensors(model, prefix=PREFIX):
    """Name in the file -> trained parameter of a PEFT model."""
    trained = {n.removeprefix(prefix): p for n, p in model.named_parameters() if p.requires_grad}
    names = {n: re.sub(r"\.(default|modules_to_save)(?=\.|$)", "", n) for n in trained}
    return {names[n].replace("magnitude_vector.weight", "magnitude_vector"): p for n, p in trained.items()}


def pair(architecture, ours, theirs, dtype=torch.float32):
    """(our model, its adapter, PEFT's model), equal in all numbers. Checks that both adapt the same modules."""
    reference = peft_model(architecture, theirs, dtype)
    model = small_model(architecture, dtype)
    adapter = attach(model, ours)
    own, other = file_tensors(adapter), their_tensors(reference)
    assert {n: p.shape for n, p in own.items()} == {n: p.shape for n, p in other.items()}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(other[name])
    return model, adapter, reference


def assert_near(found, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1, expected.abs().max().item()))


def output_and_gradient(model, tensors):
    """Two vectors: all logits, and the gradients of all the tensors, in the order of their names."""
    found = logits(model)
    backward(found)
    gradient = torch.cat([tensors[n].grad.float().flatten() for n in sorted(tensors)])
    return found.detach().float().flatten(), gradient
