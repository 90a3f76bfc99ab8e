"""Trains the adapter that chapter 2 loads: tickets become JSON. `python -m data.adapters.make` writes it again.

The learning rate is the one that the recorded experiment `lora_vs_full` chose for this arm on the validation split.
"""

import json

import torch

from utils import LoRA, attach, load_base, load_task, load_tokenizer, train
from utils.paths import DATA
from utils.tasks import collate, evaluate

FOLDER = DATA / "adapters" / "tickets"
STEPS, LEARNING_RATE, SEED = 300, 6e-3, 0


def main():
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model, tokenizer, rows = load_base("decoder"), load_tokenizer("decoder"), load_task("tickets")
    adapter = attach(model, LoRA(r=8, alpha=16, targets="all-linear"))
    history = train(model, list(rows["train"]), lambda part: collate(part, tokenizer), params=adapter.parameters(),
                    steps=STEPS, lr=LEARNING_RATE, seed=SEED)
    adapter.save(FOLDER)
    scores = evaluate(model, rows["test"], tokenizer)
    facts = {"steps": STEPS, "lr": LEARNING_RATE, "seed": SEED, "seconds": round(history.seconds), "test": scores}
    (FOLDER / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
