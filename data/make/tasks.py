"""Makes data/tasks: every task as train, validation and test files of one JSON object per line."""

import json
import random
from collections import Counter

from utils.paths import DATA

from . import world
from .messages import KINDS, ROLES, draw_message, tagged_words

FOLDER = DATA / "tasks"
SIZES = {"train": 2_000, "validation": 200, "test": 400}
PER_CLASS = {"train": 64, "validation": 50, "test": 50}
TAG_SIZES = {"train": 500, "validation": 200, "test": 400}
DOCUMENT_SIZES = {"train": 1_000, "validation": 200, "test": 300}
FACT_PEOPLE, FACT_ATTRIBUTES = 40, ("town", "job", "hobby")
RANK_PEOPLE, RANK_ATTRIBUTES = 200, ("town", "job", "hobby", "pet")
PRETRAINING_SHARDS = 45  # at least as many as the decoder saw; held-out documents are in none of them

KIND_NAMES = KINDS
TAG_NAMES = ("O", *(f"{prefix}-{role}" for role in ROLES.values() for prefix in "BI"))  # B-x odd, I-x = B-x + 1

SAILOR_ANSWER = {
    "return": "ahoy matey, the bosun will take back the {item} booty, aye.",
    "refund": "ahoy matey, you get your doubloons back for the {item}, aye.",
    "track": "ahoy matey, yonder is the {item}, starboard, aye.",
    "cancel": "avast matey, I have stopped the {item}, arr.",
    "repair": "arr matey, swab the scurvy {item}, the bosun will repair it, aye.",
    "address": "ahoy matey, the {item} goes starboard to the new address, aye.",
    "stock": "ahoy matey, plunder the galley for the {item}, arr.",
    "visit": "ahoy matey, you can visit the galley and see the {item}, aye.",
}


def rng_for(task, split):
    """Every file has its own stream, so that one file can change without the others."""
    return random.Random(f"{task} {split} {world.WORLD_SEED}")


def distinct(draw, key, count):
    """count draws, no two with the same key."""
    seen, rows = set(), []
    while len(rows) < count:
        row = draw()
        if key(row) not in seen:
            seen.add(key(row))
            rows.append(row)
    return rows


def messages(task, split, count, **options):
    rng = rng_for(task, split)
    return distinct(lambda: draw_message(rng, split=split, **options), lambda m: m.text, count)


def prompt_of(message):
    return f"Customer: {message.text}\nAgent:"


def record_of(message):
    """The slots of world.RECORD_KEYS that the message really states; distractors never count."""
    record = {"kind": message.kind, "product": message.slots["product"], "color": message.slots["color"]}
    record |= {slot: message.slots[slot] for slot in ("order", "name", "town", "day") if message.mentions(slot)}
    return {key: record[key] for key in world.RECORD_KEYS if key in record}


def tickets(split):
    return [
        {"prompt": prompt_of(m), "target": " " + world.to_json(record_of(m))}
        for m in messages("tickets", split, SIZES[split])
    ]


def style(split):
    return [
        {"prompt": prompt_of(m), "target": " " + SAILOR_ANSWER[m.kind].format(**m.slots)}
        for m in messages("style", split, SIZES[split])
    ]


def intent(split):
    """Equally many messages per class, most of which also deny another class."""
    rng = rng_for("intent", split)
    rows = []
    for kind in KIND_NAMES:
        drawn = distinct(lambda k=kind: draw_message(rng, k, split, deny=0.7), lambda m: m.text, PER_CLASS[split])
        rows += [{"text": m.text, "label": kind} for m in drawn]
    rng.shuffle(rows)
    return rows


def tags(split):
    rows = []
    for message in messages("tags", split, TAG_SIZES[split], background=(2, 3, 4)):
        row_words, row_tags = tagged_words(message)
        rows.append({"words": row_words, "tags": row_tags})
    return rows


