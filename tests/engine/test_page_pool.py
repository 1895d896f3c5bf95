"""Pools of pages and slots: nothing is handed out twice, and nothing is lost."""

from __future__ import annotations

import random

import pytest

from zincmetal.engine.pages import PagePool, Pool, PoolEmptyError, Seats


def test_a_page_is_free_when_its_last_owner_has_released_it() -> None:
    pool = Pool(2)
    first, second = pool.take(), pool.take()
    assert {first, second} == {0, 1}
    with pytest.raises(PoolEmptyError):
        pool.take()
    pool.retain(first)
    assert pool.shared(first)
    pool.release(first)
    assert (pool.shared(first), pool.free) == (False, 0)
    pool.release(first)
    assert (pool.count(first), pool.free, pool.take()) == (0, 1, first)


def test_a_free_page_is_neither_retained_nor_released() -> None:
    pool = Pool(1)
    for call in (pool.retain, pool.release):
        with pytest.raises(AssertionError):
            call(0)


def test_owners_are_counted_right_whatever_the_order() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    pool, owned = Pool(5), []
    for _ in range(2000):
        if owned and rng.random() < 0.5:
            pool.release(owned.pop(rng.randrange(len(owned))))
        elif owned and rng.random() < 0.5:
            owned.append(pool.retain(rng.choice(owned)))
        elif pool.free:
            taken = pool.take()
            assert taken not in owned, seed
            owned.append(taken)
        else:
            pool.grow(pool.size + rng.randrange(2))
        assert [pool.count(i) for i in range(pool.size)] == [owned.count(i) for i in range(pool.size)], seed
        assert pool.free == pool.size - len(set(owned)), seed


def test_a_pool_grows_by_free_numbers() -> None:
    pool = Pool(1)
    pool.take()
    pool.grow(3)
    pool.grow(2)
    assert (pool.size, pool.free) == (3, 2)
    assert sorted([pool.take(), pool.take()]) == [1, 2]


def test_pages_hold_64_positions() -> None:
    assert [PagePool.needed(n) for n in (0, 1, 64, 65, 128, 129)] == [0, 1, 1, 2, 2, 3]


def test_a_seat_is_of_one_sequence() -> None:
    seats = Seats(2)
    assert {seats.take(), seats.take()} == {0, 1}
    with pytest.raises(PoolEmptyError):
        seats.take()
    seats.release(1)
    with pytest.raises(AssertionError):
        seats.release(1)
    assert (seats.free, seats.take()) == (1, 1)
    seats.reset()
    assert seats.free == 2
