"""Statements and constitutions in the prompt: which ones, in which order, in whose words."""

from __future__ import annotations

import pytest
from scorer_toys import save_bert

from persona.encoders import EncoderConfig
from persona.errors import UserError
from persona.methods import load_personalizer
from persona.methods.statements import Constitution, ConstitutionConfig, Statements, StatementsConfig
from persona.metrics.apc import RELEVANCE_TEMPLATE, Classifier, relevance_order
from persona.town import assistant_documents as assistant
from persona.town import lexicon as lx
from persona.town.people import people
from persona.types import Message, Persona, Request

FACTS = ("Ada sails a boat.", "Ada likes rain.", "Ada has a red house.", "Ada fears the fox.")
ADA = Persona("ada-1", statements=FACTS)
ROLE = "Play Ada."


def ask(text: str, persona: Persona | None = ADA, system: str = ROLE) -> Request:
    head = (Message("system", system),) if system else ()
    return Request((*head, Message("user", text)), persona)


def system(personalizer, request: Request) -> str:
    (done,) = personalizer.prompt([request])
    assert done.messages[1:] == request.messages[-1:] and done.messages[0].role == "system"
    return done.messages[0].content


@pytest.fixture
def folder(tmp_path):
    """Prompts of one's own, short enough to be compared whole."""
    (tmp_path / "statements.md").write_text("{{ statements | join('|') }} ({{ role }})")
    (tmp_path / "constitution.md").write_text("{{ traits | join('|') }}")
    return str(tmp_path)


def test_all_gives_everything_in_order(llama, folder):
    everything = Statements(StatementsConfig("all", k=1, prompts=folder), llama)
    assert system(everything, ask("boat")) == f"{'|'.join(FACTS)} (Play Ada.)"
    assert system(everything, ask("boat", system="")) == f"{'|'.join(FACTS)} ()"
    for nothing in (ask("boat", None), ask("boat", Persona("bob"))):
        assert everything.prompt([nothing]) == [nothing]


def test_bm25_takes_the_nearest_k_best_first_and_breaks_ties_by_order(llama, folder):
    rag = Statements(StatementsConfig("bm25", k=2, prompts=folder), llama)
    # "red" and "house." stand in the third statement only; the others tie at zero.
    assert system(rag, ask("a red house.")) == f"{FACTS[2]}|{FACTS[0]} (Play Ada.)"
    assert rag.choose([ask("nothing of this")]) == [list(FACTS[:2])]
    assert rag.choose([ask("rain.")])[0][0] == FACTS[1]


def test_dense_ranks_like_its_encoder_and_a_request_does_not_depend_on_its_company(llama, encoder_folder, folder):
    encoder = EncoderConfig(name=str(encoder_folder), pooling="mean")
    rag = Statements(StatementsConfig("dense", k=3, prompts=folder, encoder=encoder), llama)
    asked = [ask("the red house"), ask("good morning", Persona("eve")), ask("boats", None), ask("rain")]
    together = rag.prompt(asked)
    assert together == [rag.prompt([one])[0] for one in asked]
    query, lines = rag.dense.encoder.encode(["rain"], query=True)[0], rag.dense.encoder.encode(list(FACTS))
    expected = sorted(range(4), key=lambda place: (-float(lines[place] @ query), place))[:3]
    assert rag.choose([asked[3]]) == [[FACTS[place] for place in expected]]


def test_relevance_ranks_by_the_discriminators_yes(llama, folder, tmp_path):
    model = save_bert(tmp_path / "model", ("no", "yes"))
    rag = Statements(StatementsConfig("relevance", k=3, prompts=folder, relevance_model=model), llama)
    asked = [ask("the red house"), ask("hi", Persona("eve")), ask("boats", None), ask("rain")]
    for request, chosen in zip(asked, rag.choose(asked), strict=True):
        assert chosen == rag.choose([request])[0]
    items = [{"character": "ada-1", "statement": fact, "query": "rain"} for fact in FACTS]
    yes = Classifier(model, "x", relevance_order, RELEVANCE_TEMPLATE)(items)["yes"]
    assert len(set(yes)) == 4
    assert rag.choose(asked)[3] == [FACTS[place] for place in sorted(range(4), key=lambda place: -yes[place])[:3]]
    assert rag.choose(asked)[1:3] == [[], []] and rag.prompt([]) == []


