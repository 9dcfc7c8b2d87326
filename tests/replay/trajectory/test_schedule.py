"""The plan of a backward pass, carried out on integers for every length up to 40 and every number of slots."""

from collections import deque
from math import comb

import pytest

from trajrec.replay.trajectory.schedule import Advance, Drop, Hold, Load, Recall, Visit, backward_plan, cost


def carry_out(n, slots):
    """Follows a plan as the replay would. Returns the visited steps, the recomputed steps and the most states held."""
    current, held, visited, recomputed, most = None, set(), [], 0, 0
    for action in backward_plan(n, slots):
        match action:
            case Load():
                current = 0
            case Recall(t):
                assert t in held
                current = t
            case Advance(t):
                assert current is not None
                assert t > current
                recomputed += t - current
                current = t
            case Hold(t):
                assert current == t
                assert t not in held
                held.add(t)
                most = max(most, len(held))
            case Drop(t):
                held.remove(t)
            case Visit(t):
                assert current == t - 1
                visited.append(t)
    assert not held
    return visited, recomputed, most


def test_every_plan_visits_each_step_once_backwards_within_its_memory_and_at_its_cost():
    for n in range(1, 41):
        for slots in range(42):
            visited, recomputed, most = carry_out(n, slots)
            assert visited == list(range(n, 0, -1))
            assert most <= slots
            assert recomputed == cost(n, slots)


def least_by_search(n, slots):
    """The least recomputation found by breadth-first search over what is held: knows nothing of splits."""
    best = {}
    queue = deque([(n, frozenset(), 0)])
    answers = []
    while queue:
        left, held, spent = queue.popleft()
        held = frozenset(t for t in held if t < left)
        if best.get((left, held), 10**9) <= spent:
            continue
        best[left, held] = spent
        if left == 0:
            answers.append(spent)
            continue
        for start in {0} | held:
            between = range(start + 1, left)
            for count in range(min(slots, len(between)) + 1):
                for new in _subsets(between, count):
                    for kept in _subsets(sorted(held), min(slots - count, len(held))):
                        queue.append((left - 1, frozenset(new) | frozenset(kept), spent + left - 1 - start))
    return min(answers)


def _subsets(items, count):
    from itertools import combinations

    return list(combinations(items, count))


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("slots", range(4))
def test_no_plan_at_all_recomputes_less(n, slots):
    assert cost(n, slots) == least_by_search(n, slots)


def test_known_values_of_binomial_checkpointing():
    """With s slots and r recomputations of a step, (s+1+r) choose r steps are reachable (Griewank 1992)."""
    assert cost(10, 9) == cost(10, 100) == 9
    assert cost(10, 0) == 45
    for slots, repeats in ((1, 2), (2, 2), (3, 3)):
        n = comb(slots + 1 + repeats, repeats)
        assert cost(n, slots) == repeats * n - comb(slots + 1 + repeats, repeats - 1)


def test_long_intervals_need_no_deep_recursion():
    visited, recomputed, _ = carry_out(3000, 3000)
    assert visited == list(range(3000, 0, -1))
    assert recomputed == 2999
