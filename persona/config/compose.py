"""Composing configs, with all problems named at once before Hydra's own main would stop at the first.

cfg = load_config("train", ["method=finetune_lora", "trainer.epochs=1"])        # tests, notebooks
check_overrides(sys.argv[1:], "train")                                          # entry points (entry)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from persona.config.schemas import GROUPS, nearest, value_problems
from persona.errors import UserError

# Names of schemas, which stand among a group's choices but are none.
SCHEMAS = frozenset(name for schemas in GROUPS.values() for name in schemas)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# ---- binding -------------------------------------------------------------------------------------------------------


def bind(cfg: DictConfig) -> Any:
    """The composed config as its dataclass (TrainConfig or EvaluateConfig), nested ones included.

    Raises UserError that lists every missing value, unknown choice and number out of range.
    """
    bound, problems = _bind(cfg)
    if problems:
        raise _joined(problems)
    return bound


def _bind(cfg: DictConfig) -> tuple[Any, list[str]]:
    try:
        missing = [f"{key} has no value: {key}=… sets it" for key in sorted(OmegaConf.missing_keys(cfg))]
        bound = None if missing else OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        return None, [f"{error.full_key}: {_first_line(error)}" if error.full_key else _first_line(error)]
    return bound, missing or list(value_problems(bound))


def load_config(config_name: str, overrides: Sequence[str] = ()) -> Any:
    """Compose and bind without a command line, for tests and notebooks. Raises UserError as `check_overrides`."""
    with _hydra(None):
        bound, problems = _compose(config_name, list(overrides), multirun=False)
    if problems:
        raise _joined(problems)
    return bound


# ---- all problems at once ------------------------------------------------------------------------------------------


# A key on a command line is read by whoever lists processes, and would stand in meta.json and a sweep's folder.
_KEY_NAME = re.compile(r"(?:^|[.{,+?&'\"\s])\w*(?:api_?key|secret|password|passwd|(?:\b|_)token)\s*[=:]", re.I)
_KEY_VALUE = re.compile(r"(?<![A-Za-z0-9])(?:(?:sk|xai|glpat)-[\w-]{16,}|(?:hf|gsk|ghp)_[A-Za-z0-9]{20,})|://[^/\s]*@")


def check_no_keys(overrides: Sequence[str]) -> None:
    """Raises UserError, which does not repeat it, when a key or password stands on the command line."""
    for text in overrides:
        if _KEY_NAME.search(text) or _KEY_VALUE.search(text):
            raise UserError(
                f"{text.partition('=')[0].strip('+~')}=… holds a key or password: it belongs into the environment "
                "variable that api_key_env names, not on a command line, which others can read"
            )


def check_overrides(argv: Sequence[str], config_name: str) -> None:
    """Compose what the command line asks for, before Hydra does.

    Raises UserError with one sentence per problem: unknown keys and group choices (naming the nearest), values of the
    wrong type, overrides that cannot be read, unknown keys in YAML files, required values that are missing.
    """
    args = get_args_parser().parse_args(list(argv))
    if args.help or args.hydra_help or args.shell_completion:
        return
    check_no_keys(args.overrides)
    more = [f"hydra.searchpath=['file://{Path(args.config_dir).resolve()}']"] if args.config_dir else []
    with _hydra(args.config_path):
        _, problems = _compose(args.config_name or config_name, [*more, *args.overrides], bool(args.multirun))
    if problems:
        raise _joined(problems)


def unswept(argv: Sequence[str]) -> list[str]:
    """Of a multirun's command line the keys that are the same for all of its jobs."""
    args = get_args_parser().parse_args(list(argv))
    parsed = [OverridesParser.create().parse_override(text) for text in args.overrides if args.multirun]
    return [override.key_or_group for override in parsed if not override.is_sweep_override()]


def same_config(argv: Sequence[str]) -> list[str]:
    """Of a command line what says where the configs are."""
    args = get_args_parser().parse_args(list(argv))
    flags = {"--config-dir": args.config_dir, "--config-path": args.config_path, "--config-name": args.config_name}
    return [text for flag, value in flags.items() if value is not None for text in (flag, value)]


