"""The schemas of all configs: which keys there are, of which types, and what their values may be.

They are the dataclasses beside the code that reads them. Each is registered with Hydra as `<group>/base_<name>`, and
every YAML under configs/ extends one (`defaults: [base_x, _self_]`), so that a key no dataclass has does not compose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from persona.benchmarks import AllConfig, BenchmarkConfig, FileBenchmarkConfig, PeopleBenchmarkConfig
from persona.benchmarks.apc import APCBenchmarkConfig
from persona.benchmarks.axis_shared import AxisConfig
from persona.benchmarks.base_prefills import BasePrefillsConfig
from persona.benchmarks.big_five_inventory import BigFiveInventoryConfig
from persona.benchmarks.character import CharacterConfig, QuestionsConfig
from persona.benchmarks.coherence import CoherenceConfig
from persona.benchmarks.counselling import CounsellingConfig
from persona.benchmarks.drift import DriftConfig
from persona.benchmarks.drift_harm import DriftHarmConfig
from persona.benchmarks.emobench import LANGUAGES, OWN_MODES, EmoBenchConfig
from persona.benchmarks.emobench import MODES as CHOICE_MODES
from persona.benchmarks.eq_bench import EQBenchConfig
from persona.benchmarks.lm_eval import LmEvalConfig
from persona.benchmarks.persobench import PersoBenchConfig
from persona.benchmarks.persona_jailbreak import PersonaJailbreakConfig
from persona.benchmarks.personaeval import PersonaEvalConfig
from persona.benchmarks.personafeedback import PersonaFeedbackConfig
from persona.benchmarks.personagym import PersonaGymConfig
from persona.benchmarks.personamem import PersonaMemConfig
from persona.benchmarks.revealed_preferences import RevealedPreferencesConfig
from persona.benchmarks.review_reply import ReviewReplyConfig
from persona.benchmarks.rmtbench import RMTBenchConfig
from persona.benchmarks.role_susceptibility import RoleSusceptibilityConfig
from persona.benchmarks.tombench import ToMBenchConfig
from persona.benchmarks.town_tasks import TownTasksConfig
from persona.benchmarks.town_traits import TownTraitsConfig
from persona.config.launch import LaunchConfig
from persona.config.rates import CARDS, PlanRates
from persona.data import (
    BiographyConfig,
    ConstitutionConfig,
    DataConfig,
    RolesConfig,
    SituationsConfig,
    TownCharactersConfig,
    TownConfig,
    TownRolesConfig,
    TownSituationsConfig,
)
from persona.evaluation.endpoints.endpoint import EndpointConfig, key_problems
from persona.lm.load import ModelConfig
from persona.lm.residual import PLACES
from persona.methods.apc.config import APCConfig, DiscriminatorConfig
from persona.methods.assistant_axis.config import AssistantAxisConfig, CalibrationConfig
from persona.methods.character.distillation import DistillConfig
from persona.methods.character.expansion import ExpandConfig
from persona.methods.character.introspection import IntrospectConfig
from persona.methods.character.merge import MODES
from persona.methods.character.pipeline import CharacterConfig as CharacterMethodConfig
from persona.methods.finetune import FinetuneConfig
from persona.methods.persona_fuse.config import (
    GRANULARITIES,
    OBJECTIVES,
    JointConfig,
    PersonaFuseConfig,
    RouterConfig,
    RouterStageConfig,
    WarmupConfig,
)
from persona.methods.persona_fuse.synthesis import SynthesisConfig
from persona.methods.persona_plug import PersonaPlugConfig
from persona.methods.steering import SteeringConfig
from persona.training.trainer import TrainerConfig

# ---- schemas -------------------------------------------------------------------------------------------------------


@dataclass
class RoleConfig:
    """Who plays a role beside the model. `kind`: none, local (`model` under `personalizers`), endpoint, and for judges
    random (valid verdicts drawn at random) or oracle (the town's own reader)."""

    kind: str = "none"
    model: ModelConfig = field(default_factory=ModelConfig)
    personalizers: list[Any] = field(default_factory=list)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)


