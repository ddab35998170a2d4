"""What goes wrong in one of several processes is said once: by the first of them, through the store they share.

The others meet the same error, or a connection that was closed on them; to say that as well would hide the cause.
"""

from __future__ import annotations

import os
import re

import torch.distributed as dist

_KEY = "persona/said"
# gloo's and NCCL's words for another process that has gone.
_GONE = re.compile(r"gloo|NCCL|Connection (?:closed|reset) by peer|Broken pipe|recvValue|sendBytes", re.IGNORECASE)


def together() -> bool:
    """Whether this process is one of several that have found each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first_to_say(sentence: str) -> bool:
    """Note `sentence` for the others; False when one of them has noted its own before."""
    if not together():
        return True
    mine = f"{os.environ.get('RANK', '0')} {sentence}"
    try:
        return dist.distributed_c10d._get_default_store().compare_set(_KEY, "", mine) == mine.encode()
    except RuntimeError:  # rank zero keeps the store, and has gone
        return True


def said() -> str | None:
    """What another process has said went wrong, "" for nothing; None where rank zero has gone, and its store."""
    if not together():
        return ""
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.get(_KEY).decode().partition(" ")[2] if store.check([_KEY]) else ""
    except RuntimeError:
        return None


def left_alone(error: BaseException) -> bool:
    """Whether `error` only says that another process has gone."""
    return together() and isinstance(error, RuntimeError) and bool(_GONE.search(str(error)))