@contextmanager
def _hydra(config_path: str | None) -> Iterator[None]:
    if not CONFIGS.is_dir():
        raise UserError(f"{CONFIGS} is missing: install the repository with `pip install -e .`")
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(Path(config_path).resolve() if config_path else CONFIGS), version_base=None):
            yield
    finally:
        GlobalHydra.instance().hydra = before


def _compose(config_name: str, overrides: list[str], multirun: bool) -> tuple[Any, list[str]]:
    """The bound config, or what is wrong. Hydra composes; only when it refuses is each part looked at on its own."""
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            problems.append(f"{text!r} cannot be read as key=value: {_first_line(error)}")
    first: list[str] = []  # of a sweep, its first job
    singles: list[Override] = []
    for override in parsed:
        text = override.input_line or ""
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else None
        if values is not None and not multirun:
            problems.append(f"{text} gives several values: add --multirun to run each of them")
            continue
        lines = [text] if values is None else [f"{text.partition('=')[0]}={value}" for value in values]
        first.append(lines[0])
        singles += [parser.parse_override(line) for line in lines]
    groups = [override for override in singles if _options(override.key_or_group) and not override.is_delete()]
    wrong = [sentence for override in groups if (sentence := _group_problem(override))]
    # Hydra lets `+key` and `~key` change which keys there are; here only open mappings may grow.
    closed = not any(o.is_add() or o.is_force_add() or o.is_delete() for o in singles)
    refusal = ""
    if not problems and not wrong and closed and len(singles) == len(first):
        try:
            return _bound(config_name, first)
        except (HydraException, yaml.YAMLError) as error:
            refusal = _first_line(error)
    chosen = [override.input_line or "" for override in groups if not _group_problem(override)]
    composed, in_files = _compose_files(config_name, chosen)
    problems = in_files + problems + wrong
    if composed:
        rest = [override for override in singles if not _options(override.key_or_group)]
        problems += [sentence for o in rest if (sentence := _key_problem(o, composed, config_name))]
        problems += [sentence for sentence in _bind(composed)[1] if problems and "interpolation" not in sentence]
    if problems:
        return None, problems
    try:
        return _bound(config_name, first)
    except HydraException as error:
        return None, [refusal or _first_line(error.__cause__ or error)]


def _bound(config_name: str, overrides: list[str]) -> tuple[Any, list[str]]:
    """Compose and bind as Hydra's main would, so that `${hydra:…}` resolves; its own config is put back after."""
    cfg = compose(config_name, overrides, return_hydra_config=True)
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)
    try:
        with open_dict(cfg):
            del cfg["hydra"]
        return _bind(cfg)
    finally:
        HydraConfig.instance().cfg = before


def _compose_files(config_name: str, groups: list[str]) -> tuple[DictConfig | None, list[str]]:
    """The chosen YAML files put together without what the schemas refuse, and a sentence for each refusal.

    Hydra would stop at the first. None where a file is missing or is no YAML: then nothing can be put together.
    """
    loader = GlobalHydra.instance().config_loader()
    composed, problems = OmegaConf.create(), []
    try:
        defaults = loader.compute_defaults_list(config_name, groups, RunMode.RUN).defaults
        parts = [
            (default.config_path, loader._load_single_config(default, loader.repository).config)  # type: ignore[attr-defined]
            for default in defaults
            if not (default.config_path or "").startswith("hydra/")
        ]
    except MissingConfigException as error:
        options = [option for option in error.options or () if option not in SCHEMAS]
        return None, [f"{_first_line(error)}{nearest(str(error.missing_cfg_file).rpartition('/')[2], options)}"]
    except yaml.YAMLError as error:
        return None, [f"a YAML file cannot be read: {' '.join(str(error).split())}"]
    except HydraException as error:
        return None, [_first_line(error)]
    for path, loaded in parts:
        if OmegaConf.get_type(loaded) is dict:
            loaded.pop("hydra", None)
        try:
            composed.merge_with(loaded)
            continue
        except OmegaConfBaseException:
            pass
        for key, value in _leaves(OmegaConf.to_container(loaded)):
            try:
                OmegaConf.update(composed, key, value, merge=True)
            except OmegaConfBaseException as error:
                known = _keys(composed)
                what = f"{key}={value}: {_first_line(error)}"
                if key not in known:
                    what = f"unknown key {key}{_nearest_key(key, known)}"
                problems.append(f"configs/{path}.yaml: {what}")
    return composed, problems


