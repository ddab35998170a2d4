"""What happens to a run from outside, at a stated moment: a personalizer that stands in the stack and lets it happen.

Registered by the tests as "trouble". Settings: `flag` (a file: it happens once, when that is not there yet), `call`
(at which call of the first door) and `what`.
"""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

from persona.personalizer import Personalizer

ROOM = 32 * 1024  # bytes a file may have once the disk is "full": a metrics.jsonl fits, a model does not


class Trouble(Personalizer):
    method = "trouble"

    def __init__(self, settings: dict) -> None:
        self.settings, self.calls = settings, 0

    @classmethod
    def load(cls, folder, config, base):
        return cls(config)

    def config(self):
        return self.settings

    def prompt(self, requests):
        self.calls += 1
        flag = Path(self.settings["flag"])
        if self.calls == self.settings["call"] and not flag.exists():
            flag.touch()
            if self.settings["what"] == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))
        return list(requests)
