"""Pretrains data/models/tiny-llama: next-token prediction on the invented world, one pass, no document twice."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from utils.paths import DATA

from . import probes, world
from .tokenizer import VOCAB_SIZE, decoder_tokenizer, make_bpe
from .training import Progress, learning_rate, make_optimizer, save, train_step, write_record

FOLDER = DATA / "models" / "tiny-llama"
STEPS, ROWS, LENGTH, PEAK_LR = 6_800, 8, 256, 3e-3
HELD_OUT_DOCUMENTS = 600


def new_model(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=128, num_hidden_layers=4, intermediate_size=352, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    ))


def pack(docs, tokenizer):
    """Whole documents side by side in rows of LENGTH; none is cut, so what a document copies from is always there.

    -> ids (rows, LENGTH), padded with <pad>
    """
    rows, row = [], []
    for ids in tokenizer(docs)["input_ids"]:
        ids = [*ids, tokenizer.eos_token_id]
        if len(row) + len(ids) > LENGTH:
            rows.append(row + [tokenizer.pad_token_id] * (LENGTH - len(row)))
            row = []
        row += ids
    return torch.tensor(rows)


def batches(tokenizer):
    """Endless batches (ROWS, LENGTH), shard after shard."""
    shard, left = 0, torch.empty(0, LENGTH, dtype=torch.long)
    while True:
        while len(left) < ROWS:
            left = torch.cat([left, pack(world.documents(shard), tokenizer)])
            shard += 1
        yield shard, left[:ROWS]
        left = left[ROWS:]


def loss_of(model, ids):
    labels = ids.masked_fill(ids == model.config.pad_token_id, -100)
    return model(input_ids=ids, labels=labels).loss


@torch.no_grad()
def held_out_loss(model, tokenizer):
    """Mean loss over the packed rows of documents never trained on."""
    model.eval()
    rows = pack(world.documents(world.HELD_OUT_SHARD, HELD_OUT_DOCUMENTS), tokenizer)
    loss = sum(loss_of(model, part).item() * len(part) for part in rows.split(16)) / len(rows)
    model.train()
    return loss


def main(folder=FOLDER, steps=STEPS):
    """-> sentences about failed gates; empty if all is well"""
    tokenizer = decoder_tokenizer(make_bpe())
    model = new_model()
    optimizer = make_optimizer(model, PEAK_LR, beta2=0.95)
    progress, tokens = Progress("decoder"), 0
    stream = batches(tokenizer)
    for step in range(steps):
        shards, ids = next(stream)
        tokens += int((ids != tokenizer.pad_token_id).sum())
        loss = loss_of(model, ids)
        train_step(model, optimizer, loss, learning_rate(step, steps, PEAK_LR))
        if step % 400 == 399:
            scores = probes.run(model, tokenizer, 50)
            progress.report(step + 1, train=loss.item(), held_out=held_out_loss(model, tokenizer), **scores)
            save(model, tokenizer, folder)
    seconds = progress.seconds()
    final = save(model, tokenizer, folder)
    scores = probes.run(final, tokenizer)
    write_record(folder, {
        "held_out_loss": held_out_loss(final, tokenizer), "probes": scores, "gates": probes.GATES,
        "parameters": sum(p.numel() for p in final.parameters()), "steps": steps, "tokens": tokens,
        "seconds": round(seconds), "shards": shards, "peak_learning_rate": PEAK_LR, "batch": [ROWS, LENGTH],
        "history": progress.lines,
    })
    return probes.failures(scores)
