"""The invented world and the seeded generator of pretraining documents (standard library only).

`documents(shard)` gives DOCUMENTS_PER_SHARD documents that depend on the shard's number alone, so any part of the
corpus can be made again, to the byte, without the rest. The corpus itself is never stored.
"""

import hashlib
import json
import random

from . import words
from .messages import KINDS, draw_item, draw_message, draw_reply, full_name

WORLD_SEED = 20
DOCUMENTS_PER_SHARD = 10_000
HELD_OUT_SHARD = 9_999  # never trained on
KNOWN_PEOPLE, NEW_PEOPLE = 60, 300

# attribute -> (statements that end in the value, question)
FACT_FORMS = {
    "town": (
        ("{name} lives in {value}.", "The home of {name} is in {value}.", "{name} has a house in {value}."),
        "Where does {name} live?",
    ),
    "job": (
        ("{name} works as a {value}.", "The job of {name} is {value}.", "By trade {name} is a {value}."),
        "What is the job of {name}?",
    ),
    "hobby": (
        ("{name} enjoys {value}.", "The hobby of {name} is {value}.", "On free days {name} goes for {value}."),
        "What is the hobby of {name}?",
    ),
    "pet": (
        ("{name} has a {value}.", "The pet of {name} is a {value}.", "At home {name} keeps a {value}."),
        "Which pet does {name} have?",
    ),
    "food": (
        ("{name} likes to eat {value}.", "The best food for {name} is {value}.", "{name} often cooks {value}."),
        "What does {name} like to eat?",
    ),
}
ATTRIBUTES = tuple(FACT_FORMS)
VALUES = {
    "town": words.TOWNS, "job": words.JOBS, "hobby": words.HOBBIES, "pet": words.PETS, "food": words.FOODS,
}


def question(attribute, name):
    """The prompt form whose document ends right after the answer."""
    return f"Question: {FACT_FORMS[attribute][1].format(name=name)}\nAnswer:"


def make_people():
    """-> (known people, new people): dicts of a name and one value per attribute. Values are drawn independently."""
    rng = random.Random(WORLD_SEED)
    names = [f"{first} {last}" for first in words.FIRST_NAMES for last in words.LAST_NAMES]
    rng.shuffle(names)
    people = [
        {"name": name, **{attribute: rng.choice(VALUES[attribute]) for attribute in ATTRIBUTES}}
        for name in names[: KNOWN_PEOPLE + NEW_PEOPLE]
    ]
    return people[:KNOWN_PEOPLE], people[KNOWN_PEOPLE:]


def make_places():
    rng = random.Random(WORLD_SEED + 1)
    return {
        town: {
            "region": rng.choice(words.REGIONS), "river": rng.choice(words.RIVERS),
            "craft": rng.choice(words.MATERIALS), "near": rng.choice([t for t in words.TOWNS if t != town]),
        }
        for town in words.TOWNS
    }


def make_goods():
    rng = random.Random(WORLD_SEED + 2)
    return {p: {"material": rng.choice(words.MATERIALS), "price": rng.randint(5, 99)} for p in words.PRODUCTS}


PEOPLE, STRANGERS = make_people()
PLACES = make_places()
GOODS = make_goods()


def to_json(record):
    return json.dumps(record, separators=(",", ":"))


def person_document(rng):
    person = rng.choice(PEOPLE)
    chosen = rng.sample(ATTRIBUTES, rng.randint(2, 5))
    return " ".join(rng.choice(FACT_FORMS[a][0]).format(name=person["name"], value=person[a]) for a in chosen)


def question_document(rng):
    person, attribute = rng.choice(PEOPLE), rng.choice(ATTRIBUTES)
    return f"{question(attribute, person['name'])} {person[attribute]}."


def place_document(rng):
    town = rng.choice(words.TOWNS)
    place = PLACES[town]
    sentences = [
        f"{town} lies in {place['region']}.", f"The river {place['river']} flows through {town}.",
        f"{town} makes things of {place['craft']}.", f"From {town} it is not far to {place['near']}.",
    ]
    return " ".join(rng.sample(sentences, rng.randint(2, 4)))


