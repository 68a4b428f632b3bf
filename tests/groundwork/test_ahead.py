import threading
from collections.abc import Iterator

import pytest

from groundwork.ahead import ReadAhead


def test_items_come_in_order_and_all_of_them() -> None:
    with ReadAhead(range(100), ahead=3) as items:
        assert list(items) == list(range(100))


def test_the_thread_makes_at_most_so_many_items_ahead_and_ends_with_the_block() -> None:
    made: list[int] = []
    third = threading.Event()

    def count() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            if number == 3:
                third.set()
            yield number

    with ReadAhead(count(), ahead=2) as items:
        assert next(items) == 0
        assert third.wait(10)  # two wait in the queue, one in the thread's hand
        assert len(made) == 4
    assert threading.active_count() == 1 or all(each.name != "read ahead" for each in threading.enumerate())


def test_an_error_comes_where_the_item_would_have_come() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("torn page")

    with ReadAhead(broken()) as items:
        assert next(items) == 1
        with pytest.raises(ValueError, match="torn page"):
            next(items)
