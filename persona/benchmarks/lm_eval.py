"""Tasks of lm-eval on any stack: what a personalizer costs in general ability, with intervals and paired differences.

    evaluate.py benchmark=lm_eval benchmark.tasks=[arc_challenge,hellaswag,winogrande,truthfulqa_mc1,mmlu] \\
        benchmark.limit=200 personalizers=[outputs/…/personalizer] baselines.untouched=[]

lm-eval (package lm-eval, extra `comparison`) brings documents, prompts, filters and scores; the runner asks the model
as everybody else does. So a chat model meets every task as a conversation, few-shot examples in one user message.
Supported are multiple choice and generated answers, and of their metrics those that are a mean over documents.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from persona.benchmarks import BenchmarkConfig
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.types import Conversation, Message, Request, Sample, Sampling, Score

_KINDS = ("multiple_choice", "generate_until")


@dataclass
class LmEvalConfig(BenchmarkConfig):
    """`tasks`: lm-eval's names of tasks, groups or tags. `include_path`: a folder with task files of one's own.
    `num_fewshot`: null takes each task's own. `limit`: the first so many documents of each task.
    `max_new_tokens` holds where a task does not say.
    """

    name: str = "lm_eval"
    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    num_fewshot: int | None = None
    max_new_tokens: int = 256


class LmEval(Benchmark):
    """A sample is one document of one task. `mean` is over tasks of each one's first metric."""

    name = "lm_eval"
    version = "1"
    primary = "mean"

    def __init__(self, config: LmEvalConfig) -> None:
        if not config.tasks:
            raise UserError("benchmark.tasks is empty: name tasks of lm-eval, as in benchmark.tasks=[arc_challenge]")
        self.config = config
        self._tasks = _load(config)
        self._instances: dict[str, list[Any]] = {}
        self._samples: list[Sample] = []
        for name, task in self._tasks.items():
            for instance in task.instances:
                self._instances.setdefault(f"{name}-{instance.doc_id}", []).append(instance)
        for id, instances in self._instances.items():
            instances.sort(key=lambda instance: instance.idx)
            name = instances[0].task_name
            options, target = _answers(self._tasks[name], instances)
            messages, _ = _messages(instances[0].args[0])
            self._samples.append(Sample(id, messages, target, options=options, task=name))
        self._means = {name: _means(task) for name, task in self._tasks.items()}
        if without := [name for name, means in self._means.items() if not means]:
            raise UserError(f"task {without[0]} of lm-eval has no metric that is a mean over documents: leave it out")
        shown = "mean over tasks of " + ", ".join(f"{name} {next(iter(m))}" for name, m in self._means.items())
        self.metrics = {
            "mean": Metric(
                aggregate="group_mean", columns=("main", "task"), classes=len(self._tasks), description=shown
            ),
            **{
                f"{name} {metric}": Metric(higher, description=f"lm-eval's {metric} of {name}")
                for name, means in self._means.items()
                for metric, higher in means.items()
            },
        }

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def groups(self, sample: Sample) -> Mapping[str, str]:
        return {"task": sample.task}

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        task, instances = self._tasks[sample.task], self._instances[sample.id]
        if task.OUTPUT_TYPE == "multiple_choice":
            logps = await self._likelihoods(instances, roles)
            found = task.process_results(instances[0].doc, [(logp, False) for logp in logps])
            raw = ", ".join(f"{logp:.2f}" for logp in logps)
        else:
            raw = await self._generated(instances[0], roles)
            found = {}
            for pipeline in task._filters:  # on this document alone: a copy, as rows may be scored side by side
                (filtered,) = _filtered(pipeline, instances[0].doc, raw)
                scored = task.process_results(instances[0].doc, [filtered])
                found |= {_metric(task, name, pipeline.name): value for name, value in scored.items()}
        values = {f"{sample.task} {name}": float(found[name]) for name in self._means[sample.task] if name in found}
        main = next(iter(self._means[sample.task]))
        place = list(self._tasks).index(sample.task)
        return Score({**values, "main": values[f"{sample.task} {main}"], "task": float(place)}, raw=raw)

    async def _likelihoods(self, instances: Sequence[Any], roles: Roles) -> list[float]:
        """log p of each instance's continuation; those of one prompt are asked about together."""
        by_prompt: dict[str, list[int]] = {}
        for place, instance in enumerate(instances):
            by_prompt.setdefault(instance.args[0], []).append(place)
        asked = []
        for prompt, places in by_prompt.items():
            messages, begun = _messages(prompt)
            options = tuple(instances[place].args[1] for place in places)
            asked.append(roles.model.choose(Request(messages, options=options, prefill=begun)))
        logps = [0.0] * len(instances)
        for places, found in zip(by_prompt.values(), await asyncio.gather(*asked), strict=True):
            for place, logp in zip(places, found, strict=True):
                logps[place] = logp
        return logps

    async def _generated(self, instance: Any, roles: Roles) -> str:
        messages, begun = _messages(instance.args[0])
        settings = dict(instance.args[1])
        until = settings.get("until") or []
        sampling = Sampling(
            max_new_tokens=int(settings.get("max_gen_toks", self.config.max_new_tokens)),
            temperature=float(settings.get("temperature") or 0) if settings.get("do_sample") else 0.0,
            stop=tuple([until] if isinstance(until, str) else until),
            seed=random.Random(f"lm-eval-{self.config.seed}-{instance.task_name}-{instance.doc_id}").getrandbits(48),
        )
        return (await roles.model.respond(Request(messages, sampling=sampling, prefill=begun))).text


