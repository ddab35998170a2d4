"""BERTScore of replies against references, by the package bert_score and an encoder of one's choice."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path

from persona.errors import UserError
from persona.metrics.nli import longest_input


class BertScore:
    """An encoder by folder or hub id ("roberta-large" for published English figures); no rescaling by a baseline.

    The layer is the one that bert_score tuned for a model of this name (for a folder: its last part), else the last.
    Raises UserError when the encoder cannot be loaded.
    """

    def __init__(self, name: str, key: str = "bertscore_model") -> None:
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            tuned = model2layers.get(name, model2layers.get(Path(name).name))
            self.layer = min(tuned or config.num_hidden_layers, config.num_hidden_layers)
            with warnings.catch_warnings(), contextlib.redirect_stdout(None):
                warnings.simplefilter("ignore")
                self._scorer = BERTScorer(model_type=name, num_layers=self.layer)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{key}={name} could not be loaded: {str(error).strip().splitlines()[0]}") from error
        tokenizer = self._scorer._tokenizer
        # Where a tokenizer knows no limit it says 10^30, which its own truncation does not take.
        tokenizer.model_max_length = longest_input(tokenizer, config)

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, float, float]]:
        """(precision, recall, F1) of each (reply, reference); neither may be blank."""
        if not pairs:
            return []
        replies, references = zip(*pairs, strict=True)
        columns = self._scorer.score(list(replies), list(references), batch_size=len(pairs))
        return [(p, r, f) for p, r, f in zip(*(column.tolist() for column in columns), strict=True)]
