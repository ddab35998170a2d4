"""APC: how many of a character's statements does a reply satisfy? Active ones are followed, passive ones not denied.

Peng & Shang, "Quantifying and Optimizing Global Faithfulness in Persona-driven Role-playing" (arXiv 2405.07726).
`apc_score` is pure; `Discriminators` gives it probabilities, from two sequence classifiers by name or path.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import softmax

from persona.errors import UserError
from persona.metrics.nli import CONTRADICTION, ENTAILMENT, NEUTRAL, class_order, load, longest_input

log = logging.getLogger(__name__)

# ---- the score -----------------------------------------------------------------------------------------------------


class ApcScore(NamedTuple):
    """Of one reply floats, of many arrays [...].

    total: expected number of satisfied statements, 0 to S. active: what relevant statements earned by being entailed.
    passive: what irrelevant ones lost by being contradicted, at least 0. delta = active - passive: the total above
    that of a reply which leaves every statement open.
    """

    total: Any
    delta: Any
    active: Any
    passive: Any


def apc_score(
    relevance: ArrayLike, entailment: ArrayLike, contradiction: ArrayLike, *, normalize: bool = False
) -> ApcScore:
    """APC of replies whose statements have these probabilities, [S] or [..., S]; sums over S (paper, equations 3-6).

    total = sum of Pg Pe + (1 - Pg)(1 - Pc); delta = sum of Pg Pe - (1 - Pg) Pc, with Pg the chance that the statement
    is relevant to the question, Pe (Pc) that the reply is entailed by (contradicts) it. `normalize` divides by S, so
    that characters with more statements do not score higher. Raises UserError unless shapes agree and all values are
    between 0 and 1.
    """
    given = {"relevance": relevance, "entailment": entailment, "contradiction": contradiction}
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in given.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    try:
        shape = np.broadcast_shapes(*shapes.values())
    except ValueError:
        shape = ()
    if not shape or any(own[-1:] != shape[-1:] for own in shapes.values()):
        shown = ", ".join(f"{name} {list(own)}" for name, own in shapes.items())
        raise UserError(f"APC needs one probability per statement in each array, but got shapes {shown}")
    for name, array in arrays.items():
        if not np.all((array >= -1e-6) & (array <= 1 + 1e-6)):
            raise UserError(f"APC needs probabilities, but {name} holds values outside 0 to 1")
    relevant, entailed, contradicted = (array for array in arrays.values())
    scale = max(shape[-1], 1) if normalize else 1
    active = (relevant * entailed).sum(-1) / scale
    passive = ((1 - relevant) * contradicted).sum(-1) / scale
    delta = active - passive
    total = delta + np.broadcast_to(1 - relevant, shape).sum(-1) / scale
    return ApcScore(*(value.item() if value.ndim == 0 else value for value in (total, delta, active, passive)))


@dataclass(frozen=True)
class Explanation:
    """One statement's share in a reply's score: `satisfied` adds up to the total, `gain` to the delta."""

    statement: str
    relevance: float
    entailment: float
    contradiction: float
    satisfied: float
    gain: float


def explain(
    statements: Sequence[str], relevance: ArrayLike, entailment: ArrayLike, contradiction: ArrayLike
) -> list[Explanation]:
    """Per statement what `apc_score` sums up, in the statements' order; arrays [S]."""
    rows = zip(statements, *(np.asarray(a, dtype=float) for a in (relevance, entailment, contradiction)), strict=True)
    found = []
    for statement, pg, pe, pc in rows:
        total, delta, _, _ = apc_score([pg], [pe], [pc])
        found.append(Explanation(statement, float(pg), float(pe), float(pc), total, delta))
    return found


# ---- the discriminators --------------------------------------------------------------------------------------------

NO, YES = "no", "yes"
_RELEVANCE = {NO: ("no", "irrelevant", "not relevant", "false"), YES: ("yes", "relevant", "true")}
# In a discriminator's own order of classes, where we train it (published: relevance no, yes; NLI below).
RELEVANCE_CLASSES = (NO, YES)
NLI_CLASSES = (CONTRADICTION, NEUTRAL, ENTAILMENT)
# How a question, a statement and a reply become one sequence. A model folder with a file of this name has its own.
TEMPLATE = "apc_template.txt"
RELEVANCE_TEMPLATE = "Character: {character}\nStatement: {statement}\nUser: {query}"
NLI_TEMPLATE = "Character: {character}\nStatement: {statement}\nUser: {query}\nReply: {reply}"


def relevance_order(labels: Sequence[str], name: str) -> list[str]:
    """What each class of a relevance classifier means, "no" or "yes", in its own order.

    Raises UserError unless its id2label names one of each: LABEL_0 says nothing, and a wrong guess would turn the
    score around.
    """
    meanings = [next((m for m, names in _RELEVANCE.items() if label.strip().lower() in names), "") for label in labels]
    if sorted(meanings) != [NO, YES]:
        raise UserError(
            f"the relevance model {name} names its classes {', '.join(labels)}; its config.json should name them "
            "no and yes in id2label"
        )
    return meanings


