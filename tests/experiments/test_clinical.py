"""The clinical recipe without its training: notes, labellers, unions, tags, scores, JSON, windows, refusals."""

from __future__ import annotations

import json
import random
import sys
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments" / "clinical"))

import run
from extraction import json_labeller, tagger
from extraction.grammar import MOST_OF_A_KIND, grammars, runs_of_words, schema_of
from extraction.json_labeller import Answers, answer_for, rows_of, sentences_of
from extraction.labellers import lexicon_labeller, rule_labeller
from extraction.notes import INNER_FAMILIES, LABEL, Note, Span, _Writer, mistyped, write_notes
from extraction.scores import counts, difference, f1, score, seqeval_f1
from extraction.tags import TAGS, LabelError, check_classes, spans_of, tags_of, words_of, write_tagged
from extraction.terms import KINDS, split_terms
from extraction.unions import best_unions, labelled_by, unions, united

LEXICON = split_terms(0)
NOTES = write_notes(40, LEXICON, "test")
EXTERNAL = write_notes(40, LEXICON, "test", external=True)


def named(note: Note, kind: str) -> set[str]:
    return {note.text[span.start : span.end] for span in note.spans if span.kind == kind}


# Notes


def test_notes_say_that_they_are_synthetic_and_depend_on_the_seed_only() -> None:
    assert LABEL == "SYNTHETIC NOTE." and all(note.text.startswith(LABEL) for note in (*NOTES, *EXTERNAL))
    assert write_notes(40, LEXICON, "test") == NOTES != write_notes(40, LEXICON, "other")
    assert split_terms(0) == LEXICON != split_terms(1)


def test_external_notes_have_their_own_templates_and_terms() -> None:
    assert not {note.family for note in NOTES} & {note.family for note in EXTERNAL}
    for kind in ("disease", "medication", "symptom"):
        held_out = {term.name for term in LEXICON.held_out[kind]}
        assert len(held_out) > 5 and not held_out & {term.name for term in LEXICON.inner[kind]}
        assert not held_out & {name for note in NOTES for name in named(note, kind)}
        assert held_out & {name for note in EXTERNAL for name in named(note, kind)}


def test_what_is_denied_or_of_relatives_is_in_the_text_and_not_gold() -> None:
    writer = _Writer(random.Random(0), LEXICON, external=False)
    every = [template for family in INNER_FAMILIES.values() for template in family]
    negative = [each for each in every if any(slot in each for slot in ("{d}", "{s}", "{m}")) and "{S}" not in each]
    assert len(negative) > 10
    for template in negative:
        writer.sentence(template)
    assert not writer.spans and len(writer.text) > 300
    writer.sentence("{D} with {S} on {medication} {dose} {route} {frequency}.")
    assert [span.kind for span in writer.spans] == ["disease", "symptom", *KINDS[1:5]]


def test_typing_errors_keep_the_first_letter() -> None:
    for seed in range(30):
        wrong = mistyped("asthma", random.Random(seed))
        assert wrong[0] == "a" and len(wrong) in (5, 6) and set(wrong) <= set("asthma")


# Tags


def test_spans_and_tags_are_the_same_thing() -> None:
    for note in (*NOTES, *EXTERNAL):
        assert spans_of(note.text, tags_of(note.text, note.spans)) == list(note.spans)
    assert tags_of("no pain", [Span(0, 4, "symptom")]) == ["B-symptom", "I-symptom"]
    assert spans_of("a b c", ["I-dose", "I-route", "O"]) == [Span(0, 1, "dose"), Span(2, 3, "route")]


@pytest.mark.parametrize("span", [Span(3, 20, "dose"), Span(-1, 2, "dose"), Span(4, 4, "dose"), Span(5, 2, "dose")])
def test_spans_outside_of_the_text_are_refused(span: Span, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"note 2: the span .* does not lie within the text of 7 characters"):
        write_tagged(tmp_path / "a.jsonl", ["fine", "no pain"], [[], [span]])
    assert not list(tmp_path.iterdir())


def test_kinds_that_the_tagger_does_not_have_and_empty_classes_are_refused() -> None:
    with pytest.raises(LabelError, match="the kind 'gene' is none of disease, medication"):
        tags_of("BRCA1", [Span(0, 5, "gene")])
    spans = [[Span(0, 1, kind)] for kind in KINDS]
    check_classes(spans, "the labels")
    with pytest.raises(LabelError, match="the labels: no note has a span of the kind route; add"):
        check_classes([each for each in spans if each[0].kind != "route"], "the labels")