def _load(config: LmEvalConfig) -> dict[str, Any]:
    """The tasks with their instances, prompts as JSON lists of messages. Raises UserError for what cannot be had."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            "benchmark lm_eval needs the package lm-eval: pip install -e '.[comparison]' in the repository"
        ) from error
    # Its own tasks are ten thousand files, which are looked through only where a name is not among the user's.
    manager = TaskManager(include_path=config.include_path, include_defaults=config.include_path is None)
    if config.include_path is not None and not set(config.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=config.include_path)
    if unknown := [name for name in config.tasks if name not in manager.all_tasks]:
        from difflib import get_close_matches

        near = get_close_matches(unknown[0], manager.all_tasks, n=1)
        raise UserError(f"lm-eval has no task {unknown[0]!r}{f'; did you mean {near[0]}?' if near else ''}")
    try:
        tasks = manager.load(list(config.tasks))["tasks"]
    except Exception as error:  # whatever its readers of data sets raise: no network, no such data set
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"lm-eval could not load {', '.join(config.tasks)}: {reason}") from error
    for name, task in tasks.items():
        if task.OUTPUT_TYPE not in _KINDS:
            raise UserError(f"task {name} of lm-eval is of kind {task.OUTPUT_TYPE}; supported are {', '.join(_KINDS)}")
        if config.num_fewshot is not None:
            task.set_config("num_fewshot", config.num_fewshot)
        task.set_fewshot_seed(config.seed)
        task.build_all_requests(limit=config.limit, apply_chat_template=True, chat_template=_as_json)
    return dict(tasks)


def _as_json(history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
    """In the place of a chat template: the conversation itself."""
    return json.dumps([[turn["role"], turn["content"]] for turn in history])


def _messages(prompt: str) -> tuple[Conversation, str]:
    """The conversation up to the reply, and how the reply begins."""
    turns = json.loads(prompt) if prompt else [["user", ""]]
    begun = turns.pop()[1] if turns[-1][0] == "assistant" else ""
    return tuple(Message(role, content) for role, content in turns), begun


def _answers(task: Any, instances: Sequence[Any]) -> tuple[tuple[str, ...] | None, str]:
    """What a sample's options and target are, for trivial answers and the report; scores come from lm-eval."""
    doc = instances[0].doc
    target = task.doc_to_target(doc)
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
        first = target[0] if isinstance(target, list) and target else target
        return None, str(first)
    choices = [str(choice) for choice in task.doc_to_choice(doc)]
    first = target[0] if isinstance(target, list) and target else target
    right = choices[first] if isinstance(first, int) and 0 <= first < len(choices) else str(first)
    return tuple(instance.args[1] for instance in instances[: len(choices)]), right


def _filtered(pipeline: Any, doc: Mapping[str, Any], reply: str) -> list[Any]:
    replies: Any = [[reply]]
    for step in pipeline.filters:
        replies = step().apply(replies, [doc])
    return list(replies)


def _metric(task: Any, name: str, pipeline: str) -> str:
    """A metric's name; with the filter's where a task has several."""
    return name if len(task._filters) == 1 else f"{name} {pipeline}"


def _means(task: Any) -> dict[str, bool]:
    """Metrics of a task that are means over documents: name → whether higher is better.

    Exact match of a multiple-choice task asks for greedy decoding, which log p of options does not tell.
    """
    from lm_eval.api.metrics import mean

    aggregations, higher = task.aggregation(), task.higher_is_better()
    names = [name for name, aggregate in aggregations.items() if aggregate is mean]
    if task.OUTPUT_TYPE == "multiple_choice":
        return {name: bool(higher.get(name, True)) for name in names if name != "exact_match"}
    pipelines = [pipeline.name for pipeline in task._filters]
    return {_metric(task, name, pipeline): bool(higher.get(name, True)) for name in names for pipeline in pipelines}


def build(config: LmEvalConfig) -> LmEval:
    """Raises UserError without lm-eval, and for tasks that it does not know or cannot load."""
    return LmEval(config)
