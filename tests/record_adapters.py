"""Records what AdapterHub's `adapters` 1.3 computes: test_adapters_library compares with it. `make compare-adapters`.

    python tests/record_adapters.py [folder]       in an environment of its own: adapters 1.3 needs transformers 4.57

Writes into the folder (tests/fixtures/adapters): versions.json, one file base_<model>.safetensors per model, and one
file <method>_<model>.safetensors per method and model. The README.md beside them says what each holds.
Every trained number is random, so that nothing is zero and a forgotten tensor shows.
"""

import json
import sys
from pathlib import Path

import adapters
import torch
import transformers as tf
from safetensors.torch import save_file

VOCAB, WIDTH = 24, 16
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
ENCODER = SIZE | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
GPT2 = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 24, "n_inner": 24}
GPT2 |= {"initializer_range": 0.2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
T5 |= {"dropout_rate": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0}
MODELS = {  # the class, its configuration's class, and what that is made with
    "bert": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZE),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
}


def methods():
    """Name -> configuration. The library's own defaults, but for the sizes."""
    prefix = {"prefix_length": 3, "bottleneck_size": 6}
    return {
        "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=4),
        "seq_bn": adapters.SeqBnConfig(reduction_factor=4),
        "par_bn": adapters.ParBnConfig(reduction_factor=4),
        "scaled_par_bn": adapters.ParBnConfig(reduction_factor=4, scaling="learned"),
        "lora": adapters.LoRAConfig(r=2, alpha=3),
        "prefix_tuning": adapters.PrefixTuningConfig(**prefix),
        "mam": adapters.MAMConfig(adapters.PrefixTuningConfig(**prefix), adapters.ParBnConfig(reduction_factor=4)),
        "unipelt": adapters.UniPELTConfig(
            adapters.PrefixTuningConfig(**prefix),
            adapters.SeqBnConfig(reduction_factor=4),
            adapters.LoRAConfig(r=2, alpha=2),
        ),
    }


def base_model(name):
    """A fresh model with every number random, norms and biases included."""
    kind, config, settings = MODELS[name]
    torch.manual_seed(list(MODELS).index(name))
    # eager: where torch's own attention gets a mask of booleans, adapters 1.3 masks the prefix it has put in front
    model = getattr(tf, kind)(getattr(tf, config)(**settings, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def inputs(model):
    """Two sequences of 7 tokens, the second one padded to that length, as keyword arguments of the model."""
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    found = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = ids.flip(1)
    return found


def record_base(name, folder):
    model = base_model(name)
    tied = {n for n in getattr(model, "_tied_weights_keys", None) or [] if model.config.tie_word_embeddings}
    tensors = {f"weight.{n}": t for n, t in model.state_dict().items() if n not in tied}
    tensors |= {f"input.{n}": t for n, t in inputs(model).items()}
    logits = model(**inputs(model)).logits
    tensors["logits"] = logits
    tensors["loss_weights"] = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    kind, config, settings = MODELS[name]
    store(tensors, folder / f"base_{name}.safetensors", {"class": kind, "config_class": config, "config": settings})


def record_method(method, config, name, folder):
    model = base_model(name)
    base = {id(p) for p in model.parameters()}
    adapters.init(model)
    torch.manual_seed(0)
    model.add_adapter("x", config=config)
    model.train_adapter("x")
    model.eval()
    own = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in base}
    with torch.no_grad():
        for parameter in own.values():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.ndim == 1 and parameter.numel() == 1))
    logits = model(**inputs(model)).logits
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    tensors = {"logits": logits}
    for n, p in own.items():
        tensors[f"tensor.{n}"] = p
        if p.grad is not None:
            tensors[f"gradient.{n}"] = p.grad
    store(tensors, folder / f"{method}_{name}.safetensors", {"settings": config.to_dict()})


def store(tensors, path, about):
    tensors = {n: t.detach().clone().contiguous() for n, t in tensors.items()}
    save_file(tensors, path, {"about": json.dumps(about, sort_keys=True)})


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        record_base(name, folder)
        for method, config in methods().items():
            record_method(method, config, name, folder)
            print(f"recorded {method} on {name}")
    versions = {"adapters": adapters.__version__, "transformers": tf.__version__, "torch": torch.__version__}
    (folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "fixtures" / "adapters")
