"""Tasks: rows to train on, how they become tensors, and how a model is scored on them.

The kind of a task shows in its columns:
    generation      {"prompt": str, "target": str}
    classification  {"text": str, "label": int}
    tagging         {"words": list of str, "tags": list of int}   0 = O, odd = B-x, the next even = I-x
    documents       {"text": str}
data/tasks/README.md describes every task.
"""

import json

import torch
from torch.nn import functional as F

from .models import PROFILES, hub_reachable
from .paths import DATA

TASKS = ("tickets", "intent", "tags", "style", "facts", "old_facts", "rank", "documents")
SPLITS = ("train", "validation", "test")
INTENTS = ("return", "refund", "track", "cancel", "repair", "address", "stock", "visit")
TAGGED_ROLES = (
    "ITEM", "OTHERITEM", "ORDER", "OLDORDER", "NAME", "FRIEND", "SHIPTO", "ORIGIN", "DAY", "PASTDAY",
)
TAGS = ("O", *(f"{prefix}-{role}" for role in TAGGED_ROLES for prefix in "BI"))


def load_task(name, profile="tiny"):
    """-> datasets.DatasetDict with train, validation and test ("old_facts": test only).

    Every profile reads the task files in data/tasks, except that "colab" and "gpu" take "intent" from banking77 and
    know one more task, "instructions" (databricks-dolly-15k). Raises ValueError for an unknown name or profile and
    OSError if the hub is needed and does not answer.
    """
    if profile not in PROFILES:
        raise ValueError(f"there is no profile {profile!r}; choose one of {', '.join(PROFILES)}")
    if profile != "tiny" and name in _FROM_HUB:
        return _FROM_HUB[name]()
    if name in _FROM_HUB and name not in TASKS:
        raise ValueError(f"{name!r} comes from the hub, so it needs profile 'colab' or 'gpu'")
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")
    import datasets

    splits = {}
    for split in SPLITS:
        path = DATA / "tasks" / name / f"{split}.jsonl"
        if path.exists():
            with path.open(encoding="utf-8") as lines:
                splits[split] = datasets.Dataset.from_list([json.loads(line) for line in lines], _features(name))
    return datasets.DatasetDict(splits)


def _features(name):
    """Column types where they cannot be guessed: labels and tags are stored by name and read as numbers."""
    from datasets import ClassLabel, Features, List, Value

    if name == "intent":
        return Features({"text": Value("string"), "label": ClassLabel(names=list(INTENTS))})
    if name == "tags":
        return Features({"words": List(Value("string")), "tags": List(ClassLabel(names=list(TAGS)))})
    return None


def _from_hub(name):
    import datasets
    from huggingface_hub import constants

    sentence = f"the data set {name} needs the hub, which cannot be reached: use profile='tiny', or run with a network"
    if not constants.HF_HUB_OFFLINE and not hub_reachable():
        raise OSError(sentence)
    try:
        return datasets.load_dataset(name)
    except ConnectionError:  # offline, and not in the cache
        raise OSError(sentence) from None


def _banking77():
    """Bank customers' questions, 77 classes: 1,000 of the training rows become the validation split."""
    import datasets

    loaded = _from_hub("mteb/banking77")
    names = dict(zip(loaded["test"]["label"], loaded["test"]["label_text"], strict=True))
    features = datasets.Features({
        "text": datasets.Value("string"), "label": datasets.ClassLabel(names=[names[i] for i in sorted(names)]),
    })
    loaded = loaded.select_columns(["text", "label"]).cast(features)
    parts = loaded["train"].train_test_split(test_size=1_000, seed=0, stratify_by_column="label")
    return datasets.DatasetDict(train=parts["train"], validation=parts["test"], test=loaded["test"])


def _dolly(longest=2_000):
    """Instructions and answers written by people; rows of more than `longest` characters are left out."""
    import datasets

    rows = _from_hub("databricks/databricks-dolly-15k")["train"]
    rows = rows.map(_dolly_row, remove_columns=rows.column_names)
    rows = rows.filter(lambda row: len(row["prompt"]) + len(row["target"]) <= longest).shuffle(seed=0)
    return datasets.DatasetDict(
        test=rows.select(range(500)), validation=rows.select(range(500, 1_000)),
        train=rows.select(range(1_000, len(rows))),
    )


def _dolly_row(row):
    context = f"\n\n{row['context']}" if row["context"] else ""
    return {"prompt": f"Instruction: {row['instruction']}{context}\n\nAnswer:", "target": f" {row['response'].strip()}"}


_FROM_HUB = {"intent": _banking77, "instructions": _dolly}


def kind_of(row):
    """"generation", "classification", "tagging" or "documents", by the columns of one row."""
    columns = set(row)
    for kind, needed in (
        ("generation", {"prompt", "target"}), ("classification", {"text", "label"}), ("tagging", {"words", "tags"}),
        ("documents", {"text"}),
    ):
        if needed <= columns:
            return kind
    raise ValueError(
        f"a row has the columns {sorted(columns)}, but needs prompt and target, text and label, words and tags, or text"
    )


