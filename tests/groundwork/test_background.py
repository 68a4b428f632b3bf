"""Items arrive in order, both sides wait for each other, and an error on either side ends both."""

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat

import pytest

from groundwork.background import Abandoned, Background


def run(consume: Callable[[Iterator[int]], None], items: Iterable[int], error: BaseException | None = None) -> None:
    with Background[int](consume) as background:
        for item in items:
            background.put(item)
        if error is not None:
            raise error


def test_all_items_arrive_in_order_before_the_block_is_left() -> None:
    arrived: list[int] = []
    run(arrived.extend, range(100))
    assert arrived == list(range(100))


def test_no_more_items_wait_than_were_allowed() -> None:
    made: list[int] = []
    all_there = threading.Event()
    most = []

    def consume(items: Iterator[int]) -> None:
        next(items)
        all_there.wait()
        most.append(len(made))
        list(items)

    with Background[int](consume, ahead=2) as background:
        for number in range(9):
            made.append(number)
            if number == 3:  # one was taken and two wait, so this one has to
                all_there.set()
            background.put(number)
    assert most == [4]


def test_what_the_thread_raises_ends_a_caller_who_would_wait_forever() -> None:
    def consume(items: Iterator[int]) -> None:
        raise OSError(f"no space for {next(items)}")

    with pytest.raises(OSError, match="no space for 7"):
        run(consume, repeat(7))


def test_an_error_at_the_last_item_is_raised_on_leaving() -> None:
    def consume(items: Iterator[int]) -> None:
        if list(items) == [1, 2]:
            raise OSError("full at last")

    with pytest.raises(OSError, match="full at last"):
        run(consume, [1, 2])


def test_an_error_of_the_caller_is_raised_once_the_thread_has_undone_its_work() -> None:
    undone = []

    def consume(items: Iterator[int]) -> None:
        try:
            list(items)
        except Abandoned:
            undone.append(True)
            raise

    with pytest.raises(KeyboardInterrupt):
        run(consume, [1], KeyboardInterrupt())
    assert undone == [True]


def test_items_after_the_thread_has_had_enough_are_refused() -> None:
    with pytest.raises(ValueError, match=r"after consume\(\) had returned"):
        run(lambda items: print(next(items)), repeat(7))