def chat_template(tokenizer: Any, template: str) -> str:
    """`template` in the turns of the tokenizer's chat: the statement as system prompt, the query, the reply.

    A chat LM has learned to read replies in the light of what stands before them there. The template as it is, where
    the tokenizer has no chat, or one without system prompts.
    """
    slots = ("character", "statement", "query", "reply")
    turns = [("system", ("character", "statement")), ("user", ("query",)), ("assistant", ("reply",))]
    if tokenizer.chat_template is None:
        return template
    messages = [
        {"role": role, "content": "\n".join(f"<<{slot}>>" for slot in some)}
        for role, some in turns
        if f"{{{some[0]}}}" in template
    ]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # templates raise what they like for a role they do not know
        return template
    text = text.replace("{", "{{").replace("}", "}}")
    for slot in slots:
        text = text.replace(f"<<{slot}>>", f"{{{slot}}}")
    return text


def adds_special(tokenizer: Any, template: str) -> bool:
    """Whether the tokenizer has to add its special tokens: a chat's turns bring their own."""
    own = (tokenizer.bos_token, tokenizer.cls_token, *tokenizer.all_special_tokens)
    return not template.startswith(tuple(token for token in own if token))


class Classifier:
    """A sequence classifier over filled templates. `classes` is what its logits mean, in their order.

    `tokens` is the size of a batch: rows times the longest. Where the model's config has a `calibration` with scale
    and bias [classes], probabilities are softmax(scale · logits + bias). Raises UserError when the model cannot be
    loaded or does not say which class is which.
    """

    def __init__(self, name: str, key: str, order: Any, template: str, tokens: int = 8192) -> None:
        from transformers import AutoModelForSequenceClassification

        self.model, self.tokenizer = load(AutoModelForSequenceClassification, name, key)
        config = self.model.config
        self.classes = order([str(config.id2label[i]) for i in range(config.num_labels)], name)
        own = Path(name) / TEMPLATE
        self.template = own.read_text(encoding="utf-8").removesuffix("\n") if own.is_file() else template
        given = getattr(config, "calibration", None) or {}
        self.scale, self.bias = given.get("scale", 1.0), np.array(given.get("bias", [0.0] * len(self.classes)))
        self.tokens, self.max_length = tokens, longest_input(self.tokenizer, config)
        self.special = adds_special(self.tokenizer, self.template)
        # On the left a decoder's positions would move with its neighbours' lengths.
        self.tokenizer.padding_side = "right"
        self.cut = 0  # texts so far that lost their end

    def __call__(self, items: Sequence[dict[str, str]]) -> dict[str, np.ndarray]:
        """Probabilities [n] of each class, float64. Each different text is computed once, among its like in length."""
        import torch

        texts = [self.template.format(**item) for item in items]
        different = list(dict.fromkeys(texts))
        ids = self.tokenizer(different, add_special_tokens=self.special)["input_ids"] if different else []
        self.cut += sum(len(row) > self.max_length for row in ids)
        if any(len(row) > self.max_length for row in ids):
            log.warning("%d texts so far are longer than %d tokens and lost their end", self.cut, self.max_length)
            cut = {"truncation": True, "max_length": self.max_length}
            ids = self.tokenizer(different, add_special_tokens=self.special, **cut)["input_ids"]
        rows = np.empty((len(different), len(self.classes)))
        with torch.inference_mode():
            for batch in _batches([len(row) for row in ids], self.tokens):
                padded = self.tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
                logits = self.model(**padded.to(self.model.device)).logits
                rows[batch] = softmax(self.scale * logits.double().cpu().numpy() + self.bias, axis=-1)
        places = {text: place for place, text in enumerate(different)}
        chosen = rows[[places[text] for text in texts]] if texts else rows
        return {label: chosen[:, column] for column, label in enumerate(self.classes)}


def _batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Positions in batches of similar length, the longest first; rows times the longest stays within `tokens`."""
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


@dataclass(frozen=True)
class Question:
    """What is asked of a character, and the replies to be scored. `character` is the name the statements use."""

    character: str
    statements: tuple[str, ...]
    query: str
    replies: tuple[str, ...]


class Probabilities(NamedTuple):
    """Of one question: relevance [S]; entailment and contradiction [replies, S]."""

    relevance: np.ndarray
    entailment: np.ndarray
    contradiction: np.ndarray

    def score(self, *, normalize: bool = False) -> ApcScore:
        """Arrays [replies]."""
        return apc_score(self.relevance, self.entailment, self.contradiction, normalize=normalize)


class Discriminators:
    """Relevance of (query, statement) and NLI of (statement, query, reply), by two classifiers (names or paths)."""

    def __init__(self, relevance: str, nli: str, tokens: int = 8192) -> None:
        self.relevance = Classifier(relevance, "relevance_model", relevance_order, RELEVANCE_TEMPLATE, tokens)
        self.nli = Classifier(nli, "nli_model", class_order, NLI_TEMPLATE, tokens)

    def __call__(self, questions: Sequence[Question]) -> list[Probabilities]:
        """One pass of each classifier over everything: |S| relevance forwards per question, shared by its replies."""
        pairs = [(q, s) for q in questions for s in q.statements]
        triples = [(q, r, s) for q in questions for r in q.replies for s in q.statements]
        relevant = self.relevance([{"character": q.character, "statement": s, "query": q.query} for q, s in pairs])
        judged = self.nli(
            [{"character": q.character, "statement": s, "query": q.query, "reply": r} for q, r, s in triples]
        )
        found, asked, answered = [], 0, 0
        for question in questions:
            shape = (len(question.replies), len(question.statements))
            here = slice(answered, answered + shape[0] * shape[1])
            found.append(
                Probabilities(
                    relevant[YES][asked : asked + shape[1]],
                    judged[ENTAILMENT][here].reshape(shape),
                    judged[CONTRADICTION][here].reshape(shape),
                )
            )
            asked, answered = asked + shape[1], here.stop
        return found
