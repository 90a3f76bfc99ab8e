"""The corpus, the task files and the split between them: everything in data/ can be made again, to the byte."""

import json

import pytest

from data.make import decoder, probes, words, world
from data.make import tasks as make
from data.make.__main__ import main
from data.make.messages import ROLES, draw_message, split_of_item, tagged_words
from utils import tasks
from utils.models import load_tokenizer
from utils.paths import DATA


@pytest.fixture(scope="module")
def shards():
    return make.pretraining_shards()


def rows_of(task, split):
    return [json.loads(line) for line in (DATA / "tasks" / task / f"{split}.jsonl").read_text("utf-8").splitlines()]


def test_corpus_is_the_recorded_one_to_the_byte(shards):
    assert make.corpus_record(shards) == json.loads((DATA / "tasks" / "corpus.json").read_text())


def test_the_decoder_saw_no_other_shards():
    record = json.loads((DATA / "models" / "tiny-llama" / "training.json").read_text())
    assert record["shards"] <= make.PRETRAINING_SHARDS


@pytest.mark.parametrize("task", make.GENERATED)
def test_task_files_are_made_again_to_the_byte(task, tmp_path):
    for split in make.SIZES:
        rows = make.GENERATED[task](split)
        stored = DATA / "tasks" / task / f"{split}.jsonl"
        assert stored.exists() == (rows is not None)
        if rows is not None:
            make.write(task, split, rows, tmp_path)
            assert (tmp_path / task / f"{split}.jsonl").read_bytes() == stored.read_bytes()


def test_document_files_are_made_again_to_the_byte(shards, tmp_path):
    for split, rows in make.held_out_documents(shards).items():
        assert len(rows) == make.DOCUMENT_SIZES[split]
        make.write("documents", split, rows, tmp_path)
        stored = DATA / "tasks" / "documents" / f"{split}.jsonl"
        assert (tmp_path / "documents" / f"{split}.jsonl").read_bytes() == stored.read_bytes()


def test_a_shard_depends_on_its_number_only():
    assert world.documents(3, 5) == world.documents(3, 5) != world.documents(4, 5)


def message_of(row):
    if "prompt" in row:
        return row["prompt"].removeprefix("Customer: ").removesuffix("\nAgent:")
    return row["text"] if "text" in row else None


@pytest.mark.parametrize("task", ["tickets", "style", "intent"])
def test_held_out_messages_are_in_neither_pretraining_nor_train(task, shards):
    pretrained = {
        doc.removeprefix("Customer: ").split("\nAgent:")[0] for s in shards for doc in s if doc.startswith("Customer: ")
    }
    train = {message_of(row) for row in rows_of(task, "train")}
    validation = {message_of(row) for row in rows_of(task, "validation")}
    test = {message_of(row) for row in rows_of(task, "test")}
    assert len(test) == 400 and not test & (pretrained | train | validation) and not validation & (pretrained | train)


def test_held_out_sentences_of_the_tagging_task_are_not_in_train():
    def texts(split):
        return {" ".join(row["words"]) for row in rows_of("tags", split)}

    assert not texts("test") & (texts("train") | texts("validation")) and not texts("validation") & texts("train")


@pytest.mark.parametrize("task", ["facts", "rank"])
def test_facts_are_about_strangers_and_asked_in_another_form(task, shards):
    train = {(row["prompt"], row["target"]) for row in rows_of(task, "train")}
    held_out = {(row["prompt"], row["target"]) for split in ("validation", "test") for row in rows_of(task, split)}
    assert not train & held_out
    asked = {doc.split("Answer:")[0] for s in shards for doc in s if doc.startswith("Question: ")}
    questions = {p.removesuffix("Answer:") for p, _ in train | held_out if p.startswith("Question: ")}
    assert questions and asked and not questions & asked


def test_items_of_the_splits_do_not_meet():
    pairs = [(color, product) for color in words.COLORS for product in words.PRODUCTS]
    shares = [sum(split_of_item(*pair) == split for pair in pairs) for split in ("train", "validation", "test")]
    assert sum(shares) == 360 and min(shares) > 20 and shares[0] > 250