@dataclass
class TrainConfig:
    """`python train.py`. `personalizers` is the stack that the method is trained on top of (directories, names, or
    {name: settings}). Methods made of stages ask a `teacher` (null: the base LM itself) and a `judge`, and with
    `stage` run that one alone. `plan=true` trains nothing and prints what a run would need on as many
    processes and machines as `launch` says, at the rates of `plan_rates`."""

    name: str = MISSING
    output: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: Any = MISSING
    method: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    personalizers: list[Any] = field(default_factory=list)
    teacher: RoleConfig = field(default_factory=RoleConfig)
    judge: dict[str, RoleConfig] = field(default_factory=dict)
    stage: str | None = None
    plan: bool = False
    plan_rates: PlanRates = field(default_factory=PlanRates)


@dataclass
class EvaluateConfig:
    """`python evaluate.py`. `baselines` maps a display name to a stack; each is measured on the same samples as
    `personalizers`. Finished samples are kept between runs unless `overwrite`. With `endpoint.model` a server is
    measured instead of `model`. `trivial` measures a constant and a random answer beside the stacks."""

    name: str = MISSING
    output: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: Any = MISSING
    benchmark: Any = MISSING
    personalizers: list[Any] = field(default_factory=list)
    baselines: dict[str, list[Any]] = field(default_factory=dict)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    judge: dict[str, RoleConfig] = field(default_factory=dict)
    reference: RoleConfig = field(default_factory=RoleConfig)
    user_simulator: RoleConfig = field(default_factory=RoleConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    trivial: bool = True
    overwrite: bool = False


ROOTS: dict[str, type] = {"train": TrainConfig, "evaluate": EvaluateConfig}
GROUPS: dict[str, dict[str, type]] = {
    "model": {"base_model": ModelConfig},
    "data": {
        "base_biography": BiographyConfig,
        "base_constitution": ConstitutionConfig,
        "base_data": DataConfig,
        "base_roles": RolesConfig,
        "base_situations": SituationsConfig,
        "base_town": TownConfig,
        "base_town_characters": TownCharactersConfig,
        "base_town_roles": TownRolesConfig,
        "base_town_situations": TownSituationsConfig,
    },
    "method": {
        "base_apc": APCConfig,
        "base_assistant_axis": AssistantAxisConfig,
        "base_character": CharacterMethodConfig,
        "base_persona_fuse": PersonaFuseConfig,
        "base_persona_plug": PersonaPlugConfig,
        "base_finetune": FinetuneConfig,
        "base_steering": SteeringConfig,
    },
    "trainer": {"base_trainer": TrainerConfig},
    "benchmark": {
        "base_all": AllConfig,
        "base_people": PeopleBenchmarkConfig,
        "base_apc": APCBenchmarkConfig,
        "base_base_prefills": BasePrefillsConfig,
        "base_big_five_inventory": BigFiveInventoryConfig,
        "base_character": CharacterConfig,
        "base_coherence": CoherenceConfig,
        "base_counselling": CounsellingConfig,
        "base_emobench": EmoBenchConfig,
        "base_drift": DriftConfig,
        "base_eq_bench": EQBenchConfig,
        "base_drift_harm": DriftHarmConfig,
        "base_lm_eval": LmEvalConfig,
        "base_persobench": PersoBenchConfig,
        "base_persona_jailbreak": PersonaJailbreakConfig,
        "base_personaeval": PersonaEvalConfig,
        "base_personafeedback": PersonaFeedbackConfig,
        "base_personagym": PersonaGymConfig,
        "base_personamem": PersonaMemConfig,
        "base_revealed_preferences": RevealedPreferencesConfig,
        "base_review_reply": ReviewReplyConfig,
        "base_rmtbench": RMTBenchConfig,
        "base_role_susceptibility": RoleSusceptibilityConfig,
        "base_tombench": ToMBenchConfig,
        "base_town_tasks": TownTasksConfig,
        "base_town_traits": TownTraitsConfig,
    },
    "teacher": {"base_role": RoleConfig},
    "reference": {"base_role": RoleConfig},
    "user_simulator": {"base_role": RoleConfig},
}
# Texts that mean one of a few things: a typing error in them would otherwise show late, or not at all.
CHOICES: dict[type, dict[str, tuple[str | None, ...]]] = {
    ModelConfig: {"dtype": ("float32", "bfloat16", "float16")},
    TrainerConfig: {
        "precision": ("fp32", "bf16"),
        "wandb": ("offline", "online", "disabled"),
        "weights": ("last", "best"),
    },
    APCConfig: {
        "mode": ("dpo", "experience"),
        "queries": ("teacher", "data"),
        "responses": ("teacher", "sampled"),
        "objective": ("total", "per_statement"),
        "reward": ("discriminators", "judge"),
    },
    AssistantAxisConfig: {"compat": (None, "reference"), "read": PLACES},
    CalibrationConfig: {
        "quantile_direction": ("negated", "axis"),
        "positions": ("all", "prompt", "response", "last"),
    },
    CharacterMethodConfig: {"compat": (None, "reference"), "merge": MODES},
    FinetuneConfig: {"mode": ("lora", "full", "user_lora"), "split": ("train", "dev", "test")},
    JointConfig: {"objective": OBJECTIVES},
    LaunchConfig: {"distributed_type": ("NO", "MULTI_GPU", "DEEPSPEED", "FSDP")},
    PersonaFuseConfig: {"similarity": ("equal", "cosine")},
    RouterConfig: {"encoder": ("causal", "sentence"), "pooling": ("last", "mean"), "granularity": GRANULARITIES},
    PlanRates: {"gpu": tuple(CARDS)},
    PersonaPlugConfig: {"prefix_scale": ("measured", "none"), "compat": (None, "reference")},
    RoleConfig: {"kind": ("none", "local", "endpoint", "random", "oracle")},
    PeopleBenchmarkConfig: {"split": ("train", "dev", "test")},
    APCBenchmarkConfig: {"split": ("train", "dev", "test"), "compat": (None, "reference")},
    FileBenchmarkConfig: {"compat": (None, "reference")},
    EmoBenchConfig: {"language": LANGUAGES, "mode": OWN_MODES},
    ToMBenchConfig: {"language": LANGUAGES, "mode": CHOICE_MODES},
    CounsellingConfig: {"compat": (None,)},
    ReviewReplyConfig: {"compat": (None,)},
    BigFiveInventoryConfig: {"mode": CHOICE_MODES, "compat": (None,)},
    PersoBenchConfig: {"mode": ("vanilla", "cot")},
    PersonaEvalConfig: {"mode": ("text", "likelihood")},
    PersonaFeedbackConfig: {"mode": ("answer", "likelihood", "reward"), "access": ("profile", "none")},
    PersonaMemConfig: {"mode": ("discriminative", "generative"), "size": ("32k", "128k", "1M")},
    QuestionsConfig: {"language": ("en", "town")},
    AxisConfig: {"language": ("en", "town"), "split": ("all", "held_out")},
    RevealedPreferencesConfig: {"condition": ("like", "feel", "random")},
    RMTBenchConfig: {"language": ("en", "zh"), "compat": (None,)},
}
POSITIVE: dict[type, tuple[str, ...]] = {
    ModelConfig: ("batch_size",),
    TrainerConfig: ("batch_size", "gradient_accumulation", "epochs", "learning_rate", "log_every", "save_every"),
    AssistantAxisConfig: ("max_new_tokens", "min_count"),
    CalibrationConfig: ("every",),
    CharacterMethodConfig: ("beta", "sft_max_length"),
    ExpandConfig: ("tries", "max_new_tokens"),
    DistillConfig: ("repeats", "max_new_tokens", "max_length"),
    IntrospectConfig: ("turns", "reflection_tokens", "interaction_tokens"),
    FinetuneConfig: ("r", "max_input_length"),
    LaunchConfig: ("num_processes", "num_machines"),
    JointConfig: ("learning_rate", "epochs", "batch_size", "beta", "max_new_tokens"),
    PersonaFuseConfig: ("tau", "max_length"),
    RouterConfig: ("temperature", "hidden", "dim", "max_length"),
    RouterStageConfig: ("learning_rate", "encoder_learning_rate", "epochs", "batch_size"),
    SynthesisConfig: ("max_words", "overlap", "top_p", "max_new_tokens"),
    WarmupConfig: ("learning_rate", "epochs", "batch_size"),
    PersonaPlugConfig: ("history_limit", "temperature", "max_input_length"),
    APCConfig: (
        "queries_per_statement",
        "max_queries",
        "samples",
        "temperature",
        "max_new_tokens",
        "beta",
        "max_length",
    ),
    DiscriminatorConfig: ("relevance_epochs", "nli_epochs", "learning_rate", "batch_size", "max_length"),
    BenchmarkConfig: ("max_new_tokens",),
    PeopleBenchmarkConfig: ("num_beams",),
    BasePrefillsConfig: ("completions",),
    DriftConfig: ("turns", "min_count"),
    PersonaGymConfig: ("seeds", "questions"),
    RevealedPreferencesConfig: ("pairs",),
    ToMBenchConfig: ("tries",),
    PlanRates: ("utilisation", "inter", "disk"),
}


def _schema(cls: type) -> DictConfig:
    """A structured config whose frozen dataclasses can be set while composing (OmegaConf makes them read-only)."""
    node = OmegaConf.structured(cls)

    def unlock(part: DictConfig) -> None:
        part._set_flag("readonly", None)
        for key in part:
            child = part._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                unlock(child)

    unlock(node)
    return node


for _name, _cls in ROOTS.items():
    ConfigStore.instance().store(name=f"base_{_name}", node=_schema(_cls), provider="persona")
for _group, _schemas in GROUPS.items():
    for _name, _cls in _schemas.items():
        ConfigStore.instance().store(group=_group, name=_name, node=_schema(_cls), provider="persona")

# ---- values --------------------------------------------------------------------------------------------------------


def value_problems(node: Any, prefix: str = "") -> Iterator[str]:
    """One sentence for each value in a bound config that is out of range or not among the choices."""
    if isinstance(node, ModelConfig) and not node.path:
        yield f"{prefix}path has no value: {prefix}path=… sets it"
    if isinstance(node, EndpointConfig):
        yield from (f"{prefix}{sentence}" for sentence in key_problems(node))
    of_bases = [base for base in type(node).__mro__ if base in POSITIVE or base in CHOICES]
    for name in (name for base in of_bases for name in POSITIVE.get(base, ())):
        if getattr(node, name) <= 0:
            yield f"{prefix}{name}={getattr(node, name)} has to be greater than 0"
    for name, choices in (pair for base in of_bases for pair in CHOICES.get(base, {}).items()):
        value = getattr(node, name)
        if value not in choices:
            known = ["null" if choice is None else choice for choice in choices]
            yield f"{prefix}{name}={value} is unknown{nearest(str(value), known)} ({', '.join(known)})"
    for part in fields(node):
        yield from _value_problems(getattr(node, part.name), f"{prefix}{part.name}")


def _value_problems(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{key}={value} has to be a finite number"
    elif is_dataclass(value):
        yield from value_problems(value, f"{key}.")
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _value_problems(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _value_problems(inner, f"{key}[{number}]")


def nearest(text: str, options: Sequence[str]) -> str:
    """A hint to append to a sentence; empty without options."""
    near = get_close_matches(text, options, n=1, cutoff=0.0)
    return f"; did you mean {near[0]}?" if near else ""