def collate(rows, tokenizer):
    """Rows (dicts of one kind) -> {"input_ids", "attention_mask", "labels"}, padded on the right.

    labels are (B,) for classification, else (B, L) with -100 on prompts, padding and all but the first token of a
    word. A target and a document end with the end-of-sequence token.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("there are no rows to collate")
    kind = kind_of(rows[0])
    encoded = [_ENCODE[kind](row, tokenizer) for row in rows]
    length = max(len(ids) for ids, _ in encoded)
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)  # (B, L)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)  # (B, L)
    for i, (ids, _) in enumerate(encoded):
        input_ids[i, :len(ids)] = torch.tensor(ids)
        attention_mask[i, :len(ids)] = 1
    if kind == "classification":
        labels = torch.tensor([label for _, label in encoded])  # (B,)
    else:
        labels = torch.full((len(rows), length), -100)  # (B, L)
        for i, (_, row_labels) in enumerate(encoded):
            labels[i, :len(row_labels)] = torch.tensor(row_labels)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _ids(text, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _start(tokenizer):
    """The begin-of-sequence token, for tokenizers that have one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _encode_generation(row, tokenizer):
    prompt = _start(tokenizer) + _ids(row["prompt"], tokenizer)
    target = [*_ids(row["target"], tokenizer), tokenizer.eos_token_id]
    return prompt + target, [-100] * len(prompt) + target


def _encode_classification(row, tokenizer):
    return tokenizer(row["text"], truncation=True)["input_ids"], row["label"]


def _encode_tagging(row, tokenizer):
    """A word is written as it stands in running text (with its space); its first token carries the tag."""
    ids, labels = [tokenizer.cls_token_id], [-100]
    for position, (word, tag) in enumerate(zip(row["words"], row["tags"], strict=True)):
        pieces = _ids(f" {word}" if position and word.isalnum() else word, tokenizer)
        ids += pieces
        labels += [tag] + [-100] * (len(pieces) - 1)
    return [*ids, tokenizer.sep_token_id], [*labels, -100]


def _encode_document(row, tokenizer):
    ids = [*_start(tokenizer), *_ids(row["text"], tokenizer), tokenizer.eos_token_id]
    return ids, ids


_ENCODE = {
    "generation": _encode_generation, "classification": _encode_classification, "tagging": _encode_tagging,
    "documents": _encode_document,
}


@torch.no_grad()
def evaluate(model, rows, tokenizer, batch_size=64):
    """Scores a model on rows (a Dataset or a list of dicts). The model's train/eval mode is left as it was.

    generation      loss per target token, exact_match (every target token is the most likely one, which is when
                    greedy decoding gives exactly the target), token_accuracy
    classification  loss per row, accuracy
    tagging         loss per word, f1 over whole tagged spans (role and both ends right)
    documents       loss per token
    """
    rows = list(rows)
    if not rows:
        raise ValueError("there are no rows to evaluate on")
    kind = kind_of(rows[0])
    length = {"tagging": lambda row: len(row["words"])}.get(kind, lambda row: sum(len(str(v)) for v in row.values()))
    rows.sort(key=length)  # rows of like length share a batch, so little is computed for padding
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    totals = {}
    try:
        for start in range(0, len(rows), batch_size):
            batch = {k: v.to(device) for k, v in collate(rows[start:start + batch_size], tokenizer).items()}
            labels = batch.pop("labels")
            for name, value in _COUNT[kind](model(**batch).logits, labels).items():
                totals[name] = totals.get(name, 0) + value
    finally:
        model.train(was_training)
    scores = {"loss": totals["loss"] / totals["count"]}
    if kind == "generation":
        scores |= {"exact_match": totals["exact"] / len(rows), "token_accuracy": totals["right"] / totals["count"]}
    elif kind == "classification":
        scores["accuracy"] = totals["right"] / totals["count"]
    elif kind == "tagging":
        scores["f1"] = 2 * totals["common"] / max(1, totals["found"] + totals["expected"])
    return scores


def _count_text(logits, labels):
    """Next-token counts. logits (B, L, V) or, with virtual tokens in front, longer; labels (B, L)."""
    logits = logits[:, -labels.shape[1]:][:, :-1]  # (B, L-1, V): position t predicts token t+1
    labels = labels[:, 1:]  # (B, L-1)
    scored = labels != -100
    right = logits.argmax(-1) == labels
    return {
        "loss": F.cross_entropy(logits[scored].float(), labels[scored], reduction="sum").item(),
        "count": int(scored.sum()),
        "right": int((right & scored).sum()),
        "exact": int((right | ~scored).all(1).sum()),
    }


def _count_classes(logits, labels):
    """logits (B, C), labels (B,)"""
    return {
        "loss": F.cross_entropy(logits.float(), labels, reduction="sum").item(),
        "count": len(labels),
        "right": int((logits.argmax(-1) == labels).sum()),
    }


def _count_spans(logits, labels):
    """logits (B, L, T), labels (B, L)"""
    scored = labels != -100
    counts = {
        "loss": F.cross_entropy(logits[scored].float(), labels[scored], reduction="sum").item(),
        "count": int(scored.sum()), "common": 0, "found": 0, "expected": 0,
    }
    for guess, truth, row in zip(logits.argmax(-1), labels, scored, strict=True):
        found, expected = spans(guess[row].tolist()), spans(truth[row].tolist())
        counts["common"] += len(found & expected)
        counts["found"] += len(found)
        counts["expected"] += len(expected)
    return counts


def spans(tags):
    """Tag numbers of one sentence -> set of (first word, last word, number of the B tag).

    A span starts at a B tag and goes on over its own I tag; an I tag that continues nothing is ignored.
    """
    found, open_span = set(), None
    for position, tag in enumerate([*tags, 0]):
        if open_span and tag != open_span[1] + 1:
            found.add((open_span[0], position - 1, open_span[1]))
            open_span = None
        if tag % 2 == 1:
            open_span = (position, tag)
    return found


_COUNT = {
    "generation": _count_text, "documents": _count_text, "classification": _count_classes, "tagging": _count_spans,
}
