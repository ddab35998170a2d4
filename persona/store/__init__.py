"""Histories of all users and the vectors of their items on disk: deduplicated, appended safely, read without RAM."""

from persona.store.disk import StoreBusy
from persona.store.history import Added, HistoryStore, as_stored, history_key

__all__ = ["Added", "HistoryStore", "StoreBusy", "as_stored", "history_key"]