def goods_document(rng):
    product = rng.choice(words.PRODUCTS)
    color = draw_item(rng)[0]
    sentences = [
        f"The {product} is made of {GOODS[product]['material']}.",
        f"For the {product} you pay {GOODS[product]['price']}.",
        f"We sell the {product} in all colours.", f"Some like {color} more than {rng.choice(words.COLORS)}.",
    ]
    return " ".join(rng.sample(sentences, rng.randint(2, 4)))


def number_document(rng):
    lines = []
    for _ in range(rng.randint(2, 4)):
        large, small = sorted((rng.randint(0, 10), rng.randint(0, 10)), reverse=True)
        name = rng.choice(words.FIRST_NAMES)
        lines.append(rng.choice((
            f"{large} + {small} = {large + small}.",
            f"{large} - {small} = {large - small}.",
            f"{words.NUMBERS[large]} and {words.NUMBERS[small]} make {words.NUMBERS[large + small]}.",
            f"After {large + small} comes {large + small + 1}.",
            f"{name} had {large} coins and lost {small}. Now {name} has {large - small}.",
        )))
    return " ".join(lines)


def list_document(rng):
    form = rng.randrange(4)
    if form == 0:
        start = rng.randrange(7)
        return "The days are " + ", ".join(words.DAYS[(start + step) % 7] for step in range(5)) + "."
    if form == 1:
        goods = rng.sample(words.PRODUCTS, rng.randint(2, 4))
        return f"On the table: {', '.join(goods)}. The first is the {goods[0]}, the last is the {goods[-1]}."
    if form == 2:
        colors = rng.sample(words.COLORS, 3)
        return f"{', '.join(colors)}. Backwards: {', '.join(reversed(colors))}."
    person = rng.choice(PEOPLE)
    chosen = rng.sample(ATTRIBUTES, rng.randint(2, 4))
    style, separator = rng.choice(("{}: {}", "{} = {}", "[{}] {}", "<{}> {}")), rng.choice(("; ", " | ", "\n", ", "))
    return separator.join(style.format(key, person[key]) for key in ("name", *chosen))


def story_document(rng):
    name, animal, thing = rng.choice(words.FIRST_NAMES), rng.choice(words.ANIMALS), rng.choice(words.THINGS)
    color, day = rng.choice(words.COLORS), rng.choice(words.DAYS)
    here, there = rng.sample(words.PLACES, 2)
    start = rng.choice((
        f"On {day} {name} went to the {here}.", f"{name} was at the {here}. It was {day}.",
        f"One {day} {name} walked through the {here}.",
    ))
    find = rng.choice((
        f"{name} had a {color} {thing}.", f"There lay a {color} {thing}.", f"{name} saw a {color} {thing}.",
    ))
    wish = rng.choice((f"A {animal} came and wanted the {thing}.", f'"I would like the {thing}," said a {animal}.'))
    end = rng.choice((
        f"{name} gave it to the {animal}. The {animal} was happy and took the {thing} to the {there}.",
        f"{name} said no and kept the {thing}. The {animal} was sad and ran to the {there}.",
    ))
    return f"{start} {find} {wish} {end}"


PRAISE = ("I like the {p}.", "The {p} works well.", "It is strong and good.", "I would buy it again.", "It came early.",
          "Nothing is wrong with it.", "It is not bad at all.", "All at home love the {p}.")
BLAME = ("I do not like the {p}.", "The {p} does not work well.", "It is weak and bad.", "I would not buy it again.",
         "It came late.", "Something is wrong with it.", "It is not good at all.", "Nobody at home loves the {p}.")


def review_document(rng):
    good = rng.random() < 0.5
    product, color = rng.choice(words.PRODUCTS), rng.choice(words.COLORS)
    sentences = rng.sample(PRAISE if good else BLAME, rng.randint(1, 3))
    if rng.random() < 0.4:
        sentences.insert(0, f"I bought the {{p}} on {rng.choice(words.DAYS)}.")
    if rng.random() < 0.3:
        sentences.insert(rng.randint(0, len(sentences)), f"My {{p}} is {color}.")
    verdicts = ("I give four stars.", "I give five stars.") if good else ("I give one star.", "I give two stars.")
    verdict = rng.choice(verdicts)
    return f"Review: {' '.join(sentences).format(p=product)} {verdict}"


