"""What can be set of the method."""

from __future__ import annotations

from dataclasses import dataclass, field

from persona.training.lora import LoraSettings


@dataclass
class DiscriminatorConfig:
    """How both classifiers are fine-tuned. Epochs, learning rate and batch size as published (reference/apc.md 3.4).

    `base`: minilm or town (they come with the package), a folder, or a hub id such as microsoft/deberta-v3-large.
    `held_out`: share of the statements whose rows are only measured on; `dev`: of those that calibrate (their loss is
    logged). Neither is trained on.
    """

    base: str = "microsoft/deberta-v3-large"
    relevance_epochs: float = 5.0
    nli_epochs: float = 10.0
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    batch_size: int = 8
    max_length: int = 512
    class_weights: bool = True  # rare classes count as much as frequent ones
    neutral: float | None = None  # NLI: neutral training rows per other row; null keeps all of them
    held_out: float = 0.2
    dev: float = 0.1


def _lora() -> LoraSettings:
    # alpha = r: published without one, where PEFT's default of 8 scales the adapter by 1/16 (docs/errata.md).
    return LoraSettings(r=128, lora_alpha=128, target_modules=r".*\.(q|k|v|o|gate|up|down)_proj")


@dataclass
class APCConfig:
    """`mode`: "dpo", or "experience": supervised training on replies that follow a statement (the paper's EU).

    queries: "teacher" writes `queries_per_statement` for each statement; "data" takes the train split's own questions.
    responses: "teacher" writes an entailed, a neutral and a contradicted reply to each query; "sampled" draws replies
        of the LM itself with and without the statement at hand. Either way the judge labels them.
    others, other_responses: further queries that each statement is labelled with, and further replies that each
        (statement, query) is.
    reward: who scores replies: "discriminators", or the "judge" itself, asked about every statement and reply.
    relevance_model, nli_model: discriminators that are there already; then none are trained.
    prompts: how statements are shown for "sampled" and `told`: "english", "town", or a folder (personalizer
        statements).
    natural: replies of a character, whatever they answer, that each statement of dev and held_out is labelled with;
        the discriminators' probabilities are calibrated on those of dev (discriminators.py), 0 leaves them as trained.
    files: a folder with files in the published format; what it holds of a character is not made again.
    samples: replies per query, of which the best and the worst are compared; `gap` their least difference in APC.
    told: further replies per query, of the teacher with those statements in its prompt that bear on the query, as
        whoever scores says: for an LM that under its own prompt never says what is true.
    nll_coef: weight of the chosen reply's own loss beside DPO's; 0 as published. It keeps a small LM readable.
    objective: "total" prefers by the summed APC, as published code does; "per_statement" is the paper's eq. 8-9.
    """

    name: str = "apc"
    mode: str = "dpo"
    queries: str = "teacher"
    responses: str = "teacher"
    queries_per_statement: int = 3
    others: int = 5
    other_responses: int = 3
    natural: int = 20
    files: str | None = None
    prompts: str = "english"
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    reward: str = "discriminators"
    relevance_model: str | None = None
    nli_model: str | None = None
    max_queries: int = 100  # per character
    samples: int = 2
    told: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 256
    gap: float = 0.2
    objective: str = "total"
    beta: float = 0.1
    nll_coef: float = 0.0
    lora: LoraSettings = field(default_factory=_lora)
    max_length: int = 1536
