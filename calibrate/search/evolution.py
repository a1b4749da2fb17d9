"""The paper's granularity search: Algorithm 1 of Q-DiT (arXiv 2406.17343).

A population of feasible plans; in every generation the best few of everything seen so far have
children by uniform crossover and by mutation. Beyond the authors' code: the last generation is
ranked like any other, no plan is evaluated twice, and children that exceed the budget are repaired
instead of drawn again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from random import Random

from ...errors import StepError
from ...progress import Progress, Silent
from .evaluation import evaluate_stored
from .evolution_result import Candidate, EvolutionResult, EvolutionSettings, GenerationRecord
from .executors import Executor
from .feasibility import Feasibility, Genome
from .fitness import CandidateFailure, Fitness
from .space import ALL_GROUPS, SearchSpace
from .store import CandidateStore

__all__ = [
    "Candidate",
    "EvolutionResult",
    "EvolutionSettings",
    "GenerationRecord",
    "evolve",
    "first_genome",
]

FIRST_GROUP = 128
_TRIES = 100  # draws for one new child before the space near the parents counts as exhausted


def evolve(
    space: SearchSpace,
    feasible: Feasibility,
    settings: EvolutionSettings,
    executor: Executor,
    *,
    store: CandidateStore | None = None,
    progress: Progress | None = None,
) -> EvolutionResult:
    """Search `space` within `feasible`; the same seed gives the same result on any executor.

    Random choices are the driver's alone and are made between generations, from what is known of
    all candidates before: neither the order in which workers finish nor a resumption matters.
    Raises `StepError` when no candidate of the first population gives finite images.
    """
    search = _Search(space, feasible, settings, executor, store, progress or Silent())
    for _ in search.progress.track(search.run(), "candidates", total=settings.candidates):
        pass
    return EvolutionResult(tuple(search.ranked()), tuple(search.history))


def first_genome(space: SearchSpace, feasible: Feasibility) -> Genome:
    """Uniform g128 where feasible, else the nearest feasible uniform plan, else the cheapest."""

    def octaves(genome: Genome) -> float:
        sizes = [
            space.choices[spec.name][gene].weight_group_size(spec.in_features)
            for spec, gene in zip(space.linears, genome, strict=True)
        ]
        return sum(abs(math.log2(size / FIRST_GROUP)) for size in sizes)

    uniform = [genome for group in ALL_GROUPS if feasible(genome := space.uniform(group))]
    return min(uniform, key=octaves) if uniform else feasible.cheapest


class _Search:
    """The state of one search: all that was judged, and what has been drawn."""

    def __init__(
        self,
        space: SearchSpace,
        feasible: Feasibility,
        settings: EvolutionSettings,
        executor: Executor,
        store: CandidateStore | None,
        progress: Progress,
    ) -> None:
        self.space = space
        self.feasible = feasible
        self.settings = settings
        self.executor = executor
        self.store = store
        self.progress = progress
        self.history: list[GenerationRecord] = []
        self._judged: list[Candidate] = []
        self._reused = 0
        self._drawn: set[Genome] = set()
        self._random = Random(settings.seed)
        self._started = time.perf_counter()

    def run(self) -> Iterator[None]:
        """All generations; one item a candidate."""
        yield from self._evaluate(self._first_population(), 0)
        if not math.isfinite(self.ranked()[0].fid):
            raise StepError(f"no candidate of the search can be judged: {self._why()}")
        for generation in range(1, self.settings.generations + 1):
            children = self._children()
            if not children:
                self.progress.say("every plan of the search space has been judged")
                return
            yield from self._evaluate(children, generation)

    def ranked(self) -> list[Candidate]:
        return sorted(self._judged, key=lambda candidate: candidate.rank)

    def _why(self) -> str:
        reasons = (
            c.outcome.reason for c in self._judged if isinstance(c.outcome, CandidateFailure)
        )
        return next(reasons, "all images have NaN or infinity; use more bits or finer groups")

    def _first_population(self) -> list[Genome]:
        first = first_genome(self.space, self.feasible)
        self._drawn.add(first)
        rest = (self._new(self._anything) for _ in range(self.settings.population - 1))
        return [first, *(genome for genome in rest if genome is not None)]

    def _children(self) -> list[Genome]:
        best = self.ranked()[: self.settings.top]
        parents = [candidate.genome for candidate in best if math.isfinite(candidate.fid)]
        crossed = (self._new(lambda: self._cross(parents)) for _ in range(self.settings.crossover))
        mutated = (self._new(lambda: self._mutate(parents)) for _ in range(self.settings.mutation))
        return [child for child in (*crossed, *mutated) if child is not None]

    def _new(self, draw: Callable[[], Genome]) -> Genome | None:
        """A feasible genome that was not drawn before; a random one if `draw` finds none."""
        for source in (draw, self._anything):
            for _ in range(_TRIES):
                genome = self.feasible.repair(source(), self._random)
                if genome not in self._drawn:
                    self._drawn.add(genome)
                    return genome
        return None

    def _anything(self) -> Genome:
        return tuple(self._random.randrange(size) for size in self.space.sizes)

    def _cross(self, parents: Sequence[Genome]) -> Genome:
        """Each gene from one of two parents."""
        one, other = self._random.sample(parents, 2) if len(parents) > 1 else (parents[0],) * 2
        probability = self.settings.crossover_probability
        return tuple(
            second if self._random.random() < probability else first
            for first, second in zip(one, other, strict=True)
        )

    def _mutate(self, parents: Sequence[Genome]) -> Genome:
        """Each gene drawn anew with the mutation probability."""
        parent = parents[self._random.randrange(len(parents))]
        probability = self.settings.mutation_probability
        return tuple(
            self._random.randrange(size) if self._random.random() < probability else gene
            for gene, size in zip(parent, self.space.sizes, strict=True)
        )

    def _evaluate(self, genomes: Sequence[Genome], generation: int) -> Iterator[None]:
        plans = [self.space.plan(genome) for genome in genomes]
        for plan, outcome, stored in evaluate_stored(plans, self.executor, self.store):
            genome = self.space.genome(plan)
            cost = self.feasible.total(genome)
            self._judged.append(Candidate(plan, genome, cost, outcome, generation))
            self._reused += stored
            if isinstance(outcome, CandidateFailure):
                self.progress.say(f"a candidate failed twice and is left out: {outcome.reason}")
            yield
        self._record(generation)

    def _record(self, generation: int) -> None:
        best = self.ranked()[0]
        fitnesses = [c.outcome for c in self._judged if isinstance(c.outcome, Fitness)]
        psnr_db = best.outcome.psnr_db if isinstance(best.outcome, Fitness) else None
        self.history.append(
            GenerationRecord(
                generation,
                evaluated=len(self._judged),
                reused=self._reused,
                seconds=time.perf_counter() - self._started,
                evaluation_seconds=math.fsum(fitness.seconds for fitness in fitnesses),
                best_fid=best.fid,
                best_psnr_db=psnr_db,
            )
        )
        quality = "" if psnr_db is None else f", {psnr_db:.2f} dB"
        self.progress.say(
            f"generation {generation} of {self.settings.generations}: best FID {best.fid:.4f}"
            f"{quality} ({self.feasible.measure} {best.cost:.6g}), from generation "
            f"{best.generation}; {len(self._judged)} candidates, {self._reused} of them stored"
        )