# Labellers and their unions


def test_rules_leave_out_what_is_denied_and_the_lexicon_does_not() -> None:
    text = "Pt denies chest pain; has nausea. Mother had cirrhosis. Takes 20 mg PO BID."
    found = {text[s.start : s.end]: s.kind for s in rule_labeller(text)}
    assert found == {"nausea": "symptom", "20 mg": "dose", "PO": "route", "BID": "frequency"}
    everything = {text[s.start : s.end] for seed in range(8) for s in lexicon_labeller(seed)(text)}
    assert everything == {"chest pain", "nausea", "cirrhosis"}


def test_a_union_keeps_the_longest_of_spans_that_overlap() -> None:
    short, long, other = Span(6, 10, "symptom"), Span(0, 10, "disease"), Span(12, 14, "dose")
    assert united([[short, other], [long]]) == [long, other]
    assert unions("abc") == [("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]


def test_the_best_union_is_chosen_for_each_kind_and_the_smallest_of_equal_ones() -> None:
    notes = [Note("x" * 20, (Span(0, 2, "disease"), Span(4, 6, "disease"), Span(8, 9, "dose")), "a")]
    labels = {
        "one": [[Span(0, 2, "disease"), Span(8, 9, "dose")]],
        "two": [[Span(4, 6, "disease"), Span(10, 11, "dose")]],
    }
    best, table = best_unions(labels, notes)
    assert best["disease"] == ("one", "two") and best["dose"] == ("one",) and len(table) == 3
    assert labelled_by(best, labels) == [list(notes[0].spans)]


# Scores


def test_f1_is_strict_or_by_overlap() -> None:
    gold = [[Span(0, 5, "dose"), Span(10, 12, "route")], [Span(0, 3, "dose")]]
    given = [[Span(0, 4, "dose"), Span(10, 12, "route"), Span(20, 22, "route")], []]
    assert f1(counts(gold, given).sum(axis=0)) == pytest.approx(2 / 6)
    assert f1(counts(gold, given, overlap=True).sum(axis=0)) == pytest.approx(2 * (2 / 3) ** 2 / (4 / 3))
    assert f1(counts(gold, given, "dose").sum(axis=0)) == 0
    assert f1(counts(gold, gold, "symptom").sum(axis=0)) == 0
    scores = score(gold, given, 0)
    assert scores["all"]["strict"]["f1"] == 0.3333
    low, high = scores["route"]["strict"]["interval"]
    assert low <= scores["route"]["strict"]["f1"] <= high


def test_differences_are_paired() -> None:
    gold = [list(note.spans) for note in NOTES]
    worse = [spans[1:] for spans in gold]
    changed = difference(gold, gold, worse, 0)["all"]
    assert changed["interval"][0] < changed["change"] < changed["interval"][1] < 0
    assert difference(gold, worse, worse, 0)["all"] == {"change": 0.0, "interval": [0.0, 0.0]}


def test_strict_f1_is_that_of_seqeval() -> None:
    pytest.importorskip("seqeval")
    texts, gold = [note.text for note in NOTES], [list(note.spans) for note in NOTES]
    given = [rule_labeller(text) for text in texts]
    tags = [list(map(tags_of, texts, spans)) for spans in (gold, given)]
    assert 0 < seqeval_f1(*tags) == pytest.approx(f1(counts(gold, given).sum(axis=0)))


# Sentences and their JSON


def test_sentences_hold_every_span_and_their_json_gives_it_back() -> None:
    for note in (*NOTES, *EXTERNAL):
        places = sentences_of(note.text)
        assert "".join(note.text[a:b] for a, b in places).replace(" ", "") == note.text.replace(" ", "")
        answers = Answers([[]], 0)
        for start, end in places:
            written = answer_for(note.text, note.spans, start, end)
            json_labeller._take(answers, 0, note.text, start, end, written)
        assert answers.invalid_json == answers.not_in_the_text == 0
        assert counts([answers.spans[0]], [list(note.spans)])[0].tolist()[1::2] == [len(note.spans)] * 2
    rows = rows_of(NOTES[:2])
    assert len(rows) > 8 and all(row.answer.startswith("{") and row.prompt.endswith("JSON:\n") for row in rows)


def test_the_schema_of_a_sentence_allows_what_stands_there_and_nothing_else() -> None:
    assert runs_of_words("take 2.5 mg, or PO") == [
        "take",
        "take 2.5",
        "take 2.5 mg",
        "2.5",
        "2.5 mg",
        "mg",
        "or",
        "or PO",
        "PO",
    ]
    for note in (*NOTES, *EXTERNAL):
        for start, end in sentences_of(note.text):
            answer = json.loads(answer_for(note.text, note.spans, start, end))
            schema = schema_of(note.text[start:end])
            assert answer.keys() <= schema["properties"].keys() == set(KINDS)
            assert all(0 < len(strings) <= MOST_OF_A_KIND for strings in answer.values())
            assert {string for strings in answer.values() for string in strings} <= set(schema["$defs"]["run"]["enum"])


def test_the_grammar_accepts_the_gold_answers_and_no_other_strings() -> None:
    xgrammar = pytest.importorskip("xgrammar")
    tokenizer = tagger.new_tokenizer([note.text for note in NOTES], 400)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=len(tokenizer)))
    grammar_of = grammars(model, tokenizer)  # type: ignore[arg-type]
    text = NOTES[0].text
    for start, end in sentences_of(text):
        grammar = grammar_of(text[start:end])
        assert xgrammar.GrammarMatcher(grammar).accept_string(answer_for(text, NOTES[0].spans, start, end))
        for wrong in ('{"gene": [', '{"disease": ["unheard', '{"disease": []', "[", '{ "'):
            assert not xgrammar.GrammarMatcher(grammar).accept_string(wrong)


