"""`plan=true`: what a run would need, from configs alone. No weight is loaded.

    python train.py experiment=… plan=true launch.num_processes=16 launch.num_machines=2 plan_rates.gpu=A100

The model is built on torch's meta device. Parameters are counted on it, activations (one forward of a batch's shapes,
adding up every tensor that autograd keeps for the backward pass) and operations (PyTorch's own counter). Memory per
GPU, communication, seconds and GPU-hours follow from them for every back end of configs/launch, by rates that are
inputs.
"""

from __future__ import annotations

from persona.config.schemas import TrainConfig
from persona.methods.finetune import FinetuneConfig
from persona.methods.persona_plug import PersonaPlugConfig
from persona.plan.backends import Memory
from persona.plan.costs import costs, generation_hours
from persona.plan.loads import BYTES, base_lm, base_part, single_load, stage_load
from persona.plan.report import ACCOUNTING, Plan
from persona.plan.sizes import data_size
from persona.plan.stages import Texts, Work, has_plan, work

__all__ = ["Plan", "plan"]


def plan(cfg: TrainConfig) -> Plan:
    """Sizes, memory and work of the run that `cfg` describes, for the GPUs and nodes of `cfg.launch`.

    Loads no weight, and downloads nothing when `model.architecture` is given (or the model is a directory). Raises
    UserError when neither a config of the model nor a size of the data is to be had.
    """
    if has_plan(cfg):
        return _staged(cfg, work(cfg))
    assert isinstance(cfg.method, PersonaPlugConfig | FinetuneConfig), cfg.method
    size = data_size(cfg)
    load = single_load(cfg, size)
    return Plan(
        title=load.title,
        rates=cfg.plan_rates,
        trainings=[(load, costs(load, cfg.launch.num_machines, cfg.launch.num_processes, cfg.plan_rates))],
        save_every=cfg.trainer.save_every,
        data=size,
        notes=[
            f"data: {size.source}; operations of samples of mean length, without padding",
            f"activations: what autograd keeps of one forward of {cfg.trainer.batch_size} × the longest samples, "
            "counted on the meta device with the attention of fused kernels where the LM has it",
            "logits: batch × tokens of replies × vocabulary × (logits, float32 copy and log-softmax)",
            *_assumed(cfg),
            *ACCOUNTING,
        ],
    )


def _staged(cfg: TrainConfig, stages: Work) -> Plan:
    loads = [stage_load(cfg, training) for training in stages.trainings]
    lm = base_lm(cfg)
    part = base_part(cfg, lm)
    weights, half = part.parameters * part.bytes_each, cfg.model.dtype != "float32"

    def hours(text: Texts) -> float:
        batch = cfg.model.batch_size
        return generation_hours(
            text.count, text.tokens, text.read, part.parameters, weights, batch, half, cfg.plan_rates
        )

    held = None
    if not loads:
        config = lm.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        longest = max(text.tokens for text in stages.texts)
        cache = cfg.model.batch_size * longest * config.num_hidden_layers * width * 2 * BYTES[cfg.model.dtype]
        held = Memory(weights, 0, 0, 0, cache, 0)
    notes = [
        f"data: {stages.source}; counts and lengths are the most there can be: filters and short texts take off",
        f"GPU-hours of texts: {cfg.model.batch_size} at a time (model.batch_size), weights read once per token; "
        "caches and prompts not counted",
    ]
    if loads:
        notes += [
            "activations: what autograd keeps of one forward of the longest rows, counted on the meta device with "
            "the attention of fused kernels where the LM has it",
            *ACCOUNTING,
        ]
    return Plan(
        title=f"{cfg.method.name} on {cfg.model.path}" + ("" if loads else ", which trains nothing"),
        rates=cfg.plan_rates,
        trainings=[
            (load, costs(load, cfg.launch.num_machines, cfg.launch.num_processes, cfg.plan_rates)) for load in loads
        ],
        save_every=cfg.trainer.save_every,
        stages=stages,
        held=held,
        parts=[part],
        hours=hours,
        notes=[*notes[:2], *_assumed(cfg), *notes[2:]],
    )


def _assumed(cfg: TrainConfig) -> list[str]:
    rates = cfg.plan_rates
    inter = f", {rates.inter:g} GB/s out of a node" if cfg.launch.num_machines > 1 else ""
    return [
        f"assumed: {100 * rates.utilisation:g} % of the peak rate{inter}, {rates.disk:g} GB/s to disk (plan_rates.…); "
        "samples/s from communication in full to hidden behind computing, GPU-hours with it in full"
    ]
