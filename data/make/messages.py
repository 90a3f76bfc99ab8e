"""Customer messages of an invented shop, with the role of every slot, and the agent's replies.

A message talks about one item and may name distractors: a town the customer left, a day that is past, another person,
another item. So the role of a word is decided by its sentence and not by the word.
"""

import re
import zlib
from dataclasses import dataclass

from . import words

SLOT = re.compile(r"\{(\w+)\}")

ASK = {
    "return": (
        "I want to return the {item}.", "I would like to send the {item} back to you.",
        "The {item} is too small, can I give it back?", "How do I bring back the {item} from order {order}?",
        "I do not like the {item}, please take it back.", "Can someone pick up the {item}, I will not keep it?",
        "I changed my mind and want to hand back the {item}.",
    ),
    "refund": (
        "I want my money back for the {item}.", "Please refund order {order}.",
        "When do I get my money for the {item}?",
        "You charged me two times for the {item}.", "I paid too much for order {order}.",
        "The price of the {item} on my bill is wrong.", "Please pay me back for the {item}.",
    ),
    "track": (
        "Where is the {item}?", "When does the {item} arrive?", "I still wait for the {item}.",
        "Order {order} is not here yet.", "Can you see where order {order} is now?", "Is the {item} on the way?",
        "How long does the {item} still take?", "Nobody has brought the {item} yet.",
    ),
    "cancel": (
        "Please cancel order {order}.", "I want to cancel the {item}.", "Stop my order for the {item}.",
        "Do not send the {item}, I ordered it by mistake.", "I no longer need the {item}, please stop it.",
        "Can you call off order {order}?", "Please forget my order for the {item}.",
    ),
    "repair": (
        "The {item} is broken.", "The {item} came with a crack.", "My {item} stopped working.",
        "There is a hole in the {item}.", "The {item} fell apart on {oldday}.", "A part of the {item} is loose.",
        "Can you fix the {item}?",
    ),
    "address": (
        "I moved to {town}, please change my address.", "Please send the {item} to {town}.",
        "My new home is in {town}.", "Can you ship order {order} to {town}?",
        "Bring the {item} to my office in {town}.",
        "Please write {town} on the parcel with the {item}.", "Note my new address in {town}.",
    ),
    "stock": (
        "Do you have the {item}?", "Is the {item} in stock?", "Can I buy the {item} from you?",
        "Do you still sell the {item}?", "When will you have the {item} again?", "I am looking for the {item}.",
        "How many of the {item} are left?",
    ),
    "visit": (
        "Can I visit the shop on {day}?", "Is the shop open on {day}?", "I want to come in on {day}.",
        "May I come by on {day} to see the {item}?", "Can I meet someone on {day}?",
        "I would like an appointment on {day}.", "Are you free on {day}?",
    ),
}
KINDS = tuple(ASK)

# Said of an intent that is NOT the one of the message.
DENY = {
    "return": ("I do not want to return it.", "This is not about giving it back."),
    "refund": ("I do not want my money back.", "The price was right."),
    "track": ("I know where it is.", "I do not ask when it arrives."),
    "cancel": ("I do not want to cancel anything.", "Please do not stop my order."),
    "repair": ("It is not broken.", "Nothing has to be fixed."),
    "address": ("My address is still the same.", "You have the right address."),
    "stock": ("I do not want to buy another one.", "I do not ask what you have in stock."),
    "visit": ("I cannot come to the shop.", "I do not need an appointment."),
}

INTRODUCE = (
    "my name is {name}.", "this is {name}.", "I am {name}.", "{name} here.", "I am {name} and write for {friend}.",
    "I write for {friend}, my name is {name}.", "{friend} told me to write, I am {name}.",
    "this is {name}, not {friend}.",
)
BACKGROUND = (
    "My order is {order}.", "It is order {order}.", "My old order was {oldorder}.",
    "The number is {order}, not {oldorder}.", "Order {oldorder} was fine, this is about {order}.",
    "I lived in {oldtown} before.", "I am from {oldtown}.", "I left {oldtown} last year.",
    "I live in {town} now, not in {oldtown}.", "It should not go to {oldtown} but to {town}.",
    "From {oldtown} I moved to {town}.", "{town} is my home, {oldtown} was before.",
    "{oldtown} is wrong, {town} is right.",
    "I wrote to you on {oldday}.", "I ordered it on {oldday}.", "On {oldday} you told me to wait until {day}.",
    "I need it on {day}.", "Not {oldday} but {day} is good for me.", "I asked for {day} and not for {oldday}.",
    "{friend} has the same.", "I already have the {otheritem}.", "The {otheritem} is fine.",
    "This is not about the {otheritem}.", "With the {otheritem} came no paper.", "It was a gift.", "I like your shop.",
)
OPENINGS = ("Hello,", "Good evening,", "Dear team,", "Hi there,", "Good day,", "To the shop:")
CLOSINGS = ("Thank you.", "Thanks.", "Please help.", "Best wishes.")

ANSWER = {
    "return": ("You can return the {item}.", "We will take back the {item}."),
    "refund": ("We will refund the {item}.", "You get your money back for the {item}."),
    "track": ("We will track the {item}.", "The {item} is on the way."),
    "cancel": ("We will cancel the {item}.", "I have stopped the {item}."),
    "repair": ("We will repair the {item}.", "I am sorry that the {item} is broken."),
    "address": ("I will change the address for the {item}.", "The {item} goes to the new address."),
    "stock": ("Yes, the {item} is in stock.", "Sorry, the {item} is sold out."),
    "visit": ("You can visit us and see the {item}.", "Your visit is noted, the {item} is here."),
}

