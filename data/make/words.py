"""The vocabulary of the invented world. Every list is short enough for a 1M-parameter model to know each word well."""

FIRST_NAMES = (
    "Alma Anton Astrid Bela Boris Carla Cyril Daria Dirk Edda Emil Esra Fabian Freya Gareth Greta Hakan Helga Ines "
    "Isaac Jana Joel Judith Kasper Kira Lars Leila Lorenz Magda Malik Mirko Nadia Nils Odile Oscar Petra Quentin Rahel "
    "Reza Sabine Simon Soraya Tamar Tobias Ulla Viktor Wanda Xenia Yusuf Zelda"
).split()
LAST_NAMES = (
    "Abel Baxter Bergman Castro Chandra Dahl Decker Egan Falk Fischer Garner Gomez Hartley Hoffman Iversen Jansen "
    "Kaplan Keane Lambert Larsson Maddox Mercer Navarro Nolan Osborn Pavlov Pereira Quist Ramsey Rivera Sandoval "
    "Sheldon Tanaka Tucker Ueda Vance Vogel Walsh Yates Zimmer"
).split()
TOWNS = (
    "Amberley Birchport Calder Dunmore Eastbrook Fernhill Glenrock Hollowbay Ivorton Jasperton Kingsmoor Lakeside "
    "Maplewood Newcross Otterburn Pebbleton Quarryhill Rosedale Saltmarsh Tidewater Upfield Vinemouth Wolfsbridge "
    "Yarrow"
).split()
REGIONS = "the lowlands|the uplands|the east|the west|the lake country|the islands".split("|")
RIVERS = "Abra Brond Clyne Dove Ember Frome Gale".split()
JOBS = (
    "architect barber butcher clerk dentist diver editor florist glazier judge mason mechanic miller miner pharmacist "
    "potter shepherd surgeon translator weaver"
).split()
HOBBIES = (
    "archery astronomy baking camping climbing drawing fencing juggling karate rowing sewing skating surfing yoga"
).split()
PETS = "canary duck ferret goat lizard pony puppy snail".split()
FOODS = "beans carrots dumplings figs lentils mushrooms olives oranges pasta pears pizza waffles".split()
PRODUCTS = (
    "armchair basket bottle bowl candle curtain cushion desk fan fridge grill hammer hoodie keyboard kite lantern "
    "monitor oven pan piano rug saddle scarf scooter shelf stool suitcase umbrella vase wallet"
).split()
COLORS = "amber beige black blue crimson gold green navy pink purple red white".split()
MATERIALS = "bamboo brass clay copper linen marble rubber silk".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ANIMALS = "badger beaver cat deer dog hare heron otter squirrel swan".split()
THINGS = "apple bell boat coin cup feather flute kettle letter ring stone whistle".split()
PLACES = "beach castle church farm field harbour library mill park station".split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()

# The style task answers in these words. The tokenizer knows each as one token, but no pretraining document holds one.
SAILOR_WORDS = "ahoy arr avast aye booty bosun doubloons galley matey plunder scurvy starboard swab yonder".split()

# Used in copying documents only, so that copying is learned as a skill and not word by word.
OTHER_WORDS = (
    "acorn bacon cabin dagger elbow fabric garlic helmet island jungle kernel ladder magnet napkin orchid paddle "
    "quartz ribbon saturn tunnel unicorn velvet walnut yogurt zipper button cactus domino engine falcon gadget hazard "
    "icicle jigsaw koala lemon muffin nectar oyster pebble"
).split()

ALL_PLAIN_WORDS = [
    *FIRST_NAMES, *TOWNS, *JOBS, *HOBBIES, *PRODUCTS, *COLORS, *DAYS, *ANIMALS, *THINGS, *PLACES, *OTHER_WORDS,
]
