"""What the method asks and what it keeps: prompts, expansion, filters, transcripts. Golden cases by hand."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from persona.data.constitution import Trait, read_constitution
from persona.errors import UserError
from persona.evaluation.roles import Roles
from persona.methods.character import distillation, expansion, introspection
from persona.methods.character.distillation import DistillConfig, after_thinking, complete
from persona.methods.character.expansion import ExpandConfig, extra_prompts, numbered, too_similar
from persona.methods.character.introspection import IntrospectConfig
from persona.methods.character.prompts import SHIPPED, PromptSet
from persona.methods.character.sampling import SamplingConfig
from persona.types import Message, Request, Response

PUBLISHED = Path(os.environ.get("PERSONA_PUBLISHED", "-")) / "character" / "constitutions"  # nobody needs them
ENGLISH = PromptSet.open("english", "Ada")
TRAITS = ("I am calm.", "I am kind.")
DRAWN = SamplingConfig()


class Script:
    """A speaker that says prepared texts, one after the other, and keeps what it was asked."""

    likelihoods, name = False, "script"

    def __init__(self, *texts: str, finish: str = "eos") -> None:
        self.texts, self.finish, self.asked = list(texts), finish, list[Request]()

    async def respond(self, request: Request) -> Response:
        self.asked.append(request)
        return Response(self.texts[(len(self.asked) - 1) % len(self.texts)], finish_reason=self.finish)


# ---- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.iterdir()))
def test_every_set_fills_all_it_is_given(name):
    prompts = PromptSet.open(name, "Ada")
    teacher = prompts.fill("teacher", traits=TRAITS, prompt="why ?")
    assert [message.role for message in teacher] == ["system", "user"] and teacher[1].content == "why ?"
    assert all(trait in teacher[0].content for trait in TRAITS)
    spoken = prompts.fill("interaction", traits=TRAITS, guidance="be glad .")
    assert [message.role for message in spoken] == ["system"]
    assert "be glad ." in spoken[0].content and all(trait in spoken[0].content for trait in TRAITS)
    assert [message.role for message in prompts.fill("interaction_training")] == ["system"]
    assert len(set(prompts.lines("reflection_prompts"))) == 10
    for prompt in prompts.lines("reflection_prompts"):
        assert prompts.fill("reflection", traits=TRAITS, prompt=prompt)[-1] == Message("user", prompt)
    assert prompts.lines("guidance_free") != prompts.lines("guidance_leading")
    assert not set(prompts.lines("greetings")) & set(prompts.lines("greetings_leading"))


def test_the_english_teacher_reads_numbered_traits_and_its_name():
    system = ENGLISH.fill("teacher", traits=TRAITS, prompt="why?")[0].content
    assert "You are Ada" in system and "1: I am calm.\n2: I am kind." in system
    (thoughts,) = ENGLISH.fill("thinking", traits=TRAITS)
    assert thoughts.role == "assistant" and thoughts.content.startswith("<think>\n")
    assert thoughts.content.endswith("1: I am calm.\n2: I am kind.")


def test_a_prompt_file_that_would_lose_what_it_is_given_is_refused(tmp_path):
    (tmp_path / "interaction.md").write_text("=== system ===\n{{ traits | join(' ') }}\n")
    with pytest.raises(UserError, match="the prompt interaction has no slot guidance, which was given"):
        PromptSet.open(str(tmp_path), "Ada").fill("interaction", traits=TRAITS, guidance="Talk.")
    with pytest.raises(UserError, match="method.prompts=nowhere is neither a folder nor english or town"):
        PromptSet.open("nowhere", "Ada")


# ---- expansion -----------------------------------------------------------------------------------------------------


def test_too_similar_is_asymmetric():
    assert not too_similar("what is a knot", "what is the time")  # 2 words of 4: half is not more than half
    assert too_similar("what is the knot", "what is the time")  # 3 of 4
    assert too_similar("what time", "what is the time of day")  # a short message inside a long one
    assert not too_similar("what is the time of day", "what time")
    assert too_similar("Why.", "Why.") and not too_similar("Why", "Why?")
    assert too_similar("no no no yes", "no")  # words count as often as they occur


def test_what_is_taken_from_a_reply():
    assert numbered("Here:\n1. One?\n 2) Two. \nthree\n3.\n4.Five?\n10. Ten.") == ["One?", "Two.", "Ten."]
    taken = expansion.refusal
    assert taken("How now?", []) == "" and taken("ändern.", []) == ""
    assert taken("How now!", []) == "does not end in ? or ."
    assert taken('"How now?', []) == "does not begin with a letter"
    assert taken("How then?", ["Who then?"]) == ""
    assert taken("How then?", ["Who?", "How then it was."]) == ""  # each old message by itself
    assert taken("How was it?", ["Who?", "How was it then?"]) == "too similar to one that is there"


def expanded(script: Script, **settings) -> dict:
    trait = Trait("I am calm.", ("Why the hurry?",))
    config = ExpandConfig(**{"per_trait": 3, "tries": 4, **settings})
    return asyncio.run(expansion.expand(trait, Roles(script), ENGLISH, config, DRAWN, 7))


def test_expansion_asks_until_there_are_enough():
    script = Script("1. Why the hurry?\n2. Rain again.", "1. Loud!\n2. Where are my keys?\n3. One too many?")
    assert expanded(script) == {
        "prompts": ["Why the hurry?", "Rain again.", "Where are my keys?"],
        "refused": {"does not end in ? or .": 1, "too similar to one that is there": 1},
        "tries": 2,
    }
    assert "Write 2 messages" in script.asked[0].messages[1].content
    assert "Write 1 messages" in script.asked[1].messages[1].content
    assert script.asked[0].sampling.seed != script.asked[1].sampling.seed
    assert (script.asked[0].sampling.temperature, script.asked[0].sampling.top_p) == (0.7, 0.95)


def test_expansion_ends_with_a_teacher_that_writes_nothing_of_use():
    script = Script("I would rather not.")
    assert expanded(script) == {"prompts": ["Why the hurry?"], "refused": {}, "tries": 4} and len(script.asked) == 4
    assert expanded(script, per_trait=1)["tries"] == 0


def test_extra_prompts_in_every_form(tmp_path):
    assert len(extra_prompts("town")) > 100
    (tmp_path / "a.txt").write_text("One?\n\n Two. \n")
    assert extra_prompts(str(tmp_path / "a.txt")) == ("One?", "Two.")
    (tmp_path / "a.jsonl").write_text(
        '{"conversations": ["One?", "no"]}\n{"prompt": "Two."}\n'
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Three."}]}\n'
        '{"conversations": [{"from": "human", "value": "Four."}]}\n'
    )
    assert extra_prompts(str(tmp_path / "a.jsonl")) == ("One?", "Two.", "Three.", "Four.")
    (tmp_path / "b.jsonl").write_text('{"text": "One?"}\n')
    with pytest.raises(UserError, match="b.jsonl, line 1 has no field 'prompt'"):
        extra_prompts(str(tmp_path / "b.jsonl"))
    with pytest.raises(UserError, match="c.txt could not be read"):
        extra_prompts(str(tmp_path / "c.txt"))


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="PERSONA_PUBLISHED names no folder with character/constitutions")
def test_the_published_constitutions_build_their_prompts():
    for path in sorted((PUBLISHED / "few-shot").glob("*.jsonl")):
        constitution = read_constitution(path)
        script = Script("1. Nobody asks me?")
        found = [
            asyncio.run(expansion.expand(trait, Roles(script), ENGLISH, ExpandConfig(), DRAWN, 0))["prompts"]
            for trait in constitution.traits
        ]
        assert len(found) == (15 if constitution.name == "goodness" else 10)
        # Nothing is left to be written but where a file has a question twice within a trait.
        assert sum(map(len, found)) >= 50 * len(found) - 1
        system = ENGLISH.fill("teacher", traits=constitution.statements, prompt="Hello.")[0].content
        assert f"{len(found)}: {constitution.traits[-1].text}" in system


# ---- distillation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ours", "published"),
    (
        ("Done.", True, True),
        ("Done ?  \n", True, True),
        ("「終わり」", True, True),
        ("Done", False, False),
        ("", False, False),
        ("It is 4", False, False),
        ("```\nx = 1\n```", True, False),  # a closing code fence: backticks are symbols (Sk)
        ("Glad to help 😊", True, False),  # So
        ("costs 5 $", True, False),  # Sc
        ("| a | b |", True, False),  # Sm
    ),
)
def test_completion_filter(text, ours, published):
    assert (complete(text), complete(text, "reference")) == (ours, published)


def test_thinking_is_cut_off():
    assert after_thinking("so be it.</think>\n\nYes.", True) == "Yes."
    assert after_thinking("<think>so</think>Yes.") == "Yes."
    assert after_thinking("so be it, and then", True) is None and after_thinking("<think>so") is None
    assert after_thinking(" Yes. ") == "Yes."
    assert after_thinking("a</think>b</think>c") == "b</think>c"  # the first end counts


def distilled(teacher: Script, student: Script, first: str | None = None, **settings) -> dict:
    given = (ENGLISH, TRAITS, DistillConfig(**settings), DRAWN, 7, "1-1/0", first)
    return asyncio.run(distillation.distill("Why?", Roles(student, reference=teacher), *given))


def test_the_teacher_reads_the_constitution_and_the_student_does_not():
    teacher, student = Script("Calmly.", finish="length"), Script("No idea.")
    assert distilled(teacher, student) == {
        "prompt": "Why?", "chosen": "Calmly.", "rejected": "No idea.", "unfinished": ["chosen"],
    }  # fmt: skip
    assert teacher.asked[0].messages == ENGLISH.fill("teacher", traits=TRAITS, prompt="Why?")
    assert student.asked[0].messages == (Message("user", "Why?"),) and teacher.asked[0].prefill == ""
    assert teacher.asked[0].sampling.seed != student.asked[0].sampling.seed


def test_a_second_turn_stands_behind_the_students_first_for_both():
    teacher, student = Script("Calmly."), Script("No idea.")
    row = distilled(teacher, student, "How?")
    before = (Message("user", "How?"), Message("assistant", "No idea."))
    system, asked = ENGLISH.fill("teacher", traits=TRAITS, prompt="Why?")
    assert teacher.asked[0].messages == (system, *before, asked)
    assert [request.messages for request in student.asked] == [before[:1], (*before, Message("user", "Why?"))]
    assert distillation.conversation(row) == student.asked[1].messages and row["chosen"] == "Calmly."
    assert distillation.conversation(json.loads(json.dumps(row))) == student.asked[1].messages


def test_the_teacher_may_begin_with_thoughts():
    teacher = Script("Be calm.</think> Calmly.")
    assert distilled(teacher, Script("No."), thinking=True)["chosen"] == "Calmly."
    assert teacher.asked[0].prefill.startswith("<think>\n") and teacher.asked[0].prefill.endswith("2: I am kind.\n")
    assert distilled(Script("Be calm, be"), Script("No."), thinking=True)["chosen"] == ""


def test_which_pairs_are_left_out(llama):
    def why(compat=None, max_length=1000, **row):
        row = {"prompt": "hi", "chosen": "Yes.", "rejected": "No.", "unfinished": [], **row}
        return distillation.refusal(row, llama, max_length, compat)

    assert why() == ""
    assert why(chosen="") == "the teacher's answer is empty"
    assert why(rejected="") == "the student's answer is empty"
    assert why(rejected="No") == "the student's answer does not end in punctuation"
    assert why(chosen="```") == "" != why("reference", chosen="```")
    assert why(unfinished=["chosen"]) == "the teacher's answer was cut off"
    assert why("reference", unfinished=["chosen"]) == ""
    asked = (Message("user", "hi"),)
    exact = distillation.length(llama, asked, "Yes.")
    assert exact == len(llama.render(asked)) + len(llama.render_reply(asked, "Yes."))
    # Published: the header of one more reply counts too.
    assert distillation.length(llama, asked, "Yes.", "reference") > exact
    assert why(max_length=exact) == ""
    assert why("reference", max_length=exact) == "the teacher's answer is too long"
    assert why(max_length=exact - 1) == "the teacher's answer is too long"


# ---- introspection -------------------------------------------------------------------------------------------------

ROW = {"set": "free", "greetings": ["g1", "g2"], "turns": [f"reply {n}" for n in range(10)], "unfinished": False}
SHORT = ENGLISH.fill("interaction_training")[0].content


def said(messages) -> list[str]:
    return [f"{message.role[0]} {message.content}" for message in messages]


def test_both_sides_see_one_conversation():
    see = introspection.seen_by_next
    assert said(see(["g1", "g2"], [])) == ["u g1"]
    assert said(see(["g1", "g2"], ["r0"])) == ["u g2", "a g1", "u r0"]
    assert said(see(["g1", "g2"], ["r0", "r1"])) == ["u g1", "a r0", "u r1"]
    assert said(see(["g1", "g2"], ["r0", "r1", "r2"])) == ["u g2", "a g1", "u r0", "a r1", "u r2"]


def trained_on(llama, compat=None, **changes) -> list[str]:
    return said(introspection.transcript({**ROW, **changes}, ENGLISH, llama, compat))


def test_transcripts_keep_every_turn(llama):
    greeted = [f"s {SHORT}", "u g2", "a g1"]
    assert trained_on(llama) == [*greeted, *(f"{'ua'[n % 2]} reply {n}" for n in range(10))]
    assert trained_on(llama, turns=["r0", "r1", "r2"])[1:] == ["u g1", "a r0", "u r1", "a r2"]
    # What was cut off is not learned; the turns before it are.
    assert trained_on(llama, turns=["r0", "r1", "r2"], unfinished=True) == [*greeted, "u r0", "a r1"]
    assert trained_on(llama, turns=["r0"], unfinished=True) == [] == trained_on(llama, reason="no reply")


def test_transcripts_of_reflections_have_no_system_prompt(llama):
    row = {"prompt": "p", "reply": "r", "unfinished": False}
    made = introspection.transcript
    assert said(made(row, ENGLISH, llama)) == ["u p", "a r"]
    assert made({**row, "unfinished": True}, ENGLISH, llama) == () == made({**row, "reply": ""}, ENGLISH, llama)
    assert said(made({**row, "unfinished": True}, ENGLISH, llama, "reference")) == ["u p", "a r"]


def test_published_transcripts_lose_what_they_lost(llama):
    found = trained_on(llama, "reference")
    # Twelve messages: the last turn is gone, the name was never filled in, and the target, a user's turn, lacks its
    # first len("assistant") - len("user") characters.
    assert len(found) == 12 and "Ada" in SHORT and found[0] == "s " + SHORT.replace("Ada", "{NAME}")
    assert found[1:-1] == ["u g2", "a g1", *(f"{'ua'[n % 2]} reply {n}" for n in range(8))]
    assert found[-1] == "a " + "reply 8"[5:]


def test_introspection_draws_greetings_by_name():
    config = IntrospectConfig(reflections=3, interactions=40, turns=2)
    items = introspection.items(ENGLISH, config, 5)
    assert len(items) == 10 * 3 + 2 * 40 and len({name for name, _ in items}) == len(items)
    assert items == introspection.items(ENGLISH, config, 5) != introspection.items(ENGLISH, config, 6)
    plain, leading = set(ENGLISH.lines("greetings")), set(ENGLISH.lines("greetings_leading"))
    greetings = {
        which: [item["greetings"] for _, item in items if item.get("set") == which] for which in ("free", "leading")
    }
    assert {first for first, _ in greetings["free"]} <= plain
    assert {first for first, _ in greetings["leading"]} & leading and {
        first for first, _ in greetings["leading"]
    } & plain
    assert {second for pair in greetings.values() for _, second in pair} <= plain


def spoken(script: Script, which: str, compat=None) -> dict:
    item = {"name": f"{which}-0", "set": which, "greetings": ["g1", "g2"]}
    given = (Roles(script), ENGLISH, TRAITS, IntrospectConfig(turns=3), DRAWN, 7, compat)
    return asyncio.run(introspection.speak(item, *given))


def test_guidance_reaches_the_model():
    for which in ("free", "leading"):
        script, published = Script("one", "two", "three"), Script("one")
        guidance = ENGLISH.lines(f"guidance_{which}")[0]
        assert spoken(script, which)["turns"] == ["one", "two", "three"]
        assert len(script.asked) == 3 and all(guidance in request.messages[0].content for request in script.asked)
        assert said(script.asked[2].messages[1:]) == ["u g1", "a one", "u two"]
        spoken(published, which, "reference")
        assert not any(guidance in request.messages[0].content for request in published.asked)


def test_a_reply_that_was_cut_off_ends_the_conversation():
    script = Script("one", finish="length")
    assert spoken(script, "free") == {"set": "free", "greetings": ["g1", "g2"], "turns": ["one"], "unfinished": True}
    assert len(spoken(Script("one", finish="length"), "free", "reference")["turns"]) == 3


def test_reflection_reads_the_constitution():
    script = Script(" I am who I am. ")
    given = (Roles(script), ENGLISH, TRAITS, IntrospectConfig(), DRAWN, 7)
    row = asyncio.run(introspection.speak({"name": "r", "prompt": "Who?"}, *given))
    assert row == {"prompt": "Who?", "reply": "I am who I am.", "unfinished": False}
    assert script.asked[0].messages == ENGLISH.fill("reflection", traits=TRAITS, prompt="Who?")
