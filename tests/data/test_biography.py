"""Texts about a character: statements by rule, names, and what is refused."""

from dataclasses import replace

import pytest

from persona import data
from persona.data import biography
from persona.data.biography import BiographyConfig, statements_of
from persona.errors import UserError

SHEET = """\
Name: Mira Holm.
Age: 41
Favourite Food: Pea soup, which she cooks on Thursdays.

Hobbies: Mira carves spoons.
Mira has never owned a car.
"""
PROSE = """\
# Mira Holm

Mira Holm was born in a lighthouse. Her mother kept the lamp: every evening, at six.

She became a carpenter.
"""


def test_a_sheet_gives_one_statement_a_line_each_naming_the_character(tmp_path):
    path = tmp_path / "wiki_m.txt"
    path.write_text(SHEET)
    persona = biography.read(path)
    assert persona.id == "m" and persona.attributes == {"name": "Mira Holm"} and persona.description == SHEET.strip()
    assert persona.statements == (
        "Mira Holm's age: 41",
        "Mira Holm's favourite food: Pea soup, which she cooks on Thursdays.",
        "Mira carves spoons.",
        "Mira has never owned a car.",
    )


def test_prose_gives_paragraphs_and_no_statements(tmp_path):
    path = tmp_path / "Mira_Holm.txt"
    path.write_text(PROSE)
    persona = biography.read(path)
    assert persona.attributes == {"name": "Mira Holm"} and persona.statements == ()
    assert [paragraph[:10] for paragraph in biography.paragraphs(PROSE)] == ["Mira Holm ", "She became"]


def test_a_name_counts_as_a_whole_word():
    assert biography.names("The spoons of HOLM are known.", "Mira Holm")
    assert not biography.names("Stockholm is far away.", "Mira Holm")
    assert biography.names("Bo sings.", "Bo") and not biography.names("She sings.", "Bo")


def test_every_question_is_asked_of_every_character(tmp_path):
    (tmp_path / "a.txt").write_text(SHEET)
    (tmp_path / "b.txt").write_text(PROSE)
    people = data.load(BiographyConfig(path=str(tmp_path)))
    assert len(people.test) == 20 and not people.train and {s.persona.id for s in people.test} == {"a", "b"}
    assert people.test[0].messages[0].content.startswith("You are Mira Holm.")
    assert "You are b." in people.test[-1].messages[0].content
    (tmp_path / "q").write_text("Who are you?\n\nWho are you?\nWhere?\n")
    people = data.load(BiographyConfig(path=str(tmp_path / "b.txt"), character="Mira", questions=str(tmp_path / "q")))
    assert [sample.messages[1].content for sample in people.test] == ["Who are you?", "Where?"]
    assert people.test[0].persona.attributes == {"name": "Mira"}


def test_questions_to_train_on_and_statements_that_a_model_took_out(tmp_path):
    (tmp_path / "b.txt").write_text(PROSE)
    (tmp_path / "q").write_text("Where do you live?\n")
    (tmp_path / "b.json").write_text('[{"character": "Mira", "passage": "", "statement": "Mira carves."}]')
    config = BiographyConfig(path=str(tmp_path / "b.txt"), character="Mira", train_questions=str(tmp_path / "q"))
    people = data.load(replace(config, statements=str(tmp_path)))
    assert [sample.messages[1].content for sample in people.train] == ["Where do you live?"]
    assert {sample.persona.statements for sample in (*people.train, *people.test)} == {("Mira carves.",)}
    (tmp_path / "b.json").write_text('[{"statement": "She carves."}]')
    with pytest.raises(UserError, match="b.json, statement 1, does not name Mira"):
        data.load(replace(config, statements=str(tmp_path)))
    with pytest.raises(UserError, match="should be a JSON list of objects with 'statement'"):
        data.load(replace(config, statements=str(tmp_path / "none")))


def test_bad_input_is_one_sentence_each(tmp_path):
    def refused(words, **settings):
        with pytest.raises(UserError, match=words):
            data.load(BiographyConfig(**settings))

    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Renée".encode("latin-1"))
    (tmp_path / "none").mkdir()
    refused("data.path has no value")
    refused("could not be read: No such file", path=str(tmp_path / "missing.txt"))
    refused("empty.txt is empty; it should be a text about one character", path=str(tmp_path / "empty.txt"))
    refused("is not UTF-8 text, at byte 3", path=str(tmp_path / "latin.txt"))
    refused("holds no text", path=str(tmp_path / "none"))
    refused("names one character, but .* holds 2 texts", path=str(tmp_path), character="Mira")
    (tmp_path / "a.txt").write_text(SHEET)
    refused("holds no question", path=str(tmp_path / "a.txt"), questions=str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match=r"m.txt, line 3, statement 1, does not name Mira: 'Never owned a car.'"):
        statements_of("Age: 41\nJob: carpenter\nNever owned a car.", "Mira", "m.txt")
