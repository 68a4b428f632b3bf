"""Public data sets on the Hugging Face hub: streamed at one revision, taken up again where a connection broke off.

The revision is the commit that the set's main branch is at when it is first read, and it is never asked for again: a
stream that broke is opened anew at the same commit and read on behind the rows that were given, so none is lost or
given twice. The hub's own client tries each request a few times and says so; what it gives up on is tried
again here, a bounded number of times in a row, unless trying again can not help.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from collection.registry import HubDataset
from collection.sources import Row, Source
from collection.texts import Table, columns_of, find_fields, first_line
from groundwork.errors import ConfigurationError, ExpertSpeculationError
from groundwork.progress import log

FIRST_ANSWER_SECONDS = 10.0
RETRIES = 5
FIRST_WAIT_SECONDS = 2.0  # doubled for each retry: a minute in all
BUSY = {408, 429}  # HTTP statuses below 500 that pass


class HubSource(Source):
    """A public data set on the hub; keys are split#row."""

    def __init__(self, name: str, registered: HubDataset) -> None:
        super().__init__(name, f"https://huggingface.co/datasets/{registered.repository}", registered.licence)
        self.registered = registered
        self._offline_way = (
            f"put {name}.jsonl into a folder and name that with --dataset_root, or use --datasets installed"
        )

    def read(self) -> Iterator[Row]:
        number = failures = 0
        while True:
            try:
                for text in islice(self._texts(), number, None):
                    yield Row(number, f"{self.registered.split}#{number}", text)
                    number, failures = number + 1, 0
                return
            except ConfigurationError:
                raise
            except Exception as error:
                # httpx, pyarrow, huggingface_hub and datasets each have their own errors, and wrap each other's.
                failures += 1
                self._refuse_what_stays(error, number)
                if failures > RETRIES:
                    raise ExpertSpeculationError(
                        f"data set '{self.name}': the hub failed {failures} times at row {number} "
                        f"({first_line(error)}); try again later, or {self._offline_way}"
                    ) from error
                wait = FIRST_WAIT_SECONDS * 2 ** (failures - 1)
                log(
                    f"data set '{self.name}': the hub failed at row {number} ({first_line(error)}); retry {failures} "
                    f"of {RETRIES} in {wait:g} s"
                )
                time.sleep(wait)

    def _texts(self) -> Iterator[str]:
        entry = self.registered
        if _is_offline():
            raise ConfigurationError(
                f"data set '{self.name}': HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set, so the hub is not asked; unset "
                f"it, or {self._offline_way}"
            )
        if Path(entry.repository).exists():
            raise ConfigurationError(
                f"data set '{self.name}': the folder {entry.repository} lies in the current one and would be read "
                "instead of the hub; read it with --dataset_root ., or start from another folder"
            )
        if "revision" not in self.facts:
            from huggingface_hub import HfApi, constants

            answer = HfApi(endpoint=constants.ENDPOINT).dataset_info(entry.repository, timeout=FIRST_ANSWER_SECONDS)
            self.facts["revision"] = answer.sha
        self.facts |= {"config": entry.config, "split": entry.split}
        with tempfile.TemporaryDirectory() as empty:
            # Where a request fails, the library would take whatever revision of the set its cache holds.
            table = Table(
                entry.repository,
                name=entry.config,
                split=entry.split,
                revision=self.facts["revision"],
                cache_dir=empty,
            )
        fields = find_fields(table.head, (entry.text_fields,))
        if fields is None:
            raise ConfigurationError(
                f"data set '{self.name}': {entry.repository} now has the columns {', '.join(columns_of(table.head))}, "
                f"not {' and '.join(entry.text_fields)}; {self._offline_way}"
            )
        self.facts["text_field"] = " + ".join(fields)
        yield from table.texts(fields)

    def _refuse_what_stays(self, error: Exception, number: int) -> None:
        """Raise ConfigurationError for what another try would meet again; a hub that never answered is such a thing."""
        from datasets.exceptions import DatasetNotFoundError, FileNotFoundDatasetsError
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

        causes = list(_causes(error))
        statuses = [each.response.status_code for each in causes if isinstance(each, HfHubHTTPError)]
        repository = self.registered.repository
        if any(isinstance(each, GatedRepoError) for each in causes) or (
            isinstance(error, DatasetNotFoundError) and "gated" in str(error)  # raised without its cause
        ):
            raise ConfigurationError(
                f"data set '{self.name}': {repository} is gated; accept its terms at {self.facts['location']} and log "
                f"in with 'hf auth login', or {self._offline_way}"
            ) from error
        if "revision" not in self.facts and not statuses:
            reason = f"the hub gives no {repository} ({first_line(error)})"
        elif statuses and statuses[0] < 500 and statuses[0] not in BUSY:
            reason = f"the hub answers {statuses[0]} for {repository}"
        elif not statuses and isinstance(error, (ValueError, TypeError, LookupError, FileNotFoundDatasetsError)):
            reason = f"{repository} can not be read at row {number} ({first_line(error)})"
        else:
            return
        raise ConfigurationError(f"data set '{self.name}': {reason}; {self._offline_way}") from error


def keep_revisions(sources: Iterable[Source], saved: Iterable[Mapping[str, Any]]) -> None:
    """Let each hub source be read at the revision in its facts of a saved plan, whatever the hub's newest is today."""
    revisions = {facts["name"]: facts["revision"] for facts in saved if facts.get("revision")}
    for source in sources:
        if isinstance(source, HubSource) and source.name in revisions:
            source.facts["revision"] = revisions[source.name]


def _is_offline() -> bool:
    from datasets import config
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE or config.HF_HUB_OFFLINE)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
