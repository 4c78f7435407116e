"""Planning: each sample once per epoch, exact resume, any world size, step counts, and how packs are filled."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sailvl_trainer.data.packing import Pack, assign_to_ranks, pack_best_fit
from sailvl_trainer.data.planner import DataPosition, PlannedStep, Planner, permute, split_window
from sailvl_trainer.errors import ConfigError
from sailvl_trainer.storage.codec import decode, encode

SAMPLES = 1000


def build_planner(samples: int = SAMPLES, *, window: int = 300, fingerprint: str = "f") -> Planner:
    rng = np.random.default_rng(0)
    tokens_S, tiles_S = rng.integers(5, 120, samples), rng.integers(0, 4, samples)
    return Planner(
        samples=samples,
        tokens=int(tokens_S.sum()),
        lengths=lambda chosen: (tokens_S[chosen], tiles_S[chosen]),
        fingerprint=fingerprint,
        pack_tokens=256,
        pack_tiles=8,
        packs_per_step=4,
        window_samples=window,
    )


def samples_of(step: PlannedStep) -> tuple[int, ...]:
    return tuple(s for pack in step.packs for s in pack)


def rest_of_epoch(planner: Planner, state: DataPosition) -> list[PlannedStep]:
    """Return the remaining steps of the position's epoch."""
    found = []
    for step in planner.plan_steps(state):
        found.append(step)
        if step.next_position.epoch > state.epoch:
            return found
    raise AssertionError("steps never end")


@pytest.mark.parametrize("window", [10_000, 300, 64], ids=["one window", "some windows", "one window per block"])
@pytest.mark.parametrize("samples", [1, 63, 64, 65, SAMPLES])
def test_each_sample_is_planned_once_per_epoch(samples: int, window: int) -> None:
    planner = build_planner(samples, window=window)
    state = planner.first_position(seed=1)
    for epoch in range(2):
        steps = rest_of_epoch(planner, state)
        assert Counter(s for step in steps for s in samples_of(step)) == Counter(range(samples))
        assert sum(step.tokens for step in steps) == planner.tokens
        state = steps[-1].next_position
        assert (state.epoch, state.window, state.cursor) == (epoch + 1, 0, 0)


def test_resume_at_any_step_yields_the_remaining_steps() -> None:
    planner = build_planner()
    whole = rest_of_epoch(planner, planner.first_position(seed=1))
    for done in range(1, len(whole)):
        saved = decode(DataPosition, encode(whole[done - 1].next_position))
        assert rest_of_epoch(planner, saved) == whole[done:]


