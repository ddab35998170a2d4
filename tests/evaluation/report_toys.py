"""Toy results for the report: four benchmarks, several stacks, trivial answers, conversations, two judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from evaluation_toys import RESIDENTS, VOICES, Ratings, ToyModel, Voices, draw, toy_plots

from persona.evaluation.episodes import Benchmark, Cast, Trivial, run_benchmark
from persona.evaluation.judges.judging import Rubric, ScriptedJudge, Unreadable
from persona.evaluation.prompts import Prompt
from persona.evaluation.results import write_plots
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.types import Message, Persona, Request, Sample, Score

STACKS: dict[str, float | Trivial] = {
    "untouched": 0.35,
    "instruction only": 0.4,
    "Persona-Plug": 0.65,
    "Persona-Plug + character adapter": 0.7,
    "constant answer": Trivial("constant"),
    "random answer": Trivial("random"),
}
TOPICS = ("bakery", "boat trip", "choir", "market")


def read_level(text: str) -> float:
    if not text.startswith("Level "):
        raise Unreadable("no level is named")
    return float(text.split()[1])


RUBRICS = [
    Rubric(Prompt(name, f"How {name} is it? {{{{ talk }}}}"), read_level, (1.0, 5.0))
    for name in ("in_voice", "helpful")
]


def toy_judge(name: str, shift: float) -> ScriptedJudge:
    """Counts the right answers of a talk, with moods of its own; at times it dodges."""

    def reply(rubric: Rubric, slots: Mapping[str, object]) -> str:
        talk = str(slots["talk"])
        if draw(name, "dodge", talk, rubric.name) < 0.04:
            return "Hard to say. Both sides have a point."
        level = 1 + 4 * talk.count("right") / 3 + shift * (draw(name, talk, rubric.name) - 0.5)
        return f"Level {min(5, max(1, round(level)))} because the turns were read one by one."

    return ScriptedJudge(name, reply)


JUDGES = (toy_judge("strict-judge-7b @ temperature 0", 1.5), toy_judge("kind-judge-70b @ temperature 0", 2.5))


class Choices(Ratings):
    """The truth among four options, by level of difficulty."""

    name, version, primary = "choices", "2", "accuracy"
    metrics = {
        "length": Metric(False, description="characters of the reply"),
        "accuracy": Metric(description="share of right options"),
    }

    def samples(self) -> list[Sample]:
        result = []
        for i, sample in enumerate(super().samples()):
            options = tuple(str((int(sample.target) + shift - 1) % 5 + 1) for shift in (0, 1, 2, 3))
            turned = options[i % 4 :] + options[: i % 4]
            result.append(replace(sample, id=f"c{i:04}", options=turned, task="choice"))
        return result

    def groups(self, sample: Sample) -> Mapping[str, str]:
        i = int(sample.id[1:])
        return {"level": f"level {(1, 2, 10)[i % 3]}", "resident": RESIDENTS[i % len(RESIDENTS)]}

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        reply = await roles.model.respond(Request(sample.messages, sample.persona, options=sample.options))
        if reply.text not in (sample.options or ()):
            return Score(reason="the reply is none of the options", raw=reply.text)
        right = float(reply.text == sample.target)
        return Score({"accuracy": right, "length": float(len(reply.text))}, raw=reply.text)


class Talks(Benchmark):
    """Three turns with a resident, graded by two judges under two rubrics."""

    name, version, primary = "talks", "1", "in voice"
    metrics = {
        "in voice": Metric(description="mean level of the judges, 1 to 5"),
        "helpful": Metric(description="mean level of the judges, 1 to 5"),
    }
    needs = ("judge",)
    prompts = tuple(rubric.prompt for rubric in RUBRICS)

    def __init__(self, n: int = 60) -> None:
        self.n = n

    def samples(self) -> list[Sample]:
        result = []
        for i in range(self.n):
            who = RESIDENTS[i % len(RESIDENTS)]
            persona = Persona(who, f"{who} speaks like a {VOICES[i % 4]}, lives by the river and rises early.")
            opening = Message("system", f"You are {who}. {persona.description}")
            result.append(Sample(f"t{i:04}", (opening,), persona=persona, task=TOPICS[i % 4]))
        return result

    def groups(self, sample: Sample) -> Mapping[str, str]:
        return {"topic": sample.task}

    def constant(self, sample: Sample) -> str:
        return "How nice of you to ask."

    def chance(self, sample: Sample, rng) -> str:
        return rng.choice(["How nice of you to ask.", "The river is high today."])

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        talk = list(sample.messages)
        for turn in range(3):
            talk.append(Message("user", f"And what about the {sample.task}, visit {turn}, {sample.id} #{turn + 1}"))
            reply = (await roles.model.respond(Request(tuple(talk), sample.persona))).text
            verdict = "right" if reply == str(turn + 1) else "beside the point"
            talk.append(Message("assistant", f"{reply} (that is {verdict})"))
        text = "\n".join(message.content for message in talk)
        verdicts = [await roles.judge(rubric, talk=text) for rubric in RUBRICS]
        read = [[float(v.value) for v in some if v.value is not None] for some in verdicts]
        flat = tuple(verdict for some in verdicts for verdict in some)
        if not all(read):
            return Score(reason="no judge's verdict could be read", raw=reply, verdicts=flat, transcript=tuple(talk))
        values = {"in voice": sum(read[0]) / len(read[0]), "helpful": sum(read[1]) / len(read[1])}
        return Score(values, raw=reply, verdicts=flat, transcript=tuple(talk))


class Lines(Voices):
    """Voices without history, whose replies a trivial answer has too."""

    name = "a_benchmark_with_a_long_name"
    primary = "rouge-1"

    def samples(self) -> list[Sample]:
        return [replace(sample, persona=None) for sample in super().samples()]


class Grades(Ratings):
    """Ratings without log-likelihoods, which trivial answers have not."""

    metrics = {name: metric for name, metric in Ratings.metrics.items() if metric.aggregate != "ratio"}

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        reply = (await roles.model.respond(Request(sample.messages, sample.persona, task=sample.task))).text
        if not reply.isdigit():
            return Score(reason="the reply is not a number", raw=reply)
        truth = int(sample.target)
        values = {"accuracy": float(reply == sample.target), "truth": float(truth), "rating": float(reply)}
        return Score(values, raw=reply)


BENCHMARKS: tuple[type, ...] = (Grades, Choices, Talks, Lines)


def toy_tree(
    folder: Path,
    n: int = 60,
    stacks: Mapping[str, float | Trivial] = STACKS,
    benchmarks: tuple[type, ...] = BENCHMARKS,
) -> list[Path]:
    """<folder>/evaluation/<benchmark>/<stack>/ for all of them, written by the runner."""
    folders = []
    for make in benchmarks:
        for stack, skill in stacks.items():
            benchmark = make(n)
            place = folder / "evaluation" / benchmark.name / stack
            model = skill if isinstance(skill, Trivial) else ToyModel(skill)
            settings = {
                "model": {"path": "toy"},
                "stack": [[stack]],
                "benchmark": {"name": benchmark.name, "limit": n},
            }
            cast = Cast(model, judges=JUDGES if benchmark.needs else ())
            run_benchmark(benchmark, cast, place, stack=stack, settings=settings, progress=False)
            if stack.startswith("Persona-Plug") and benchmark.name == "ratings":
                write_plots(place, toy_plots())
            folders.append(place)
    return folders
