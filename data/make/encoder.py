"""Pretrains data/models/tiny-bert: masked words, and which reply belongs to which message (through the pooler)."""

import re

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForPreTraining

from utils.paths import DATA

from . import world
from .tokenizer import SPECIAL, VOCAB_SIZE, encoder_tokenizer, make_bpe
from .training import Progress, learning_rate, make_optimizer, save, train_step, write_record

FOLDER = DATA / "models" / "tiny-bert"
STEPS, PAIRS, PEAK_LR = 4_000, 32, 1.5e-3
MASKED, PAIR_WEIGHT, TEMPERATURE, LONGEST = 0.2, 0.3, 0.07, 96
MASK = SPECIAL.index("[MASK]")
HELD_OUT_DOCUMENTS = 640
GATES = {"masked_word_loss": 1.3, "pair_loss": 0.9}


def new_model(seed=0):
    torch.manual_seed(seed)
    return BertForPreTraining(BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=128, num_hidden_layers=4, intermediate_size=512, num_attention_heads=4,
        max_position_embeddings=128, type_vocab_size=2, pad_token_id=0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ))


def split_document(document):
    """A document as two parts that belong together; a dialogue as message and reply."""
    if document.startswith("Customer: "):
        return tuple(document.removeprefix("Customer: ").split("\nAgent: "))
    for mark in ("\nRecord:", "\nAnswer:", " ; ", "\n"):
        if mark in document:
            first, second = document.split(mark, 1)
            return first, second.strip()
    sentences = re.split(r"(?<=[.?]) ", document)
    middle = max(1, len(sentences) // 2)
    return " ".join(sentences[:middle]), " ".join(sentences[middle:]) or document


def token_pairs(docs, tokenizer):
    """-> list of (ids of the first part, ids of the second), shortest first, so that a batch needs little padding"""
    pairs = [split_document(d) for d in docs]
    first, second = (
        tokenizer([pair[side] for pair in pairs], truncation=True, max_length=LONGEST)["input_ids"] for side in (0, 1)
    )
    return sorted(zip(first, second, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))


def mask_words(sequences, generator):
    """Pads and masks. -> ids (B, L) with masks in, attention mask (B, L), labels (B, L) that are -100 elsewhere"""
    length = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (length - len(s)) for s in sequences])
    chosen = (torch.rand(ids.shape, generator=generator) < MASKED) & (ids >= len(SPECIAL))
    labels = ids.masked_fill(~chosen, -100)
    fate = torch.rand(ids.shape, generator=generator)  # 80 % masked, 10 % a random token, 10 % left as they are
    random_ids = torch.randint(len(SPECIAL), VOCAB_SIZE, ids.shape, generator=generator)
    masked = torch.where(chosen & (fate < 0.8), MASK, ids)
    return torch.where(chosen & (fate >= 0.9), random_ids, masked), (ids != 0).long(), labels


def losses(model, pairs, generator):
    """-> (cross-entropy of masked words, InfoNCE of the pairs within the batch)"""
    hidden, targets, pooled = [], [], []
    for side in (0, 1):
        ids, attention, labels = mask_words([pair[side] for pair in pairs], generator)
        out = model.bert(ids, attention)
        hidden.append(out.last_hidden_state[labels != -100])  # (masked, 128)
        targets.append(labels[labels != -100])
        pooled.append(F.normalize(out.pooler_output, dim=-1))  # (B, 128)
    words_loss = F.cross_entropy(model.cls.predictions(torch.cat(hidden)), torch.cat(targets))
    similarity = pooled[0] @ pooled[1].T / TEMPERATURE  # (B, B)
    own = torch.arange(len(pairs))
    return words_loss, (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


def draw_pairs(pairs, generator):
    """PAIRS pairs of similar length, out of a window eight times as wide so that a batch still varies."""
    start = int(torch.randint(0, len(pairs) - 8 * PAIRS, (1,), generator=generator))
    return [pairs[start + i] for i in torch.randperm(8 * PAIRS, generator=generator)[:PAIRS].tolist()]


@torch.no_grad()
def held_out_losses(model, tokenizer):
    """Both losses on documents never trained on, always with the same masks."""
    model.eval()
    generator = torch.Generator().manual_seed(7)
    pairs = token_pairs(world.documents(world.HELD_OUT_SHARD, HELD_OUT_DOCUMENTS), tokenizer)
    parts = [losses(model, pairs[i:i + PAIRS], generator) for i in range(0, len(pairs), PAIRS)]
    model.train()
    return {name: sum(p[i].item() for p in parts) / len(parts) for i, name in enumerate(GATES)}


def main(folder=FOLDER, steps=STEPS):
    """-> sentences about failed gates; empty if all is well"""
    tokenizer = encoder_tokenizer(make_bpe())
    model = new_model()
    optimizer = make_optimizer(model, PEAK_LR, beta2=0.98)
    generator = torch.Generator().manual_seed(0)
    progress, per_shard = Progress("encoder"), 250
    for step in range(steps):
        if step % per_shard == 0:
            # only shards of the later mix: the encoder has no copying to learn
            pairs = token_pairs(world.documents(world.EARLY_SHARDS + step // per_shard), tokenizer)
        words_loss, pair_loss = losses(model, draw_pairs(pairs, generator), generator)
        train_step(model, optimizer, words_loss + PAIR_WEIGHT * pair_loss, learning_rate(step, steps, PEAK_LR))
        if step % per_shard == per_shard - 1:
            progress.report(step + 1, train=words_loss.item(), **held_out_losses(model, tokenizer))
            save(model, tokenizer, folder)
    seconds = progress.seconds()
    final = save(model, tokenizer, folder)
    scores = held_out_losses(final, tokenizer)
    write_record(folder, {
        **scores, "gates": GATES, "parameters": sum(p.numel() for p in final.parameters()), "steps": steps,
        "seconds": round(seconds), "peak_learning_rate": PEAK_LR, "pairs_per_batch": PAIRS, "history": progress.lines,
    })
    return [f"{name} is {scores[name]:.3f}, above {gate}" for name, gate in GATES.items() if scores[name] > gate]