@pytest.mark.parametrize("worlds", [(1, 2), (3, 1), (2, 8), (5, 4)])
def test_resume_with_another_world_size_uses_each_sample_once(worlds: tuple[int, int]) -> None:
    planner, seen = build_planner(), Counter[int]()
    whole = len(rest_of_epoch(planner, planner.first_position(seed=1)))
    state = planner.first_position(seed=1)
    for world_size, steps in zip(worlds, (whole // 2, whole - whole // 2), strict=True):
        for step in islice(planner.plan_steps(state), steps):
            for microstep in assign_to_ranks(step.packs, step.costs, world_size):
                assert len(microstep) == world_size
                seen.update(s for pack in microstep for s in pack)
            state = step.next_position
    assert seen == Counter(range(SAMPLES))
    assert state.epoch == 1


def test_order_differs_by_epoch_and_seed() -> None:
    planner = build_planner(window=10_000)
    first = planner.first_position(seed=1)

    def packs(state: DataPosition) -> list[Pack]:
        return sorted(tuple(sorted(p)) for step in rest_of_epoch(planner, state) for p in step.packs)

    assert packs(first) == packs(planner.first_position(seed=1))
    assert packs(first) != packs(replace(first, epoch=1))
    assert packs(first) != packs(planner.first_position(seed=2))


def test_position_of_other_data_raises_config_error() -> None:
    with pytest.raises(ConfigError, match="give the stage a new name"):
        next(build_planner().plan_steps(DataPosition(seed=1, fingerprint="other")))


def test_planning_memory_is_bounded_by_the_window() -> None:
    planner = replace(
        build_planner(),
        samples=300_000_000,
        window_samples=1024,
        lengths=lambda chosen: (chosen % 100 + 20, chosen % 3),
    )
    tracemalloc.start()
    try:
        steps = list(islice(planner.plan_steps(replace(planner.first_position(seed=1), window=200_000, cursor=30)), 3))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len({s for step in steps for s in samples_of(step)}) == sum(len(samples_of(step)) for step in steps)
    assert peak < 5e6


COUNTED = [
    pytest.param({"epochs": 1.0}, 1.0, id="one epoch"),
    pytest.param({"epochs": 3.0}, 3.0, id="epochs"),
    pytest.param({"epochs": 0.5}, 0.5, id="half an epoch"),
    pytest.param({"tokens": 31_000}, None, id="tokens"),
]


@pytest.mark.parametrize(("budget", "epochs"), COUNTED)
def test_num_steps_matches_the_budget(budget: dict[str, float], epochs: float | None) -> None:
    planner = build_planner()
    steps = list(islice(planner.plan_steps(planner.first_position(seed=1)), planner.num_steps(1, **budget)))
    done = sum(step.tokens for step in steps) / planner.tokens
    wanted = epochs if epochs is not None else budget["tokens"] / planner.tokens
    assert done == pytest.approx(wanted, abs=0 if wanted % 1 == 0 else 0.02)
    assert steps[-1].next_position.epoch == int(wanted)


@pytest.mark.parametrize("budget", [{}, {"epochs": 1.0, "tokens": 5}, {"epochs": 0.0}, {"tokens": -1}])
def test_missing_or_ambiguous_budget_raises_config_error(budget: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="set"):
        build_planner().num_steps(1, **budget)


def test_steps_of_many_windows_are_estimated_within_one_percent() -> None:
    planner = build_planner(20_000, window=100)
    exact = len(rest_of_epoch(planner, planner.first_position(seed=1)))
    assert planner.windows > 64
    assert planner.count_steps(1)[0] == pytest.approx(exact, rel=0.01)


CUTS = [
    pytest.param(8, 4, [4, 4], id="even"),
    pytest.param(10, 4, [4, 4, 2], id="remainder of half a step"),
    pytest.param(9, 4, [4, 3, 2], id="small remainder is shared"),
    pytest.param(1, 4, [1], id="less than one step"),
    pytest.param(0, 4, [], id="nothing"),
    pytest.param(3, 1, [1, 1, 1], id="one pack per step"),
]


@pytest.mark.parametrize(("packs", "size", "steps"), CUTS)
def test_split_window_shares_a_small_remainder(packs: int, size: int, steps: list[int]) -> None:
    assert split_window(packs, size) == steps


@given(st.integers(1, 3000), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_permute_is_a_permutation(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, (key,))), np.arange(n))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
def test_assign_to_ranks_balances_cost(world_size: int) -> None:
    packs = [(i,) for i in range(60)]
    costs = np.random.default_rng(0).uniform(0.5, 1, 60).tolist()
    microsteps = assign_to_ranks(packs, costs, world_size)
    assert {len(ranks) for ranks in microsteps} == {world_size}
    assert sorted(pack for ranks in microsteps for pack in ranks if pack) == packs
    if 60 % world_size == 0:
        work = [sum(costs[pack[0]] for pack in rank) for rank in zip(*microsteps, strict=True)]
        assert max(work) <= 1.02 * sum(work) / world_size


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 3)), min_size=1, max_size=80),
    st.integers(64, 128),
)
@settings(max_examples=60, deadline=None)
def test_packs_respect_both_budgets_and_hold_every_sample(samples: list[tuple[int, int]], budget: int) -> None:
    tokens, tiles = (np.array(column) for column in zip(*samples, strict=True))
    packs = pack_best_fit(tokens, tiles, budget, 4)
    assert Counter(s for pack in packs for s in pack) == Counter(range(len(samples)))
    assert all(tokens[pack].sum() <= budget and tiles[pack].sum() <= 4 for pack in packs)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 3)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_packing_equals_a_naive_best_fit(samples: list[tuple[int, int]]) -> None:
    tokens, tiles = (np.array(column) for column in zip(*samples, strict=True))
    free: list[tuple[int, int]] = []
    sizes = [max(t / 64, n / 4) for t, n in zip(tokens, tiles, strict=True)]
    large = sorted((i for i, size in enumerate(sizes) if size >= 0.25), key=lambda i: (-sizes[i], -tokens[i]))
    for i in [*large, *(i for i, size in enumerate(sizes) if size < 0.25)]:
        rooms = [room for room in free if room[0] >= tokens[i] and room[1] >= tiles[i]]
        room = min(rooms, default=(64, 4))
        if rooms:
            free.remove(room)
        free.append((room[0] - tokens[i], room[1] - tiles[i]))
    assert len(pack_best_fit(tokens, tiles, 64, 4)) == len(free)


def build_mixture(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and tiles as in fine-tuning: log-normal text, 0 to 13 tiles of 256 tokens."""
    rng = np.random.default_rng(0)
    tiles = rng.choice([0, 1, 3, 5, 7, 13], samples, p=[0.1, 0.3, 0.2, 0.15, 0.15, 0.1])
    return np.minimum(16384, rng.lognormal(5.5, 1, samples).astype(int) + 20 + tiles * 256), tiles


FILLS = [
    pytest.param(*build_mixture(8192), 16384, 64, 0.98, id="images and text"),
    pytest.param(build_mixture(8192)[0], np.zeros(8192, dtype=int), 16384, 48, 0.98, id="tiles are no limit"),
    pytest.param(np.full(2000, 90), np.ones(2000, dtype=int), 1024, 64, 0.96, id="equal lengths"),
]


@pytest.mark.parametrize(("tokens", "tiles", "pack_tokens", "pack_tiles", "least"), FILLS)
def test_packs_are_filled_above_the_threshold(
    tokens: np.ndarray, tiles: np.ndarray, pack_tokens: int, pack_tiles: int, least: float
) -> None:
    packs = pack_best_fit(tokens, tiles, pack_tokens, pack_tiles)
    assert tokens.sum() / (len(packs) * pack_tokens) >= least


def test_packs_of_small_samples_mix_sources_as_by_chance() -> None:
    rng = np.random.default_rng(0)
    is_long = rng.random(4000) < 0.3
    tokens = np.where(is_long, rng.integers(50, 70, 4000), rng.integers(25, 40, 4000))
    packs = pack_best_fit(tokens, np.ones(4000, dtype=int), 1024, 48)
    shares = np.array([is_long[pack].mean() for pack in packs[:-1]])
    by_chance = (0.3 * 0.7 / 24) ** 0.5
    assert shares.std() < 1.3 * by_chance