# slot -> role tag of the tagging task; an item is two words, a person too
ROLES = {
    "item": "ITEM", "otheritem": "OTHERITEM", "order": "ORDER", "oldorder": "OLDORDER", "name": "NAME",
    "friend": "FRIEND", "town": "SHIPTO", "oldtown": "ORIGIN", "day": "DAY", "oldday": "PASTDAY",
}


@dataclass(frozen=True)
class Message:
    """One customer message: its text, its intent, all slot values, and the template it was filled from."""

    text: str
    kind: str
    slots: dict
    template: str

    def mentions(self, slot):
        return "{" + slot + "}" in self.template


def split_of_item(color, product):
    """Which split may name this (color, product) pair: 80 % 'train', 10 % 'validation', 10 % 'test'.

    Pretraining documents use 'train' pairs only, so a held-out message cannot have been seen word for word.
    """
    bucket = zlib.crc32(f"{color} {product}".encode()) % 10
    return {8: "validation", 9: "test"}.get(bucket, "train")


def draw_item(rng, split="train"):
    """A (color, product) pair of the split."""
    while True:
        color, product = rng.choice(words.COLORS), rng.choice(words.PRODUCTS)
        if split_of_item(color, product) == split:
            return color, product


def full_name(rng):
    return f"{rng.choice(words.FIRST_NAMES)} {rng.choice(words.LAST_NAMES)}"


def draw_slots(rng, split="train"):
    """A value for every slot; a distractor always differs from what it distracts from."""
    color, product = draw_item(rng, split)
    other_color, other_product = draw_item(rng, split)
    while other_product == product:
        other_color, other_product = draw_item(rng, split)
    name, friend = full_name(rng), full_name(rng)
    while friend == name:
        friend = full_name(rng)
    town, oldtown = rng.sample(words.TOWNS, 2)
    day, oldday = rng.sample(words.DAYS, 2)
    order, oldorder = (str(n) for n in rng.sample(range(1000, 10000), 2))
    return {
        "item": f"{color} {product}", "color": color, "product": product,
        "otheritem": f"{other_color} {other_product}", "order": order, "oldorder": oldorder, "name": name,
        "friend": friend, "town": town, "oldtown": oldtown, "day": day, "oldday": oldday,
    }


def clashes(sentence, template):
    """True if both name the same slot twice over, which no customer would do (the item excepted)."""
    here = set(SLOT.findall(sentence)) - {"item"}
    return bool(here & set(SLOT.findall(template)))


def draw_message(rng, kind=None, split="train", deny=0.3, background=(0, 1, 2)):
    """A random message. deny: the probability of a sentence that denies another intent."""
    kind = kind or rng.choice(KINDS)
    body = [rng.choice(ASK[kind])]
    for _ in range(rng.choice(background)):
        extra = rng.choice(BACKGROUND)
        if not clashes(extra, " ".join(body)):
            body.insert(rng.randint(0, len(body)), extra)
    if rng.random() < deny:
        other = rng.choice([k for k in KINDS if k != kind])
        body.insert(rng.randint(0, len(body)), rng.choice(DENY[other]))
    if rng.random() < 0.7:
        who = rng.choice(INTRODUCE)
        if not clashes(who, " ".join(body)):
            body.insert(0, who)
    if not any("{item}" in sentence for sentence in body):
        body.append("It is about the {item}.")
    if rng.random() < 0.5:
        body.insert(0, rng.choice(OPENINGS))
    if rng.random() < 0.3:
        body.append(rng.choice(CLOSINGS))
    template = " ".join(body)
    if template[0].islower():
        template = template[0].upper() + template[1:]
    slots = draw_slots(rng, split)
    return Message(template.format(**slots), kind, slots, template)


def draw_reply(rng, message):
    """The agent's turn. It always restates what the message is about, and every slot it was given."""
    reply = []
    if message.mentions("name"):
        reply.append(rng.choice(("Thank you, {name}.", "Hello {name}.", "Dear {name},")))
    reply.append(rng.choice(ANSWER[message.kind]))
    if message.mentions("order"):
        reply.append(rng.choice(("Your order is {order}.", "I found order {order}.", "This is order {order}.")))
    if message.mentions("town"):
        reply.append(rng.choice(("It goes to {town}.", "I noted {town}.")))
    if message.mentions("day"):
        reply.append(rng.choice(("The day is {day}.", "I noted {day}.")))
    if rng.random() < 0.3:
        reply.append(rng.choice(("The {product} is {color}.", "So it is the {product} in {color}.")))
    return " ".join(reply).format(**message.slots)


def tagged_words(message):
    """Words and BIO role tags of a message. -> (list of str, list of str), equally long."""
    out_words, out_tags = [], []
    for part in re.split(r"(\{\w+\})", message.template):
        slot = SLOT.fullmatch(part)
        text = message.slots[slot[1]] if slot else part
        for position, word in enumerate(re.findall(r"\w+|[^\w\s]", text)):
            out_words.append(word)
            out_tags.append(("I-" if position else "B-") + ROLES[slot[1]] if slot else "O")
    return out_words, out_tags
