"""Task files as data sets, collate, and evaluate on cases whose answers can be worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from utils import tasks
from utils.models import load_tokenizer
from utils.tasks import TASKS, collate, evaluate, load_task, spans


@pytest.fixture(scope="module")
def decoder_tokenizer():
    return load_tokenizer("decoder")


@pytest.fixture(scope="module")
def encoder_tokenizer():
    return load_tokenizer("encoder")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_loads(name):
    loaded = load_task(name)
    assert set(loaded) == ({"test"} if name == "old_facts" else {"train", "validation", "test"})
    assert all(len(split) > 0 for split in loaded.values())
    columns = {"intent": ["text", "label"], "tags": ["words", "tags"], "documents": ["text"]}
    assert loaded["test"].column_names == columns.get(name, ["prompt", "target"])


def test_labels_have_names_and_are_balanced():
    train = load_task("intent")["train"]
    assert train.features["label"].names == list(tasks.INTENTS)
    assert [train["label"].count(i) for i in range(8)] == [64] * 8
    assert load_task("tags")["test"].features["tags"].feature.names == list(tasks.TAGS)


@pytest.mark.parametrize(("name", "profile", "sentence"), [
    ("tickets", "huge", "no profile 'huge'; choose one of tiny, colab, gpu"),
    ("chess", "tiny", "no task 'chess'; choose one of tickets"),
    ("instructions", "tiny", "needs profile 'colab' or 'gpu'"),
])
def test_unknown_names(name, profile, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_task(name, profile)


@pytest.mark.parametrize("name", ["intent", "instructions"])
def test_hub_tasks_without_a_network_say_so_in_one_sentence(name, monkeypatch):
    monkeypatch.setattr(tasks, "hub_reachable", lambda: False)
    with pytest.raises(OSError, match="^the data set .* needs the hub, which cannot be reached: use profile='tiny'"):
        load_task(name, "colab")


def test_synthetic_tasks_are_the_same_in_every_profile():
    assert load_task("facts", "gpu")["test"][0] == load_task("facts")["test"][0]


def test_banking77_is_split_by_class(monkeypatch):
    import datasets

    def rows(count):
        return datasets.Dataset.from_dict({
            "text": [f"question {i}" for i in range(count)], "label": [i % 3 for i in range(count)],
            "label_text": ["abc"[i % 3] for i in range(count)],
        })

    monkeypatch.setattr(tasks, "_from_hub", lambda name: datasets.DatasetDict(train=rows(3_000), test=rows(30)))
    loaded, again = load_task("intent", "colab"), load_task("intent", "colab")
    assert {k: len(v) for k, v in loaded.items()} == {"train": 2_000, "validation": 1_000, "test": 30}
    assert loaded["train"].features["label"].names == ["a", "b", "c"]
    assert loaded["validation"]["text"][:] == again["validation"]["text"][:]
    assert abs(loaded["validation"]["label"].count(0) - 333) <= 1


def test_dolly_becomes_prompts_and_targets(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({
        "instruction": [f"Say {i}." for i in range(1_200)], "context": ["", "It is late."] * 600,
        "response": [" ok "] * 1_199 + ["x" * 3_000], "category": ["qa"] * 1_200,
    })
    monkeypatch.setattr(tasks, "_from_hub", lambda name: datasets.DatasetDict(train=rows))
    loaded = load_task("instructions", "gpu")
    assert {k: len(v) for k, v in loaded.items()} == {"train": 199, "validation": 500, "test": 500}
    row = next(r for r in loaded["train"] if "late" in r["prompt"])
    assert row["prompt"].endswith(".\n\nIt is late.\n\nAnswer:") and row["target"] == " ok"


def test_collate_generation_masks_prompt_and_padding(decoder_tokenizer):
    rows = [{"prompt": "red", "target": " blue"}, {"prompt": "red", "target": " blue green"}]
    red, blue, green = (decoder_tokenizer(w, add_special_tokens=False)["input_ids"] for w in ("red", " blue", " green"))
    assert [len(ids) for ids in (red, blue, green)] == [1, 1, 1]
    batch = collate(rows, decoder_tokenizer)
    bos, eos, pad = 1, 2, 0
    assert batch["input_ids"].tolist() == [[bos, *red, *blue, eos, pad], [bos, *red, *blue, *green, eos]]
    assert batch["labels"].tolist() == [[-100, -100, *blue, eos, -100], [-100, -100, *blue, *green, eos]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_collate_documents_scores_every_token_but_padding(decoder_tokenizer):
    batch = collate([{"text": "red"}, {"text": "red blue"}], decoder_tokenizer)
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["attention_mask"] == 1])


def test_collate_classification(encoder_tokenizer):
    batch = collate([{"text": "red", "label": 3}, {"text": "red blue", "label": 0}], encoder_tokenizer)
    assert batch["labels"].tolist() == [3, 0] and batch["input_ids"].shape == (2, 4)
    assert batch["input_ids"][:, 0].tolist() == [3, 3] and batch["attention_mask"].sum(1).tolist() == [3, 4]


def test_collate_tagging_puts_the_tag_on_the_first_piece(encoder_tokenizer):
    batch = collate([{"words": ["red", "4821", "."], "tags": [1, 5, 0]}], encoder_tokenizer)
    # [CLS] red, space, 4, 8, 2, 1, full stop, [SEP]: the space before a number is a token of its own
    assert batch["labels"].tolist() == [[-100, 1, 5, -100, -100, -100, -100, 0, -100]]
    assert batch["input_ids"].shape == batch["labels"].shape


@pytest.mark.parametrize("rows", [[], [{"question": "?"}]])
def test_collate_refuses_what_it_does_not_know(rows, decoder_tokenizer):
    with pytest.raises(ValueError, match="no rows|a row has the columns"):
        collate(rows, decoder_tokenizer)


class Parrot(torch.nn.Module):
    """Gives token t+1 of the input probability p, and spreads the rest evenly over the other tokens."""

    def __init__(self, p, size, wrong=()):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.tensor(math.log(p * (size - 1) / (1 - p))))
        self.size, self.wrong = size, wrong

    def forward(self, input_ids, attention_mask):
        following = input_ids.roll(-1, 1)
        for token in self.wrong:  # says another token instead of these
            following = torch.where(following == token, token + 1, following)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, self.size) * self.logit)


def test_evaluate_generation_by_hand(decoder_tokenizer):
    rows = [{"prompt": "red", "target": " blue"}, {"prompt": "red", "target": " blue green"}]
    scores = evaluate(Parrot(0.5, 2048), rows, decoder_tokenizer)
    assert scores["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert scores["exact_match"] == 1 and scores["token_accuracy"] == 1
    green = decoder_tokenizer(" green", add_special_tokens=False)["input_ids"][0]
    scores = evaluate(Parrot(0.5, 2048, wrong=[green]), rows, decoder_tokenizer, batch_size=1)
    # 5 target tokens with both ends of sequence; the only wrong one is in the second row
    assert scores["exact_match"] == 0.5 and scores["token_accuracy"] == 0.8


def test_evaluate_documents_by_hand(decoder_tokenizer):
    scores = evaluate(Parrot(0.25, 2048), [{"text": "red"}, {"text": "red blue"}], decoder_tokenizer)
    assert scores == {"loss": pytest.approx(math.log(4), rel=1e-4)}


class Fixed(torch.nn.Module):
    """Always the same logits, whatever it reads."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.logits[:len(input_ids)])