def _group_problem(override: Override) -> str | None:
    key, value = override.key_or_group, override.value()
    options = _options(key)
    for choice in value if isinstance(value, list) else [value]:
        if not isinstance(choice, (str, dict)):  # Hydra's own answer is a traceback
            return f"{override.input_line}: {key} is chosen by name ({', '.join(options)}); without it none is chosen"
        if isinstance(choice, str) and choice not in options:
            return f"{key}={choice}: there is no such {key}{nearest(choice, options)} ({', '.join(options)})"
    return None


def _key_problem(override: Override, composed: DictConfig, config_name: str) -> str | None:
    """One sentence about an override of a value; a right one is applied to `composed`."""
    key, text = override.key_or_group, override.input_line or ""
    if key.startswith(("hydra.", "hydra/")):
        return None  # Hydra's own settings; its main speaks for itself
    known = _keys(composed)
    parent, _, last = key.rpartition(".")
    free = bool(parent) and parent in known and OmegaConf.get_type(OmegaConf.select(composed, parent)) is dict
    adds = override.is_add() or override.is_force_add()
    if key not in known and not (free and adds):
        if free:
            return f"{text}: {parent} has no {last} yet; write +{text} to add it"
        return f"unknown key {key}{_nearest_key(key, [*known, *_groups(config_name)])}"
    if override.is_delete():
        return f"{text}: a key cannot be deleted; give it another value"
    if override.is_add() and not free:
        return f"{text}: {key} exists already; leave the + out"
    try:
        OmegaConf.update(composed, key, override.value(), merge=True, force_add=free)
    except OmegaConfBaseException as error:
        return f"{text}: {_first_line(error)}"
    return None


def _options(key: str) -> list[str]:
    """The choices of a config group; empty when `key` is no group."""
    # Of the repository: the loader would copy it and every schema in it first, half of the time of composing.
    repository = GlobalHydra.instance().config_loader().repository  # type: ignore[attr-defined]
    group = key.partition("@")[0]
    return [option for option in repository.get_group_options(group) if option not in SCHEMAS] if group else []


def _groups(config_name: str) -> list[str]:
    """The groups that the root config chooses from, those without a default included."""
    defaults = GlobalHydra.instance().config_loader().compute_defaults_list(config_name, [], RunMode.RUN)
    return [group for group in defaults.overrides.known_choices if not group.startswith("hydra/")]


def _keys(composed: DictConfig) -> list[str]:
    plain = OmegaConf.to_container(composed, resolve=False, throw_on_missing=False)
    return [key for key, _ in _nodes(plain)] if isinstance(plain, dict) else []


def _nodes(plain: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _nodes(value, f"{prefix}{key}.")


def _leaves(plain: Any) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in _nodes(plain) if not isinstance(value, dict) or not value]


def _nearest_key(key: str, known: Sequence[str]) -> str:
    """By the whole dotted key, else by its last part (`epochs` is `trainer.epochs`)."""
    last = key.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in sorted(known, key=lambda name: -name.count("."))}  # outermost
    same_room = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    for candidates in (same_room, known):
        if near := get_close_matches(key, candidates, n=1, cutoff=0.75):
            return f"; did you mean {near[0]}?"
    if near := get_close_matches(last, by_last, n=1, cutoff=0.6):
        return f"; did you mean {by_last[near[0]]}?"
    room = key.rpartition(".")[0] if same_room else ""
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == room]
    return f"; {room or 'the top level'} has {', '.join(dict.fromkeys(siblings))}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _joined(problems: Sequence[str]) -> UserError:
    if len(problems) == 1:
        return UserError(problems[0])
    return UserError(f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  - {p}" for p in problems))
