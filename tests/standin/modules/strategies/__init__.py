"""How a photograph is analyzed: once, or after a first look."""

import sqlite3

from .model import ask


class Baseline:
    def analyze(self, path, advisor):
        return ask(full_prompt(advisor), path)


class TwoPasses(Baseline):
    def analyze(self, path, advisor):
        ask("What is in this photograph?", path)
        return super().analyze(path, advisor)


class AnalysisContext:
    def __init__(self, mode):
        self.strategy = TwoPasses() if mode.startswith("rag") else Baseline()

    def analyze(self, path, advisor):
        return self.strategy.analyze(path, advisor)


def full_prompt(advisor):
    with sqlite3.connect("mondrian.db") as db:
        system = db.execute("SELECT value FROM config WHERE key = 'system_prompt'").fetchone()[0]
        own = db.execute("SELECT prompt FROM advisors WHERE id = ?", (advisor,)).fetchone()[0]
    return f"{system.replace('<AdvisorName>', advisor)}\n\n{own}\n\nAnalyze the provided image."