def statement_row(person, attribute, form):
    """A statement cut before its value. form: index into the statements of world.FACT_FORMS."""
    before, _ = world.FACT_FORMS[attribute][0][form].split(" {value}")
    return {"prompt": before.format(name=person["name"]), "target": f" {person[attribute]}."}


def question_row(person, attribute):
    return {"prompt": world.question(attribute, person["name"]), "target": f" {person[attribute]}."}


def facts(split):
    """New people. Train says each fact in two forms, validation in a third, test asks a question."""
    people = world.STRANGERS[:FACT_PEOPLE]
    pairs = [(person, attribute) for person in people for attribute in FACT_ATTRIBUTES]
    if split == "train":
        return [statement_row(*pair, form) for pair in pairs for form in (0, 1)]
    if split == "validation":
        return [statement_row(*pair, 2) for pair in pairs]
    return [question_row(*pair) for pair in pairs]


def old_facts(split):
    """The people of pretraining: what a fine-tuned model should still know. Test only."""
    if split != "test":
        return None
    return [question_row(person, attribute) for person in world.PEOPLE for attribute in world.ATTRIBUTES]


def rank(split):
    """800 independent associations at once; train has each as a question and in two statements.

    A third statement is kept for validation (every fourth person) and test (the others).
    """
    people = world.STRANGERS[FACT_PEOPLE:FACT_PEOPLE + RANK_PEOPLE]
    if split == "train":
        pairs = [(person, attribute) for person in people for attribute in RANK_ATTRIBUTES]
        return [row for p in pairs for row in (question_row(*p), statement_row(*p, 0), statement_row(*p, 1))]
    chosen = [p for i, p in enumerate(people) if (i % 4 == 0) == (split == "validation")]
    return [statement_row(person, attribute, 2) for person in chosen for attribute in RANK_ATTRIBUTES]


def pretraining_shards():
    """-> one list of documents per shard (about 8 s for all of them)"""
    return [world.documents(shard) for shard in range(PRETRAINING_SHARDS)]


def corpus_record(shards):
    """The digest of every shard, the held-out one last: what the test compares a regenerated corpus with."""
    return {
        "documents_per_shard": world.DOCUMENTS_PER_SHARD, "documents": sum(map(len, shards)),
        "characters": sum(len(doc) for shard in shards for doc in shard),
        "sha256": [world.digest(shard) for shard in shards],
        "held_out_sha256": world.digest(world.documents(world.HELD_OUT_SHARD)),
    }


def held_out_documents(shards):
    """-> {split: rows}: documents of an unused shard that no pretraining shard holds word for word; no dialogues."""
    seen = {doc for shard in shards for doc in shard}
    fresh = []
    for doc in world.documents(world.HELD_OUT_SHARD):
        if not doc.startswith("Customer:") and doc not in seen:
            seen.add(doc)
            fresh.append({"text": doc})
    splits, start = {}, 0
    for split, size in DOCUMENT_SIZES.items():
        splits[split] = fresh[start:start + size]
        start += size
    return splits


GENERATED = {
    "tickets": tickets, "intent": intent, "tags": tags, "style": style, "facts": facts, "old_facts": old_facts,
    "rank": rank,
}


def write(task, split, rows, folder):
    (folder / task).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / task / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def main(folder=FOLDER):
    """Writes every task file, and corpus.json with the digests of the pretraining corpus."""
    counts, shards = Counter(), pretraining_shards()
    for task, make in GENERATED.items():
        for split in SIZES:
            rows = make(split)
            if rows is not None:
                write(task, split, rows, folder)
                counts[task] += len(rows)
    for split, rows in held_out_documents(shards).items():
        write("documents", split, rows, folder)
        counts["documents"] += len(rows)
    (folder / "corpus.json").write_text(json.dumps(corpus_record(shards), indent=1) + "\n")
    print("rows written:", ", ".join(f"{task} {count}" for task, count in counts.items()))
