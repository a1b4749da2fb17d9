"""Whose turn it is: short jobs first, but no job later than twice an equal share allows."""

from __future__ import annotations

STRETCH = 2.0


class FairClock:
    """Virtual time of an engine that is dealt out equally to the jobs at hand.

    It advances by rows served divided by the jobs at hand, so a job of `work` rows would be done
    after `work` units if every job got the same. A job that comes at `now` is due at
    now + STRETCH · work, and the engine serves what is due first. So

    1. a short job passes long ones, and of two equal jobs the earlier one goes first;
    2. nothing starves, however many short jobs keep coming: with at most n jobs at hand the clock
       passes a job's due time after STRETCH · work · n rows, and whatever comes later is due
       later;
    3. an idle clock stands still, and no job gains from time in which it was not there.

    With STRETCH 1 jobs would be done about when equal shares end them. A larger one lets short
    jobs pass more and long ones wait longer; docs/adr/0020 has the figures behind 2. It is the
    idea of fair queueing (Parekh & Gallager, 1993) and of the Fair Sojourn Protocol (Friedman &
    Henderson, 2003) with a clock that clients who answer every image with a new request cannot
    slow down.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def due(self, work: float) -> float:
        """The virtual time at which a job of `work` rows that comes now is due."""
        return self.now + STRETCH * work

    def serve(self, rows: float, jobs: int) -> None:
        """The engine did `rows` rows of work while `jobs` jobs were at hand."""
        self.now += rows / jobs