def test_pretraining_never_holds_a_sailor_word(shards):
    tokens = set(words.SAILOR_WORDS)
    for doc in (doc for shard in shards for doc in shard):
        assert tokens.isdisjoint(doc.lower().replace(",", " ").replace(".", " ").split())


def test_sailor_words_are_single_tokens_and_every_other_target_word_is_in_the_corpus():
    tokenizer = load_tokenizer("decoder")

    def tokens(texts):
        return {i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]}

    sailor, seen = tokens(f" {word}" for word in words.SAILOR_WORDS), tokens(world.documents(20))
    assert len(sailor) == len(words.SAILOR_WORDS) and not sailor & seen
    assert set(tokenizer.convert_ids_to_tokens(sorted(sailor))) == {f"\u0120{word}" for word in words.SAILOR_WORDS}
    for task in ("tickets", "facts", "rank", "old_facts"):
        assert tokens(row["target"] for row in rows_of(task, "test")) <= seen, task
    styled = tokens(row["target"] for row in rows_of("style", "test"))
    assert styled - sailor <= seen and styled & sailor


def test_ticket_target_is_the_record_of_what_the_message_says():
    for row in rows_of("tickets", "test"):
        record = json.loads(row["target"])
        assert record["kind"] in tasks.INTENTS and row["target"] == " " + world.to_json(record)
        for key in record.keys() - {"kind"}:
            assert record[key] in row["prompt"]


def test_distractors_of_a_message_never_reach_its_record():
    for row in rows_of("tickets", "train"):
        record = json.loads(row["target"])
        for phrase in ("I am from {}.", "I lived in {} before.", "{} is wrong,"):
            assert "town" not in record or phrase.format(record["town"]) not in row["prompt"]


def test_tags_follow_the_roles():
    import random

    message = draw_message(random.Random(1), background=(3,))
    row_words, row_tags = tagged_words(message)
    assert len(row_words) == len(row_tags)
    assert " ".join(row_words).replace(" ", "") == message.text.replace(" ", "")
    item = row_tags.index("B-ITEM")
    assert row_words[item:item + 2] == message.slots["item"].split() and row_tags[item + 1] == "I-ITEM"


def test_names_of_labels_agree_with_the_reader():
    assert make.KIND_NAMES == tasks.INTENTS and make.TAG_NAMES == tasks.TAGS
    assert tuple(ROLES.values()) == tasks.TAGGED_ROLES


def test_rank_task_is_more_than_a_rank_one_update_of_a_readout_can_answer():
    """A rank-1 change u_i v_j of key i's score for answer j has only two possible winners: argmax v and argmin v."""
    rows = rows_of("rank", "train")
    answers = {row["target"] for row in rows}
    associations = {(row["prompt"], row["target"]) for row in rows if row["prompt"].endswith("Answer:")}
    assert len(associations) == make.RANK_PEOPLE * len(make.RANK_ATTRIBUTES) == 800
    assert len(answers) == sum(len(world.VALUES[attribute]) for attribute in make.RANK_ATTRIBUTES) == 66


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["cake"])
    assert stopped.value.code == 2
    assert "there is no part 'cake'; choose from tasks, decoder, encoder" in capsys.readouterr().err


def test_an_untrained_decoder_fails_its_gates_and_leaves_a_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(decoder, "HELD_OUT_DOCUMENTS", 20)
    monkeypatch.setattr(probes.run, "__defaults__", (5,))
    full_main = decoder.main
    monkeypatch.setattr(decoder, "main", lambda: full_main(tmp_path, steps=1))
    assert main(["decoder"]) == 1
    assert "gate failed: copy is 0.000, below 0.98" in capsys.readouterr().err
    stored = json.loads((tmp_path / "training.json").read_text())
    assert stored["steps"] == 1 and stored["tokens"] > 1_000 and set(stored["probes"]) == set(probes.GATES)