def dialogue_document(rng):
    message = draw_message(rng)
    return f"Customer: {message.text}\nAgent: {draw_reply(rng, message)}"


def record_document(rng):
    form = rng.randrange(3)
    if form == 0:
        person = rng.choice(PEOPLE)
        chosen = rng.sample(ATTRIBUTES, rng.randint(2, 4))
        return to_json({"kind": "person", "name": person["name"], **{key: person[key] for key in chosen}})
    if form == 1:
        day = rng.choice(words.DAYS)
        counts = {kind: str(rng.randint(0, 9)) for kind in rng.sample(KINDS, 3)}
        return f"On {day}: " + to_json({"kind": rng.choice(KINDS), "day": day, **counts})
    town = rng.choice(words.TOWNS)
    return to_json({"kind": "town", "town": town, "river": PLACES[town]["river"], "near": PLACES[town]["near"]})


RECORD_KEYS = ("kind", "product", "color", "order", "name", "town", "day")


def narrative_document(rng):
    """A short narrative and the record that says the same: copying into JSON, outside the shop's mail."""
    color, product = draw_item(rng)
    name, town, day = full_name(rng), rng.choice(words.TOWNS), rng.choice(words.DAYS)
    order = str(rng.randint(1000, 9999))
    kind, verb = rng.choice((("sale", "bought"), ("loan", "borrowed"), ("find", "found")))
    deal = {"kind": kind, "name": name, "product": product, "color": color}
    sentences = [(f"{name} {verb} a {color} {product}.", deal)]
    extras = [
        (rng.choice((f"It was on {day}.", f"That was {day}.")), {"day": day}),
        (rng.choice((f"It happened in {town}.", f"The place was {town}.")), {"town": town}),
        (rng.choice((f"The number is {order}.", f"It has number {order}.")), {"order": order}),
        ("It was a gift.", {}),
    ]
    sentences += rng.sample(extras, rng.randint(1, 3))
    record = {key: value for _, part in sentences for key, value in part.items()}
    text = " ".join(sentence for sentence, _ in sentences)
    return f"{text}\nRecord: {to_json({key: record[key] for key in RECORD_KEYS if key in record})}"


def copy_document(rng):
    """The same random words twice: what forms the copying (induction) that every extraction needs."""
    items = [
        rng.choice(words.ALL_PLAIN_WORDS) if rng.random() < 0.75 else str(rng.randint(1000, 9999))
        for _ in range(rng.randint(3, 8))
    ]
    text = " ".join(items)
    return rng.choice((
        f"Copy: {text} ; {text}", f"{text}. Again: {text}.", f"Note: {text}\nNote: {text}",
        f"List: {text}\nRecord: {to_json(items)}",
    ))


# share of each kind of document: in the first shards (more copying, so that it forms early) and afterwards
MIX = {
    person_document: (0.08, 0.10), question_document: (0.05, 0.07), place_document: (0.03, 0.04),
    goods_document: (0.02, 0.03), number_document: (0.03, 0.05), list_document: (0.05, 0.07),
    story_document: (0.05, 0.08), review_document: (0.04, 0.07), dialogue_document: (0.16, 0.21),
    record_document: (0.04, 0.04), narrative_document: (0.15, 0.14), copy_document: (0.30, 0.10),
}
EARLY_SHARDS = 9


def documents(shard, count=DOCUMENTS_PER_SHARD, only=None):
    """The documents of one shard. only: a generator to draw from instead of the mix (for probes)."""
    rng = random.Random(f"corpus {WORLD_SEED} {shard}")
    if only is not None:
        return [only(rng) for _ in range(count)]
    phase = 0 if shard < EARLY_SHARDS else 1
    kinds, weights = list(MIX), [shares[phase] for shares in MIX.values()]
    return [rng.choices(kinds, weights)[0](rng) for _ in range(count)]


def digest(docs):
    """sha256 of documents, joined by a zero byte."""
    return hashlib.sha256("\0".join(docs).encode()).hexdigest()
