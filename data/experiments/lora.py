"""The experiments of the LoRA chapter: `python -m data.experiments.lora [NAME ...]` records them (none named: all).

A record that is there is completed, not repeated. README.md in this folder says what each asks and how long it takes.
"""

import argparse

import torch

from utils.experiments import load
from utils.recording import record

SEEDS = (0, 1, 2)
INTENT = {"model": "encoder", "task": "intent", "steps": 200, "batch_size": 16}
TICKETS = {"model": "decoder", "task": "tickets", "steps": 300, "batch_size": 16,
           "probes": {"old_facts": ["old_facts", "test"], "documents": ["documents", "test"]}}
BERT_LINEAR = r".*\.layer\.\d+\..*(query|key|value|dense)"  # of the layers; the pooler stays frozen
LLAMA_ATTENTION, LLAMA_MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def lora(base, r, targets, scale=2, **more):
    """Settings of a LoRA arm. alpha = scale * r, so that the scale alpha / r is the same at every rank."""
    return {**base, "method": "LoRA", "config": {"r": r, "alpha": scale * r, "targets": targets}, **more}


def vs_full_intent():
    arms = {
        "frozen": ({**INTENT, "method": "frozen"}, (3e-3, 1e-2, 3e-2, 1e-1)),
        "full": ({**INTENT, "method": "full"}, (3e-4, 1e-3, 3e-3, 1e-2)),
        "LoRA r=8, q and v": (lora(INTENT, 8, ["query", "value"]), (1e-3, 3e-3, 1e-2, 3e-2)),
        "LoRA r=8, all linear": (lora(INTENT, 8, BERT_LINEAR), (1e-3, 3e-3, 1e-2, 3e-2)),
    }
    return {"arms": arms, "slice": {"arm": "LoRA r=8, q and v", "seed": 0}}


def vs_full_tickets():
    arms = {
        "frozen": ({**TICKETS, "method": "frozen", "steps": 0}, (0,)),
        "full": ({**TICKETS, "method": "full"}, (3e-4, 5.6e-4, 1e-3, 1.8e-3, 3e-3)),
        "LoRA r=8, q and v": (lora(TICKETS, 8, ["q_proj", "v_proj"]), (2e-3, 6e-3, 2e-2, 3.5e-2, 6.3e-2)),
        "LoRA r=8, all linear": (lora(TICKETS, 8, "all-linear"), (2e-3, 3.5e-3, 6e-3, 1.1e-2, 2e-2)),
    }
    return {"arms": arms, "extend": False, "slice": {"arm": "frozen", "seed": 0}}


def alpha_lr():
    """A grid of five alphas and five rates (one seed, nothing tuned). The head keeps its own rate: only LoRA's changes.

    Steps of alpha are by 4; steps of the rate by 4 under AdamW and by 16 under SGD, where a step in B grows with the
    scale and what the step does to W grows with it once more.
    """
    arms = {}
    for optimizer, head_lr, rates in (("adamw", 1e-2, (5e-4, 2e-3, 8e-3, 3.2e-2, 1.28e-1)),
                                      ("sgd", 0.3, (1 / 256, 1 / 16, 1.0, 16.0, 256.0))):
        base = {**INTENT, "steps": 60, "optimizer": optimizer, "clip": None, "head_lr": head_lr}
        arms |= {f"{optimizer}, alpha={alpha}": (lora(base, 8, ["query", "value"], scale=alpha / 8), rates)
                 for alpha in (1, 4, 16, 64, 256)}
    return {"arms": arms, "seeds": (0,), "extend": False, "slice": {"arm": "adamw, alpha=16", "seed": 0}}


def rank_intent():
    """Ranks at one scale: alpha = 2 r."""
    arms = {f"r={r}": (lora(INTENT, r, ["query", "value"]), (1.5e-3, 3e-3, 6e-3, 1.2e-2)) for r in (1, 2, 4, 8, 16, 32)}
    return {"arms": arms, "extend": False, "slice": {"arm": "r=1", "seed": 0}}