def test_evaluate_classification_by_hand(encoder_tokenizer):
    rows = [{"text": "red", "label": 0}, {"text": "red blue", "label": 1}, {"text": "red blue green", "label": 1}]
    model = Fixed(torch.tensor([0.0, math.log(3)]).repeat(3, 1)).train()  # class 1 with probability 3/4, always
    scores = evaluate(model, rows, encoder_tokenizer)
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["loss"] == pytest.approx((math.log(4) + 2 * math.log(4 / 3)) / 3)
    assert model.training


def test_evaluate_tagging_by_hand(encoder_tokenizer):
    rows = [{"words": ["red", "blue", "green"], "tags": [1, 2, 3]}]  # two spans
    guess = torch.tensor([0, 1, 2, 5, 0])  # with [CLS] and [SEP]; the first span is right, the second has another role
    scores = evaluate(Fixed(torch.nn.functional.one_hot(guess, 7)[None] * 1.0), rows, encoder_tokenizer)
    assert scores["f1"] == pytest.approx(2 * 1 / (2 + 2))


@pytest.mark.parametrize(("tags", "expected"), [
    ([0, 0], set()),
    ([1, 2, 0, 3], {(0, 1, 1), (3, 3, 3)}),
    ([1, 1, 2], {(0, 0, 1), (1, 2, 1)}),
    ([2, 0, 4], set()),  # an inside tag that continues nothing
    ([1, 4, 2], {(0, 0, 1)}),
])
def test_spans(tags, expected):
    assert spans(tags) == expected


def test_evaluate_needs_rows(decoder_tokenizer):
    with pytest.raises(ValueError, match="no rows"):
        evaluate(Parrot(0.5, 2048), [], decoder_tokenizer)


def test_batch_size_does_not_change_the_scores():
    from utils.models import load_base

    rows, tokenizer = list(load_task("facts")["test"])[:20], load_tokenizer("decoder")
    model = load_base("decoder")
    one, all_at_once = (evaluate(model, rows, tokenizer, batch_size=b) for b in (3, 64))
    assert one["loss"] == pytest.approx(all_at_once["loss"], rel=1e-4)
