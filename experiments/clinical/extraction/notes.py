"""A seeded generator of SYNTHETIC clinical notes with gold spans. No note is of a person, or from a record.

Gold are what the patient has or takes: diseases, symptoms, and medications with dose, route and frequency. What is
denied, and what only relatives have, stands in the notes too and is not gold. Terms come by name or abbreviation, some
with a typing error. Every note begins with `LABEL`.

Templates come in six families; two of them, and a quarter of the terms, occur in external notes only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from extraction.terms import AMOUNTS, FREQUENCIES, ROUTES, UNITS, Lexicon, Term

LABEL = "SYNTHETIC NOTE."
_ABBREVIATED, _MISTYPED, _EXTERNAL_TERM, _LONG = 0.4, 0.05, 0.5, 0.08
#: Visits of an ordinary and of a long note, at least and at most.
_VISITS, _LONG_VISITS = (1, 1), (5, 8)
_SENTENCES = (5, 9)

#: {D} {S} {M}: what the patient has or takes. {d} {s}: what is denied, or what a relative has. {m}: what is not taken.
INNER_FAMILIES: dict[str, tuple[str, ...]] = {
    "discharge": (
        "The patient is a {age} year old {sex} with a history of {D}, {D} and {D}.",
        "{He} was admitted with {S} and {S}.",
        "{He} presented to the hospital with {S} for {days} days.",
        "{He} denied {s}, {s} or {s}.",
        "Work-up was negative for {d}.",
        "{He} was treated with {M} for {D}.",
        "Discharge medications were {M}, {M} and {M}.",
        "Family history is notable for {d} in the {relative}.",
        "{He} is allergic to {m}.",
        "The hospital course was complicated by {D}.",
        "The {relative} had {d} and {d}.",
        "{He} was discharged home in stable condition.",
    ),
    "clinic": (
        "{age} yo {sex} here for follow up of {D} and {D}.",
        "Reports {S} and {S} since the last visit.",
        "No {s}, no {s}.",
        "Continue {M}.",
        "Start {M} for {D}.",
        "Will stop {m} because of {S}.",
        "{D} is well controlled on {M}.",
        "FH: {relative} with {d}.",
        "Return to clinic in {days} weeks.",
        "Patient without {s} or {s} today.",
    ),
    "problems": (
        "1) {D}: continue {M}.",
        "2) {D}, stable, on {M} and {M}.",
        "3) {S}: likely due to {D}.",
        "ROS: positive for {S}, {S}; negative for {s}, {s}.",
        "PMH: {D}, {D}, {D}.",
        "FHx: {d} ({relative}), {d} ({relative}).",
        "Meds: {M}; {M}; {M}.",
        "Plan: rule out {d}.",
        "Labs reviewed, vitals stable.",
    ),
    "nursing": (
        "Pt c/o {S}, given {M}.",
        "Pt denies {s}.",
        "{M} administered, tolerated well.",
        "Hx of {D} and {D}.",
        "Pt states {S} is better, still has {S}.",
        "{relative} has {d}, per pt.",
        "No signs of {d}.",
        "{m} held overnight.",
        "Resting comfortably, call bell in reach.",
    ),
}
EXTERNAL_FAMILIES: dict[str, tuple[str, ...]] = {
    "letter": (
        "Dear colleague, thank you for seeing this {age} year old {sex} who suffers from {D} and {D}.",
        "Over the past {days} weeks {he} has been troubled by {S} as well as {S}.",
        "There is no evidence of {d}, and {he} has never had {s}.",
        "At present {he} takes {M} together with {M}.",
        "{His} {relative} died of {d}.",
        "I have prescribed {M} to treat the {D}.",
        "We discontinued {m} last month.",
        "I would be grateful for your opinion.",
    ),
    "triage": (
        "{age}{sex1} BIBA with {S} x {days} days, +{S}.",
        "Denies any {s} or {s}.",
        "PMHx {D}/{D}.",
        "Home meds {M}, {M}.",
        "Given {M} in ED.",
        "?{d}, awaiting review.",
        "Mat hx of {d}.",
        "Impression: {D} with {S}.",
        "Obs stable, seen by triage nurse.",
    ),
}
_MEDICATIONS = ("{medication} {dose} {route} {frequency}", "{medication} {dose} {frequency}", "{medication} {dose}",
                "{medication} {frequency}", "{medication}", "{dose} of {medication} {route} {frequency}")  # fmt: skip
_RELATIVES = ("mother", "father", "brother", "sister", "grandmother", "uncle")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, order=True)
class Span:
    """Characters `[start, end)` of a text that name something of a kind."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Note:
    """A synthetic note and what is gold in it."""

    text: str
    spans: tuple[Span, ...]
    family: str


