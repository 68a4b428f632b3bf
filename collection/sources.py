"""What every source of texts is: a name, facts for the plan, a weight, and rows in an order that never changes."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from collection.installed import read_installed


class Row(NamedTuple):
    """One candidate: its number in the source, a key that finds it there again, and its text ('' where missing)."""

    number: int
    key: str
    text: str


class Source(ABC):
    """One named data set; `facts` says where it is and under which licence, and more once it has been read.

    Of the sequences of a run it gives the share that its `weight` has in the weights of all sources.
    """

    def __init__(self, name: str, location: str, licence: str) -> None:
        self.name = name
        self.weight = Fraction(1)
        self.facts: dict[str, Any] = {"name": name, "location": location, "licence": licence}

    @abstractmethod
    def read(self) -> Iterator[Row]:
        """Yield every row, in the same order each time; raises ConfigurationError where it can not be read."""


class InstalledSource(Source):
    """One of the kinds of text that every installation holds."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind, "installed packages", "that of each package")

    def read(self) -> Iterator[Row]:
        times: Counter[str] = Counter()
        for number, (key, text) in enumerate(read_installed(self.name)):
            times[key] += 1
            yield Row(number, key if times[key] == 1 else f"{key}~{times[key]}", text)