def test_english_words_give_statements_first_and_the_role_last(llama):
    assert system(Statements(StatementsConfig("all"), llama), ask("boat")) == "\n".join(FACTS) + "\n\nPlay Ada."
    asked = ask("boat", Persona("me", statements=("I am shy.", "I hum.")))
    text = system(Constitution(ConstitutionConfig()), asked)
    assert "\n\n1: I am shy.\n2: I hum.\n\n" in text and text.endswith("\n\nPlay Ada.")


def test_town_words_are_those_of_the_documents_its_lm_has_read(llama):
    told = people(train=0, dev=1, test=0, with_truth=True).dev[0]
    role, whole = f"you are {told.persona.id.split('-')[0]} .", told.persona.description
    everything = Statements(StatementsConfig("all", prompts="town"), llama)
    assert system(everything, ask("hi", told.persona, role)) == whole  # a described document of the town
    traits = tuple(lx.CHARACTER)[:3]
    kept = Persona("kind", statements=tuple(lx.CHARACTER[trait][0] for trait in traits))
    assert system(Constitution(ConstitutionConfig("town")), ask("hi", kept, "")) == assistant.constitution(traits)


def test_no_traits_no_prompt(folder):
    asked = [ask("hi", None), ask("hi", Persona("me"))]
    assert Constitution(ConstitutionConfig(folder)).prompt(asked) == asked


def test_another_wording_is_another_personalizer(llama, folder):
    files = [Statements(StatementsConfig("all", prompts=name), llama) for name in ("english", "town", folder)]
    assert len({personalizer.fingerprint for personalizer in files}) == 3


def test_mistakes_are_named(llama, tmp_path):
    for settings, message in (
        ({"ranker": "bm52"}, "no ranker 'bm52' of statements; did you mean bm25"),
        ({"k": 0}, "needs k of at least 1, not 0"),
        ({"ranker": "relevance"}, "relevance_model has no value"),
        ({"rankr": "all"}, "no setting 'rankr'; did you mean ranker"),
        ({"prompts": str(tmp_path / "none")}, "none/statements.md could not be read"),
    ):
        with pytest.raises(UserError, match=message):
            load_personalizer({"statements": settings}, llama)
    (tmp_path / "statements.md").write_text("{{ statement }}")
    with pytest.raises(UserError, match="no value for its slot statement"):
        load_personalizer({"statements": {"prompts": str(tmp_path)}}, llama)
    (tmp_path / "constitution.md").write_text("=== system ===\n{{ traits }}\n=== user ===\nhi\n")
    with pytest.raises(UserError, match="constitution.md should hold one message"):
        load_personalizer({"constitution": {"prompts": str(tmp_path)}}, llama)


def test_settings_survive_saving(llama):
    one = load_personalizer({"statements": {"ranker": "all", "prompts": "town"}}, llama)
    assert load_personalizer({"statements": one.config()}, llama).settings == one.settings


def test_the_baseline_says_what_the_teacher_of_character_training_is_told_but_for_silence_about_it():
    from persona.methods.character.prompts import PromptSet

    traits = ["I am shy.", "I hum."]
    for prompts in ("english", "town"):
        teacher = PromptSet.open(prompts, "Ada").fill("teacher", traits=traits, prompt="hi")[0].content
        ours = Constitution(ConstitutionConfig(prompts)).text(Persona("me", statements=tuple(traits)))
        assert teacher.replace("You are Ada, an", "You are an").startswith(ours)
