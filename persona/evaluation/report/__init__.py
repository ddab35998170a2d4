"""The report: one HTML page over any number of runs, and their table in the terminal."""

from persona.evaluation.report.page import main, write_report

__all__ = ["main", "write_report"]
