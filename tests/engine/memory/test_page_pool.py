import random

import pytest

from lockstep.engine.memory.page_pool import PagePool


def test_take_gives_distinct_pages_or_none_at_all():
    pool = PagePool(4)
    first = pool.take(3)
    assert len(set(first)) == 3
    assert pool.take(2) is None
    assert pool.num_free == 1
    assert pool.take(0) == []
    assert set(first) | set(pool.take(1)) == set(range(4))


def test_a_page_is_free_after_its_last_release():
    pool = PagePool(2)
    pages = pool.take(1)
    pool.retain(pages)
    pool.release(pages)
    assert (pool.num_free, pool.references(pages[0])) == (1, 1)
    pool.release(pages)
    assert pool.num_free == 2


def test_misuse_is_an_assertion_error():
    pool = PagePool(2)
    with pytest.raises(AssertionError, match="page 0 is free"):
        pool.release([0])
    with pytest.raises(AssertionError, match="page 1 is free"):
        pool.retain([1])
    with pytest.raises(AssertionError):
        pool.take(-1)
    with pytest.raises(ValueError, match="got 0"):
        PagePool(0)


@pytest.mark.parametrize("seed", range(20))
def test_random_calls_agree_with_a_counter_and_repeat(seed):
    def play() -> list[list[int] | None]:
        rng = random.Random(seed)
        pool, counts, answers = PagePool(12), [0] * 12, []
        for _ in range(400):
            held = [page for page in range(12) if counts[page]]
            action = rng.choice(["take", "retain", "release", "release"])
            if action == "take":
                count = rng.randrange(6)
                pages = pool.take(count)
                assert (pages is None) == (count > counts.count(0))
                answers.append(pages)
                for page in pages or []:
                    assert counts[page] == 0
                    counts[page] = 1
            elif held:
                pages = rng.sample(held, rng.randint(1, len(held)))
                getattr(pool, action)(pages)
                for page in pages:
                    counts[page] += 1 if action == "retain" else -1
            assert pool.num_free == counts.count(0)
            assert [pool.references(page) for page in range(12)] == counts
            pool.check_invariants()
        return answers

    assert play() == play()
