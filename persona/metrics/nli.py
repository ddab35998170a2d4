"""Natural language inference: does a text entail, contradict, or leave open another? By any sequence classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from persona.errors import UserError

ENTAILMENT, NEUTRAL, CONTRADICTION = "entailment", "neutral", "contradiction"
# How models name their classes: those on NLI data, and those on Dialogue-NLI.
_NAMES = {
    ENTAILMENT: ("entailment", "entail", "entails", "entailed", "positive"),
    NEUTRAL: ("neutral",),
    CONTRADICTION: ("contradiction", "contradict", "contradicts", "contradicted", "contradictory", "negative"),
}


def class_order(labels: Sequence[str], name: str) -> list[str]:
    """What each class means, in the model's order; `labels` are those of its id2label.

    Raises UserError unless they are entailment, neutral and contradiction (or Dialogue-NLI's positive, neutral and
    negative), each once: LABEL_0 says nothing, and a wrong guess would turn the score around.
    """
    meanings = [
        next((meaning for meaning, names in _NAMES.items() if label.strip().lower() in names), "") for label in labels
    ]
    if sorted(meanings) != sorted(_NAMES):
        raise UserError(
            f"the NLI model {name} names its classes {', '.join(labels)}; its config.json should name them "
            "entailment, neutral and contradiction (or positive, neutral and negative) in id2label"
        )
    return meanings


def longest_input(tokenizer: Any, config: Any) -> int:
    """Tokens a model takes, special ones included: what its tokenizer says, bounded by its positions; else 512."""
    known = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 0]
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer"):
        known[1] -= config.pad_token_id + 1  # its positions begin after the padding's
    return min((length for length in known if 0 < length < 1_000_000), default=512)


def load(kind: Any, name: str, key: str) -> tuple[Any, Any]:
    """(model, tokenizer) in evaluation mode on the GPU, if there is one; `kind` is an Auto class of transformers.

    Raises UserError naming the config's `key` when `name`, a folder or an id of the hub, cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        # Published judges (UniEval) have weights in torch's older format only, of which tensors alone are read.
        model = kind.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{key}={name} could not be loaded: {reason}") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


class Entailment:
    """A classifier of premise and hypothesis, by the name of its folder or its id on the hub.

    Raises UserError when it cannot be loaded, or does not say which class is which (`class_order`).
    """

    def __init__(self, name: str, key: str = "nli_model") -> None:
        from transformers import AutoModelForSequenceClassification

        self._model, self._tokenizer = load(AutoModelForSequenceClassification, name, key)
        config = self._model.config
        self.classes = class_order([str(config.id2label[i]) for i in range(config.num_labels)], name)
        self._max_length = longest_input(self._tokenizer, config)

    @torch.inference_mode()
    def __call__(self, pairs: Sequence[tuple[str, str | None]]) -> list[str]:
        """The likeliest class of each (premise, hypothesis): "entailment", "neutral" or "contradiction".

        With None as every hypothesis, each premise is one single text. A pair that is too long loses the end of its
        longer text.
        """
        if not pairs:
            return []
        premises = [premise for premise, _ in pairs]
        hypotheses = None if pairs[0][1] is None else [str(hypothesis) for _, hypothesis in pairs]
        batch = self._tokenizer(
            premises, hypotheses, truncation=True, max_length=self._max_length, padding=True, return_tensors="pt"
        ).to(self._model.device)
        return [self.classes[best] for best in self._model(**batch).logits.argmax(-1).tolist()]


def c_score(label: str) -> float:
    """+1 when the persona entails the reply, 0 when it leaves it open, -1 when it contradicts it."""
    return {ENTAILMENT: 1.0, NEUTRAL: 0.0, CONTRADICTION: -1.0}[label]


def p_consistency(label: str) -> float:
    """1 unless the persona contradicts the reply."""
    return float(label != CONTRADICTION)


def ue_score(by_persona: str, by_reference: str) -> float:
    """2 when persona and reference both entail the reply, 1 when only the persona does, else 0 (persobench note 5)."""
    return 0.0 if by_persona != ENTAILMENT else 1.0 + (by_reference == ENTAILMENT)