class _Writer:
    """Fills templates, and keeps where gold terms come to stand."""

    def __init__(self, draw: random.Random, lexicon: Lexicon, external: bool) -> None:
        self._draw, self._lexicon, self._external = draw, lexicon, external
        self._sex = draw.choice(("man", "woman"))
        self.text, self.spans = LABEL, list[Span]()

    def sentence(self, template: str) -> None:
        self.text += " "
        self._fill(template)

    def _fill(self, template: str) -> None:
        end = 0
        for slot in _SLOT.finditer(template):
            self.text += template[end : slot.start()]
            self._slot(slot.group(1))
            end = slot.end()
        self.text += template[end:]

    def _slot(self, name: str) -> None:
        draw, man = self._draw, self._sex == "man"
        if name in ("D", "S"):
            self._gold({"D": "disease", "S": "symptom"}[name])
        elif name == "M":
            self._fill(draw.choice(_MEDICATIONS))
        elif name in ("medication", "dose", "route", "frequency"):
            self._gold(name)
        elif name in ("d", "s", "m"):
            self.text += self._surface({"d": "disease", "s": "symptom", "m": "medication"}[name])
        else:
            self.text += {
                "age": str(draw.randint(19, 94)),
                "sex": self._sex,
                "sex1": "M" if man else "F",
                "he": "he" if man else "she",
                "He": "He" if man else "She",
                "His": "His" if man else "Her",
                "days": str(draw.randint(2, 12)),
                "relative": draw.choice(_RELATIVES),
            }[name]

    def _gold(self, kind: str) -> None:
        start = len(self.text)
        self.text += self._surface(kind)
        self.spans.append(Span(start, len(self.text), kind))

    def _surface(self, kind: str) -> str:
        draw = self._draw
        if kind == "dose":
            return draw.choice(AMOUNTS) + draw.choice(UNITS)
        if kind in ("route", "frequency"):
            return draw.choice(ROUTES if kind == "route" else FREQUENCIES)
        held_out = self._external and draw.random() < _EXTERNAL_TERM
        term: Term = draw.choice((self._lexicon.held_out if held_out else self._lexicon.inner)[kind])
        if term.abbreviation is not None and draw.random() < _ABBREVIATED:
            return term.abbreviation
        return mistyped(term.name, draw) if draw.random() < _MISTYPED else term.name


def mistyped(word: str, draw: random.Random) -> str:
    """Return the word with two neighbouring letters exchanged, or one left out; its first letter stays."""
    place = draw.randrange(1, len(word) - 1)
    if draw.random() < 0.5:
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return word[:place] + word[place + 1 :]


def write_notes(count: int, lexicon: Lexicon, seed: str, *, external: bool = False) -> list[Note]:
    """Return synthetic notes; external ones have the held-out families, and held-out terms half of the time.

    One note in twelve is long: several visits, one behind the other.
    """
    families = EXTERNAL_FAMILIES if external else INNER_FAMILIES
    notes = []
    for number in range(count):
        draw = random.Random(f"note {seed} {number}")
        family = draw.choice(sorted(families))
        writer = _Writer(draw, lexicon, external)
        for _ in range(draw.randint(*(_LONG_VISITS if draw.random() < _LONG else _VISITS))):
            templates: Sequence[str] = families[family]
            size = min(len(templates), draw.randint(*_SENTENCES))
            for place in sorted(draw.sample(range(len(templates)), size)):
                writer.sentence(templates[place])
        notes.append(Note(writer.text, tuple(writer.spans), family))
    return notes
