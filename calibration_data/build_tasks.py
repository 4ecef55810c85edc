"""Write the items of the bundled tasks (tasks/*.jsonl), or check that they are what this script writes.

    python calibration_data/build_tasks.py            write them
    python calibration_data/build_tasks.py --check    exit 1 if one differs

All text is written for this project. The endings (cloze) are written one by one; the other items are put together from
the words and frames below, with a fixed seed. Each item is

    {"context": "...", "choices": ["...", ...], "answer": index of the right one}

After a change run build_manifest.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ITEMS = 120
"""Of every task."""

Item = dict[str, Any]

# Nouns as (singular, plural).
PEOPLE = [
    ("boy", "boys"), ("girl", "girls"), ("teacher", "teachers"), ("farmer", "farmers"), ("soldier", "soldiers"),
    ("sailor", "sailors"), ("doctor", "doctors"), ("servant", "servants"), ("child", "children"), ("man", "men"),
    ("woman", "women"), ("traveller", "travellers"), ("prisoner", "prisoners"), ("shepherd", "shepherds"),
]  # fmt: skip
THINGS = [
    ("box", "boxes"), ("letter", "letters"), ("window", "windows"), ("boat", "boats"), ("tree", "trees"),
    ("horse", "horses"), ("house", "houses"), ("chair", "chairs"), ("road", "roads"), ("picture", "pictures"),
    ("candle", "candles"), ("bell", "bells"), ("book", "books"), ("basket", "baskets"),
]  # fmt: skip
BESIDE = ["near the wall", "by the river", "behind the church", "in the garden", "on the hill", "at the gate"]
PEOPLE_STATES = ["very tired", "afraid of the dark", "glad to be home", "ready to leave", "too weak to walk"]
THING_STATES = ["very old", "covered with snow", "larger than before", "made of wood", "hard to see"]

WOMEN = ["queen", "mother", "aunt", "sister", "widow", "lady", "daughter", "princess", "nun", "girl", "bride"]
MEN = ["king", "father", "uncle", "brother", "gentleman", "son", "prince", "monk", "boy", "priest", "lord"]
PRONOUN_FRAMES = [
    ("The {noun} said that {0} would come back in the morning.", ("she", "he")),
    ("The {noun} opened the door because {0} had heard a voice.", ("she", "he")),
    ("The {noun} took off {0} hat and sat down.", ("her", "his")),
    ("The {noun} looked at {0} in the glass.", ("herself", "himself")),
    ("The {noun} held the letter in {0} hand.", ("her", "his")),
    ("The {noun} did not know what {0} ought to do.", ("she", "he")),
]

# Past, participle, what follows.
VERBS = [
    ("wrote", "written", "a long letter"), ("broke", "broken", "the window"), ("took", "taken", "the money"),
    ("gave", "given", "away the bread"), ("ate", "eaten", "the apple"), ("saw", "seen", "the ship"),
    ("spoke", "spoken", "to the king"), ("stole", "stolen", "the ring"), ("drank", "drunk", "the wine"),
    ("drove", "driven", "the cart"), ("forgot", "forgotten", "the name"), ("hid", "hidden", "the key"),
    ("knew", "known", "the truth"), ("chose", "chosen", "the red coat"), ("began", "begun", "the work"),
    ("sang", "sung", "an old song"), ("tore", "torn", "the paper"), ("threw", "thrown", "a stone"),
    ("rode", "ridden", "the black horse"), ("did", "done", "the same thing"), ("went", "gone", "home"),
    ("fell", "fallen", "into the water"), ("shook", "shaken", "the tree"), ("wore", "worn", "a grey cloak"),
]  # fmt: skip
PAST_FRAMES = ["Last night the {noun} {verb} {rest}.", "The {noun} {verb} {rest} and said nothing."]
PERFECT_FRAMES = ["The {noun} had {verb} {rest}.", "By that time the {noun} had already {verb} {rest}."]

COPY_WORDS = [
    "lamp", "boat", "apple", "river", "stone", "bird", "table", "flower", "knife", "cloud", "horse", "ship",
    "garden", "coat", "fire", "song", "bread", "mountain", "ring", "bottle",
]  # fmt: skip

COPY_FRAMES = [
    "Everyone spoke of the {word}. The {noun} had never seen such a {word} before, and asked who had made the",
    "The {noun} made a {word}. It was a very fine {word}, and all who came wished to see the",
    "The {noun} bought a {word} for a friend, and the friend was very pleased with the",
    "The {noun} found a {word} on the way and carried the {word} home. Nobody knew who had lost the",
]

# Words that are often said together, in this order.
PARTNERS = [
    ("father", "mother"), ("brother", "sister"), ("husband", "wife"), ("king", "queen"), ("day", "night"),
    ("black", "white"), ("bread", "butter"), ("heaven", "earth"), ("life", "death"), ("men", "women"),
    ("hands", "feet"), ("sun", "moon"), ("thunder", "lightning"), ("rich", "poor"), ("young", "old"),
    ("north", "south"), ("east", "west"), ("right", "wrong"), ("good", "evil"), ("pen", "ink"), ("knife", "fork"),
    ("up", "down"), ("back", "forth"), ("here", "there"), ("first", "last"), ("body", "soul"), ("flesh", "blood"),
    ("lock", "key"), ("sword", "shield"), ("horse", "cart"), ("boys", "girls"), ("gold", "silver"),
    ("salt", "pepper"), ("town", "country"), ("hope", "fear"), ("joy", "sorrow"), ("eyes", "ears"),
    ("summer", "winter"), ("fire", "water"), ("sooner", "later"), ("gentlemen", "ladies"), ("cats", "dogs"),
]  # fmt: skip
PARTNER_FRAMES = ["He spoke of {0} and", "It was all the same to her, {0} or", "First came {0}, and then"]

CLOZE = """
The baker took the warm bread out of the | oven | river | letter | moon
It was raining hard, so she opened her | umbrella | kitchen | mouth | garden
He was so thirsty that he drank a whole glass of | water | sand | paper | stone
The sun went down and the sky grew | dark | loud | hungry | sweet
The bird spread its wings and began to | fly | read | cook | write
She was cold, so she put on her warm | coat | plate | window | song
He wrote a long letter to his | friend | shoe | chimney | soup
The ship sailed slowly across the | sea | table | book | bed
In winter the whole garden was covered with | snow | butter | music | smoke
The horse was tired and could run no | more | blue | door | name
The old man leaned upon his | stick | cloud | dinner | question
She lit a candle, because the room was | dark | early | angry | long
The children laughed and played in the | garden | letter | pocket | clock
He took the key and opened the | door | rain | sheep | story
They sat down at the table and began to | eat | sink | snow | fade
The soldier drew his | sword | breakfast | cousin | window
The mother held the baby in her | arms | boots | fields | teeth
The dog barked at the | stranger | hour | thought | summer
We heard the bells of the | church | butter | blanket | apple
The fisherman threw his net into the | water | fire | mirror | bread
She closed her eyes and fell | asleep | open | wide | deep in debt
He was so angry that his face turned | red | round | wooden | Monday
A great wind blew down many | trees | words | years | reasons
The teacher told the boys to open their | books | rivers | stars | knees
In the evening they sat around the | fire | ship | noise | road
She cut the bread with a sharp | knife | pillow | feather | smile
The thief ran away into the | night | spoon | sugar | sentence
He could not sleep because of the loud | noise | colour | bread | smell
The farmer ploughed his | field | hat | sister | voice
The doctor said that the sick man must stay in | bed | ink | debt to the moon | thunder
The king wore a crown of | gold | soup | rain | grass soup
She picked a red | flower | minute | whisper | winter
The cat caught a | mouse | mountain | Tuesday | ladder
He warmed his cold hands by the | fire | ice | river | wall of snow
The moon and the stars shone in the | sky | drawer | bottle | cellar
The prisoner was locked in a small | cell | song | ocean | spring
The river was too deep to | cross | bake | sing | spell
He took off his hat and made a low | bow | egg | candle | fence
The tears ran down her | cheeks | stairs of stone | sleeves of iron | roof
They travelled all day and slept at an | inn | apple | inkpot | elbow
The old house had a roof of red | tiles | milk | voices | hours
She washed her hands with soap and | water | bread | thunder | paper
The clock on the wall struck | twelve | green | softly blue | butter
He put the money in his | pocket | dream | river | sunshine
The road led over the hill and down into the | valley | teacup | pencil | sleeve
A fire broke out and the house | burned | froze | sang | floated
The snow melted when the warm weather | came | sang | fell asleep | ate
He had lost his way in the thick | forest | spoon | letter | hour
The little boy was afraid of the | dark | sugar | Tuesday | holiday
She poured the tea into a | cup | shoe | hedge | letter
The captain gave the order to lift the | anchor | pudding | evening | question
The hunter took his gun and went into the | woods | oven | envelope | bottle
They buried the dead man in the | ground | soup | air | laughter
He knocked at the door, but nobody | answered | rained | melted | bloomed
In spring the trees put forth new | leaves | shoes | chairs | coins
The girl put the flowers in a glass of | water | gold | smoke | iron
He shut the window to keep out the | cold | table | bread | furniture
She read the book from the first page to the | last | tallest | wettest | sweetest
The blind man could not | see | hear | walk | eat
The judge sent the murderer to | prison | supper | breakfast | spring
The wolf ate the | sheep | church | evening | road
He climbed to the top of the | mountain | soup | minute | whisper
After the long journey they were very | tired | wooden | purple | square
The bread was fresh, and it smelled very | good | fast | tall | late
He paid for his dinner and left the | inn | colour | number | spelling
The lady played upon the | piano | potato | ceiling | blanket
She sewed the torn shirt with needle and | thread | thunder | pepper | snow
The miller ground the corn into | flour | music | glass | silver
The sheep were guarded by a | shepherd | teapot | barrel | mirror
The ship struck a rock and began to | sink | sing | smile | bloom
He blew out the candle and went to | bed | ink | noon | lunch in bed at noon
The frightened bird flew out of the | window | page | potato | hour
The widow wept for her dead | husband | umbrella | staircase | kettle
At noon the sun stood high in the | sky | cellar | cupboard | well
The guests thanked their host and went | home | blue | slow | thin
He broke his leg, so he could not | walk | think | listen | hear
She put a stamp on the | letter | river | cloud | kitten
The gardener planted a row of young | trees | clouds | songs | clocks
The carpenter made a table of | wood | milk | wind | tears
The mouse ran into its | hole | violin | newspaper | heaven
The bees brought honey back to the | hive | anvil | library | harbour
They crossed the river by the old | bridge | kettle | feather | coat
It was so quiet that one could | hear a pin drop | eat the wall | drink the lamp | bake a stone
The hungry beggar asked for a piece of | bread | thunder | evening | silence
The child ran to its | mother | weather | grammar | distance
He filled his pipe with | tobacco | furniture | moonlight | arithmetic
She looked at her face in the | mirror | bucket of coal | chimney | loaf
The lion let out a terrible | roar | poem | recipe | carpet
The postman brought her a | letter | mountain | harbour | thunderstorm
The soldiers marched to the sound of the | drum | pillow | soup | sugar
The wheel of the cart was | broken | thirsty | jealous | polite
Every Sunday the family went to | church | boil | fence | yesterday
The baby began to cry because it was | hungry | wooden | rectangular | printed
The leaves of the trees turn yellow in | autumn | kitchens | music | sentences
He was a rich man and lived in a fine | house | spoon | button | crumb
The scholar spent his life among his | books | storms | puddles | onions
The blacksmith struck the hot iron with his | hammer | napkin | feather | candle
He tied the horse to a | post | cloud | whisper | moonbeam
The cook put more salt into the | soup | window | sermon | carpet
The night was clear, and the stars were | bright | salty | noisy | hungry
They hid the treasure under a large | stone | idea | rumour | holiday
The stream was frozen, and the boys walked on the | ice | butter | steam | music
The ladder was too short to reach the | roof | truth | winter | week
She hung the wet clothes on the line to | dry | read | sing | vote
The train left the station at ten | o'clock | pounds of butter | feathers | gardens
In the morning the cock began to | crow | knit | sail | paint
The poor woman had nothing to give her children but dry | bread | rivers | stars | laughter
The ring was too small for her | finger | opinion | garden gate | shadow
His hair had turned white with | age | bread | chairs | noise
He drank to the health of the young bride and | bridegroom | saucepan | bookshelf | windmill
The shoemaker mended the old | shoes | clouds | prayers | rivers
The fox was too clever to be caught in a | trap | poem | sermon | melody
After the storm the sea was | calm | literate | thirsty | bankrupt
She gave the horse some | hay | coffee cups | ink | letters
He swore to tell the whole | truth | ladder | harvest | kettle
The wounded man lost much | blood | furniture | daylight | grammar
The boys threw stones into the | pond | afternoon | proverb | alphabet
The window was broken, and the cold wind came | in | soup | seven | red
The bell rang, and the pupils left the | school | toast | whisper | pepper
The nurse sat all night beside the sick man's | bed | opinion | echo | rainbow
"""


def agreement(rng: random.Random) -> Iterator[Item]:
    """A subject and its verb agree in number, also with another noun in between."""
    frames = [(PEOPLE, state) for state in PEOPLE_STATES] + [(THINGS, state) for state in THING_STATES]
    while True:
        nouns, state = rng.choice(frames)
        plural = rng.random() < 0.5
        noun = rng.choice(nouns)[plural]
        place = rng.choice([f" {rng.choice(BESIDE)}", f" behind the {rng.choice(THINGS)[not plural]}", ""])
        verbs = rng.choice([("was", "were"), ("is", "are"), ("has been", "have been")])
        yield _pair(rng, *(f"The {noun}{place} {verbs[number]} {state}." for number in (plural, not plural)))


def pronouns(rng: random.Random) -> Iterator[Item]:
    """A pronoun agrees with the person it stands for."""
    everyone = [(noun, 0) for noun in WOMEN] + [(noun, 1) for noun in MEN]
    for (noun, gender), (frame, words) in _shuffled(rng, itertools.product(everyone, PRONOUN_FRAMES)):
        yield _pair(rng, *(frame.format(words[choice], noun=noun) for choice in (gender, 1 - gender)))


def verb_forms(rng: random.Random) -> Iterator[Item]:
    """The past tense stands alone, the participle behind `had`."""
    while True:
        past, participle, rest = rng.choice(VERBS)
        noun = rng.choice(PEOPLE)[0]
        perfect = rng.random() < 0.5
        frame = rng.choice(PERFECT_FRAMES if perfect else PAST_FRAMES)
        verbs = (participle, past) if perfect else (past, participle)
        yield _pair(rng, *(frame.format(noun=noun, verb=verb, rest=rest) for verb in verbs))


def cloze(rng: random.Random) -> Iterator[Item]:
    """The ending that makes sense."""
    for line in CLOZE.strip().splitlines():
        context, *choices = (part.strip() for part in line.split("|"))
        yield _choices(rng, context, choices)


def copying(rng: random.Random) -> Iterator[Item]:
    """The thing that was spoken of is spoken of again."""
    while True:
        word, *wrong = rng.sample(COPY_WORDS, 4)
        yield _choices(rng, rng.choice(COPY_FRAMES).format(noun=rng.choice(PEOPLE)[0], word=word), [word, *wrong])


def partners(rng: random.Random) -> Iterator[Item]:
    """The word that often goes with another."""
    for (word, partner), frame in _shuffled(rng, itertools.product(PARTNERS, PARTNER_FRAMES)):
        wrong = rng.sample([other for pair in PARTNERS for other in pair if other not in (word, partner)], 3)
        yield _choices(rng, frame.format(word), [partner, *wrong])


TASKS: dict[str, Callable[[random.Random], Iterator[Item]]] = {
    function.__name__: function for function in (agreement, pronouns, verb_forms, cloze, copying, partners)
}


def items(name: str) -> list[Item]:
    """Return the items of a task: all different, always the same."""
    found: dict[str, Item] = {}
    for item in TASKS[name](random.Random(f"layer-surgery {name}")):
        found.setdefault(json.dumps([item["context"], sorted(item["choices"])]), item)
        if len(found) == ITEMS:
            break
    if len(found) < ITEMS:
        raise ValueError(f"{name} has only {len(found)} different items")
    return list(found.values())


def text(name: str) -> str:
    """Return the JSONL file of a task."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items(name))


def _pair(rng: random.Random, right: str, wrong: str) -> Item:
    return _choices(rng, "", [right, wrong])


def _choices(rng: random.Random, context: str, choices: list[str]) -> Item:
    """Put the choices, the right one first, in a random order."""
    order = rng.sample(range(len(choices)), len(choices))
    return {"context": context, "choices": [choices[k] for k in order], "answer": order.index(0)}


def _shuffled(rng: random.Random, values: Any) -> list[Any]:
    mixed = list(values)
    rng.shuffle(mixed)
    return mixed


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    parser.add_argument("--directory", type=Path, default=Path(__file__).resolve().parent, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    stale = []
    for name in TASKS:
        path = options.directory / "tasks" / f"{name}.jsonl"
        if options.check and (not path.is_file() or path.read_text(encoding="utf-8") != text(name)):
            stale.append(path.name)
        elif not options.check:
            path.write_text(text(name), encoding="utf-8")
    for name in stale:
        print(f"error: {name} is not what build_tasks.py writes; run it", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
