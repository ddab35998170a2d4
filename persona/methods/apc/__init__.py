"""APC-based DPO: a character's statements say which of two replies is more faithful, and the LM learns to prefer it.

Peng & Shang, NeurIPS 2024 (arXiv 2405.07726), with its data pipeline and discriminators. Read on as the paper does:

    statements.py       a text becomes statements, statements become queries (3.1; appendix C)
    labels.py           which statements bear on a query, what a reply does to a statement: rows labelled by a judge
    discriminators.py   two small classifiers learn those labels (3.3)
    pairs.py            two replies of the LM, the one with the higher APC is preferred (3.4); `preference_pairs`
    method.py           the stages in their order, DPO, and experience upload as the baseline
"""

from persona.methods.apc.config import APCConfig, DiscriminatorConfig
from persona.methods.apc.method import APC, STAGES, train
from persona.methods.apc.pairs import preference_pairs
from persona.metrics.apc import apc_score

__all__ = ["APC", "STAGES", "APCConfig", "DiscriminatorConfig", "apc_score", "preference_pairs", "train"]
