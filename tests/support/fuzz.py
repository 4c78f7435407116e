"""Budgets, seeds and mutations of the fuzz tests, which feed random input to the code that reads untrusted bytes.

`make check` runs a few examples of each test, always the same ones. `make fuzz` runs each for SAILVL_FUZZ_SECONDS with
new examples. A failure names the seed, with which `SAILVL_FUZZ_SEED` repeats it.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

FUZZ_SECONDS = float(os.environ.get("SAILVL_FUZZ_SECONDS", "0"))
"""Seconds for each fuzz test; 0 runs its default number of examples."""
FIRST_SEED = int(os.environ.get("SAILVL_FUZZ_SEED", str(time.time_ns() % 1_000_000) if FUZZ_SECONDS else "0"))

EXAMPLES_PROPERTY = "fuzz_examples"
"""Name of the property of a test's report that holds its number of examples."""
MINIMUM_EXAMPLES = 2000
"""Examples of `draw_generators` that are drawn even if they take longer than FUZZ_SECONDS."""
_BATCH = 200
"""Examples between two checks of the time."""


class ExampleCounter:
    """Counts the examples of the current test."""

    def __init__(self) -> None:
        self.examples = 0


COUNTER = ExampleCounter()


def fuzz(strategy: SearchStrategy[Any], check: Callable[[Any], None], *, examples: int = 100) -> None:
    """Call `check` with examples of a strategy: `examples` of them, or as many as fit into FUZZ_SECONDS.

    The smallest example that fails is printed.
    """
    end = time.monotonic() + FUZZ_SECONDS
    for number in count(FIRST_SEED):
        _run_batch(strategy, check, number, examples=_BATCH if FUZZ_SECONDS else examples)
        if time.monotonic() >= end:
            return


def draw_generators(examples: int, *, minimum: int = MINIMUM_EXAMPLES) -> Iterator[random.Random]:
    """Yield one seeded random generator for each example: `examples` of them, or as many as fit into FUZZ_SECONDS.

    `minimum`: number of examples that are drawn however long they take, if FUZZ_SECONDS is set. Input that is expensive
    to build or to shrink is mutated with these generators instead of being drawn from a strategy. A generator has its
    seed as the attribute `number`, for messages.
    """
    end = time.monotonic() + FUZZ_SECONDS
    numbers = count(FIRST_SEED) if FUZZ_SECONDS else islice(count(FIRST_SEED), examples)
    for number in numbers:
        COUNTER.examples += 1
        yield NumberedRandom(number)
        if FUZZ_SECONDS and time.monotonic() >= end and number + 1 - FIRST_SEED >= minimum:
            return


class NumberedRandom(random.Random):
    """Random generator that keeps the number it was seeded with."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def mutate_bytes(content: bytes, generator: random.Random) -> bytes:
    """Return the content after one to eight random changes: bytes flipped, inserted, deleted, repeated or cut off."""
    mutated = bytearray(content)
    for _ in range(generator.randint(1, 8)):
        start = generator.randrange(len(mutated) + 1)
        stop = min(len(mutated), start + generator.choice((1, 1, 2, 4, 8, 64, 512)))
        match generator.randrange(6):
            case 0:
                mutated[start:stop] = generator.randbytes(stop - start)
            case 1:
                mutated[start:start] = generator.randbytes(generator.randint(1, 16))
            case 2:
                del mutated[start:stop]
            case 3:
                mutated[start:start] = mutated[start:stop] * generator.randint(1, 50)
            case 4:
                mutated[start:stop] = generator.choice((b"\x00", b"\xff", b"\x7f", b"9", b"-", b"[")) * (stop - start)
            case 5 if generator.random() < 0.3:
                del mutated[start:]
    return bytes(mutated)


def _run_batch(strategy: SearchStrategy[Any], check: Callable[[Any], None], number: int, *, examples: int) -> None:
    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def check_example(example: Any) -> None:
        COUNTER.examples += 1
        check(example)

    try:
        check_example()
    except BaseException as error:
        error.add_note(f"repeat with SAILVL_FUZZ_SEED={number}")
        raise
