"""Labellers that need no model: a lexicon as an ontology gives one, and rules. Both are partial on purpose.

The lexicon knows names, of the kinds that ontologies have, and no abbreviations; it does not read what is around them.
The rules know how doses, routes and frequencies are written, endings of drug and disease names, and common
abbreviations, and leave out what is denied or said of relatives (after NegEx: Chapman et al., A simple algorithm for
identifying negated findings and diseases in discharge summaries, 2001).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable

from extraction.notes import Span
from extraction.terms import TERMS

Labeller = Callable[[str], list[Span]]
#: Share of all terms (held-out ones too) that the lexicon has.
_KNOWN = 0.7

_RULES: dict[str, str] = {
    "dose": r"\b\d+(?:\.\d+)? ?(?:mg|mcg|g|mL|units?)\b",
    "route": r"\b(?:PO|IV|IM|SC|by mouth|orally|inhaled|intravenously)\b",
    "frequency": r"\b(?:(?:once |twice |three times )?daily|[BTQ]ID|QHS|q\d+h|every \d+ hours"
    r"|as needed|PRN)\b",
    "medication": r"\b[a-z]{3,}(?:pril|sartan|statin|olol|prazole|cillin|mycin|floxacin|oxetine|pram|gliptin|gliflozin"
    r"|xaban|dipine|cycline|azole|parin|idone|pine)\b",
    "disease": r"\b(?:[a-z]{3,}(?:itis|emia|osis|thyroidism|oma)|(?:breast|lung|colon|prostate) cancer"
    r"|HTN|T[12]DM|CHF|CAD|CKD|COPD|AF|GERD|DVT|UTI)\b",
    "symptom": r"\b(?:(?:chest|abdominal|back|joint|ear) pain|shortness of breath|SOB|CP|HA|nausea|vomiting|fever|cough"
    r"|fatigue|dizziness|headache|[a-z]+ swelling|weight (?:loss|gain))\b",
}
#: What takes these findings away from the patient, up to the end of the sentence or of its part.
_TRIGGERS = re.compile(
    r"\b(?:den(?:y|ies|ied)|no|not|without|negative for|never had|no (?:signs|evidence) of|rule out|family history|FHx?"
    r"|mother|father|brother|sister|grandmother|uncle|allergic to|stop|held|discontinued)\b|\?",
    re.IGNORECASE,
)
_SCOPE_ENDS = re.compile(r"[.;:]|\bbut\b|\bpositive for\b")


def lexicon_labeller(seed: int) -> Labeller:
    """Return a labeller by a lexicon that has seven in ten of all names, chosen by the seed."""
    draw = random.Random(f"lexicon {seed}")
    known = {
        kind: draw.sample([term.name for term in terms], round(_KNOWN * len(terms))) for kind, terms in TERMS.items()
    }
    patterns = {
        kind: re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})\b", re.IGNORECASE)
        for kind, names in known.items()
    }
    return lambda text: _found(text, patterns.items())


def rule_labeller(text: str) -> list[Span]:
    """Return what the rules find."""
    found = _found(text, ((kind, re.compile(pattern)) for kind, pattern in _RULES.items()))
    scopes = _scopes(text)
    return [span for span in found if not any(start <= span.start < end for start, end in scopes)]


def _scopes(text: str) -> list[tuple[int, int]]:
    """Return the parts of the text that are not said of the patient."""
    found = []
    for trigger in _TRIGGERS.finditer(text):
        end = _SCOPE_ENDS.search(text, trigger.end())
        found.append((trigger.start(), end.start() if end else len(text)))
    return found


def _found(text: str, patterns: Iterable[tuple[str, re.Pattern[str]]]) -> list[Span]:
    return sorted(Span(*match.span(), kind) for kind, pattern in patterns for match in pattern.finditer(text))
