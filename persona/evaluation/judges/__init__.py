"""Judges: what they are asked, how their verdicts are read, and how far they agree."""