def targets_intent():
    """Where LoRA is attached: per layer r * (d_in + d_out) summed over the targets is 9216, or 8960 for the MLP."""
    places = {
        "query, r=36": (["query"], 36), "value, r=36": (["value"], 36),
        "query and value, r=18": (["query", "value"], 18),
        "attention, r=9": (r".*\.(query|key|value|attention\.output\.dense)", 9),
        "MLP, r=7": (r".*\.layer\.\d+\.(intermediate|output)\.dense", 7), "all linear, r=4": (BERT_LINEAR, 4),
    }
    arms = {label: (lora(INTENT, r, targets), (2.5e-3, 5e-3, 1e-2)) for label, (targets, r) in places.items()}
    return {"arms": arms, "extend": False, "slice": {"arm": "MLP, r=7", "seed": 0}}


def intrinsic():
    """Random subspaces of the whole encoder, pretrained or freshly drawn. The head has its own rate in every arm."""
    base, arms = {**INTENT, "steps": 100, "head_lr": 1e-2}, {}
    for start in ("pretrained", "random"):
        arms[f"{start}, frozen"] = ({**base, "base": start, "method": "frozen"}, (0,))
        for d in (10, 100, 1000, 10000):
            settings = {**base, "base": start, "method": "subspace", "config": {"d": d}}
            arms[f"{start}, d={d}"] = (settings, (5e-4, 1.5e-3, 5e-3, 1.5e-2))
        arms[f"{start}, full"] = ({**base, "base": start, "method": "full"}, (5e-4, 1.5e-3, 5e-3, 1.5e-2))
    return {"arms": arms, "seeds": (0, 1), "extend": False, "slice": {"arm": "pretrained, d=100", "seed": 0}}


def forgetting():
    """The same task score at the gentlest rate: for each method the lowest one tried that had 0.99 on validation."""
    tickets = load("lora_vs_full_tickets")

    def gentlest(label):
        enough = [r["lr"] for r in tickets["runs"] if r["arm"] == label and r["validation"]["exact_match"] >= 0.99]
        return tickets["arms"][label]["settings"], (min(enough),)

    arms = {label: gentlest(label) for label in ("full", "LoRA r=8, all linear")}
    return {"arms": arms, "extend": False, "slice": {"arm": "LoRA r=8, all linear", "seed": 0}}


def spectrum():
    """The update of full fine-tuning, matrix by matrix, at the rate that lora_vs_full chose."""
    def chosen(name):
        return (load(name)["arms"]["full"]["lr"],)

    arms = {
        "intent": ({**INTENT, "method": "full", "spectrum": True}, chosen("lora_vs_full_intent")),
        "tickets": ({**TICKETS, "method": "full", "spectrum": True}, chosen("lora_vs_full_tickets")),
    }
    return {"arms": arms, "seeds": (0,), "extend": False, "slice": {"arm": "intent", "seed": 0}}


EXPERIMENTS = {
    "lora_vs_full_intent": vs_full_intent, "lora_vs_full_tickets": vs_full_tickets, "lora_alpha_lr": alpha_lr,
    "lora_rank_intent": rank_intent, "lora_intrinsic": intrinsic, "lora_targets_intent": targets_intent,
    "lora_spectrum": spectrum, "lora_forgetting": forgetting,
}


def main(arguments=None, experiments=EXPERIMENTS, module="data.experiments.lora"):
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description="Records experiments.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(experiments)} (default: all)")
    names = parser.parse_args(arguments).names or list(experiments)
    unknown = [name for name in names if name not in experiments]
    if unknown:
        parser.error(f"there is no experiment {unknown[0]!r}; choose from {', '.join(experiments)}")
    torch.set_num_threads(1)  # with one thread the same machine gives the same bits
    for name in names:
        record(name, **experiments[name](), command=f"python -m {module} {name}")


if __name__ == "__main__":
    main()
