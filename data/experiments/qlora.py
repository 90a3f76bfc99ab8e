"""The experiments of the QLoRA chapter: `python -m data.experiments.qlora [NAME ...]` records them (none named: all).

A record that is there is completed, not repeated. README.md in this folder says what each asks and how long it takes.
"""

from data.experiments.lora import TICKETS, lora, main

RATES = (2e-3, 3.5e-3, 6e-3, 1.1e-2)
KINDS = (None, "NF4", "FP4", "INT4")  # None: the base in float32


def bases():
    """Four bases, one in float32 and three in 4 bits: untrained, and with LoRA on every linear layer."""
    arms = {}
    for kind in KINDS:
        name, more = kind or "float32", {"quantize": kind} if kind else {}
        arms[f"{name}, untrained"] = ({**TICKETS, "method": "frozen", "steps": 0, **more}, (0,))
        arms[name] = (lora(TICKETS, 8, "all-linear", **more), RATES)
    return {"arms": arms, "extend": False, "slice": {"arm": "NF4, untrained", "seed": 0}}


EXPERIMENTS = {"qlora_bases": bases}

if __name__ == "__main__":
    main(experiments=EXPERIMENTS, module="data.experiments.qlora")
