"""What the finished decoder must be able to do. The build is gated on these, not on its loss."""

import random

import torch

from . import world
from .messages import draw_message, draw_reply

GATES = {"copy": 0.98, "old_facts": 1.0, "narrative_to_json": 0.9, "restating": 0.9}


def probe_rows(count=200):
    """-> {probe: list of (prompt, target, whether the document must end there)} from documents never trained on."""
    shard = world.HELD_OUT_SHARD
    copies = [d for d in world.documents(shard, 4 * count, world.copy_document) if d.startswith("Copy: ")][:count]
    narratives = world.documents(shard, count, world.narrative_document)
    rows = {
        "copy": [(d.split(" ;")[0] + " ;", d.split(" ;")[1], True) for d in copies],
        "old_facts": [
            (world.question(attribute, person["name"]), f" {person[attribute]}.", True)
            for person in world.PEOPLE for attribute in world.ATTRIBUTES
        ],
        "narrative_to_json": [
            (d.split("Record:")[0] + "Record:", d.split("Record:")[1], True) for d in narratives
        ],
        "restating": [],
    }
    rng = random.Random(f"restating {shard}")
    while len(rows["restating"]) < count:
        # the reply up to its "Your order is" is given, so that exactly one continuation is right
        message = draw_message(rng)
        if message.mentions("order") and "Your order is" in (reply := draw_reply(rng, message)):
            start = reply.split(" Your order is")[0]
            prompt = f"Customer: {message.text}\nAgent: {start} Your order is"
            rows["restating"].append((prompt, f" {message.slots['order']}.", False))
    return rows


@torch.no_grad()
def exact_match(model, tokenizer, rows, batch_size=50):
    """Share of rows whose every target token is the most likely one, given the right tokens before it.

    That is the same as greedy decoding giving exactly the target: the first wrong token breaks both.
    """
    right = 0
    rows = sorted(rows, key=lambda row: len(row[0]))
    for start in range(0, len(rows), batch_size):
        batch = rows[start:start + batch_size]
        prompts = tokenizer([prompt for prompt, _, _ in batch])["input_ids"]
        targets = tokenizer([target for _, target, _ in batch], add_special_tokens=False)["input_ids"]
        targets = [ids + [tokenizer.eos_token_id] * row[2] for ids, row in zip(targets, batch, strict=True)]
        length = max(len(p) + len(t) for p, t in zip(prompts, targets, strict=True))
        ids = torch.full((len(batch), length), tokenizer.pad_token_id)  # (B, L), padded right
        scored = torch.zeros(len(batch), length, dtype=torch.bool)
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            ids[i, :len(prompt) + len(target)] = torch.tensor(prompt + target)
            scored[i, len(prompt):len(prompt) + len(target)] = True
        guess = model(input_ids=ids).logits[:, :-1].argmax(-1)  # (B, L-1)
        right += ((guess == ids[:, 1:]) | ~scored[:, 1:]).all(1).sum().item()
    return right / len(rows)


def run(model, tokenizer, count=200):
    """-> {probe: exact match}"""
    model.eval()
    return {name: exact_match(model, tokenizer, rows) for name, rows in probe_rows(count).items()}


def failures(scores):
    """One sentence per probe that is below its gate."""
    return [f"{name} is {scores[name]:.3f}, below {gate}" for name, gate in GATES.items() if scores[name] < gate]