def test_answers_that_cannot_be_used_are_counted() -> None:
    text = "Fever. Cough and more cough."
    answers = Answers([[]], 4)
    for written in ('{"symptom": ["cough"', '{"gene": ["cough"]}', '{"dose": []}'):
        json_labeller._take(answers, 0, text, 7, len(text), written)
    assert answers.invalid_json == 3 and answers.spans == [[]]
    json_labeller._take(answers, 0, text, 7, len(text), '{"symptom": ["cough", "cough", "Fever", " "]}')
    assert answers.spans == [[Span(22, 27, "symptom")]] and answers.not_in_the_text == 3


# Long documents


class _ByToken:
    """A tagger whose answer for a token depends on that token alone."""

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        assert input_ids.shape[1] <= tagger.WINDOW and attention_mask.shape == input_ids.shape
        return SimpleNamespace(logits=torch.eye(len(TAGS))[input_ids % len(TAGS)])


def test_long_documents_are_read_to_their_end() -> None:
    tokenizer = tagger.new_tokenizer([note.text for note in NOTES], 400)
    texts = [" ".join(note.text for note in NOTES[:8]), "Short.", NOTES[9].text]
    found = tagger.find(_ByToken(), tokenizer, texts)  # type: ignore[arg-type]
    for text, spans in zip(texts, found, strict=True):
        words = [text[start:end] for start, end in words_of(text)]
        starts = accumulate([len(word) + 1 for word in words], initial=0)
        whole = tokenizer(" ".join(words), verbose=False)
        tokens = [whole["input_ids"][whole.char_to_token(start)] for start, _ in zip(starts, words, strict=False)]
        assert spans == spans_of(text, [TAGS[token % len(TAGS)] for token in tokens])
    packed = tagger.pack(texts, None, tokenizer)
    assert packed.documents is not None and packed.documents.bincount().tolist()[0] > 5
    assert spans_end(found[0]) > len(texts[0]) - 100


def spans_end(spans: list[Span]) -> int:
    return max(span.end for span in spans)


# The command


def test_the_command_refuses_what_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for more, expected in (
        ([str(tmp_path)], "holds other files; give a folder that is new or empty"),
        ([str(tmp_path / "new"), "--price-per-hour", "0"], "--price-per-hour is 0.0; allowed: more than 0"),
        ([str(tmp_path / "new"), "--llm", str(tmp_path)], "is not the directory of a checkpoint"),
    ):
        monkeypatch.setattr(run, "EXTRA", ())
        monkeypatch.setattr(sys, "argv", ["run.py", *more])
        assert run.main() == 2
        assert expected in capsys.readouterr().err
    monkeypatch.setattr(run, "EXTRA", ("no_such_module",))
    assert run.main() == 2
    assert "no_such_module cannot be imported; run: pip install no_such_module" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
