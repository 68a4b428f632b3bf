"""The two ways in which a plan is worked off: with the model in memory whole, or one layer of it at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from collection.hidden import HiddenSample
from collection.output import Output
from collection.passes import SHARE_FOR_STATES
from collection.plan import Layout, WeightsDigest, weights_digest
from collection.probing import fitting_batch_tokens
from collection.running import BatchRunner
from collection.settings import CollectSettings
from collection.streamed import ShardStreamer
from collection.tokens import TokenText
from collection.tracing import trace_shards
from groundwork.errors import ConfigurationError
from groundwork.hardware import free_memory_bytes
from moe.load import LoadedModel, load_model
from moe.resident import ResidentTracer
from moe.routers import RouterLayout, find_routers
from moe.streaming.load import open_layered
from moe.streaming.tracer import StreamedTracer
from traces.plan import Plan
from traces.schema import HIDDEN


@dataclass(frozen=True)
class Execution:
    """A model that is ready to be traced.

    `weights` is the digest of its weights; `steps` is how often each token is counted as done;
    `write_shards(run_dir, plan, layout, finished, text, output)` writes the shards that are not finished;
    `fitting_batch_tokens(layout)` probes for the largest batch.
    """

    loaded: LoadedModel
    routers: RouterLayout
    weights: str
    steps: int
    write_shards: Callable[[Path, Plan, Layout, set[int], TokenText, Output], None]
    fitting_batch_tokens: Callable[[Layout], int]


@contextmanager
def resident(settings: CollectSettings, layout: Layout) -> Iterator[Execution]:
    """Load the whole model; raises ConfigurationError as `load_model` does, and where its tokens are not its own."""
    loaded = load_model(settings.model, language_model=settings.generate > 0, **_loading(settings))
    _check_tokens(loaded, layout)
    weights, routers = weights_digest(loaded.model), find_routers(loaded.model)
    with ResidentTracer(loaded.model, routers, *_recording(settings)) as tracer:
        runner = BatchRunner(
            tracer,
            new_tokens=settings.generate,
            temperature=settings.temperature,
            seed=settings.seed,
            hidden=_hidden(settings, layout),
        )

        def write(
            run_dir: Path, plan: Plan, layout: Layout, finished: set[int], text: TokenText, output: Output
        ) -> None:
            trace_shards(run_dir, plan, layout, finished, runner, text, output)

        yield Execution(loaded, routers, weights, 1, write, lambda layout: fitting_batch_tokens(runner, layout))


@contextmanager
def streamed(settings: CollectSettings, layout: Layout) -> Iterator[Execution]:
    """Open the model and read all of its layers once; raises as `resident` does, and where it can not be streamed."""
    loaded, layered = open_layered(settings.model, **_loading(settings))
    _check_tokens(loaded, layout)
    weights = WeightsDigest()
    visit = lambda name, module: weights.add(module, name)  # noqa: E731
    with StreamedTracer(layered, *_recording(settings), visit=visit) as tracer:
        given = settings.memory_budget_gb
        free = free_memory_bytes(torch.device("cpu"))
        budget = int(SHARE_FOR_STATES * free if given is None else given * 1e9)

        def write(
            run_dir: Path, plan: Plan, layout: Layout, finished: set[int], text: TokenText, output: Output
        ) -> None:
            hidden, tokens = _hidden(settings, layout), settings.pass_tokens
            ShardStreamer(run_dir, plan, layout, tracer, hidden, tokens, budget, output).write_shards(finished, text)

        def refuse(layout: Layout) -> int:
            raise AssertionError("CollectSettings refuses to probe for a batch there")

        yield Execution(loaded, layered.layout, weights.hexdigest(), tracer.num_layers, write, refuse)


EXECUTIONS = {"resident": resident, "streamed": streamed}


def _loading(settings: CollectSettings) -> dict[str, Any]:
    names = ("device", "dtype", "quantization", "attn_implementation", "experts_implementation")
    return {name: getattr(settings, name) for name in names}


def _recording(settings: CollectSettings) -> tuple[tuple[str, ...], int, str]:
    return tuple(name for name in settings.columns if name != HIDDEN), settings.horizons, settings.lookahead_norm


def _hidden(settings: CollectSettings, layout: Layout) -> HiddenSample | None:
    if HIDDEN not in settings.columns:
        return None
    return HiddenSample(layout.num_tokens_S, settings.sample_hidden, settings.seed)


def _check_tokens(loaded: LoadedModel, layout: Layout) -> None:
    """Raise ConfigurationError where the tokenizer gives ids that the model does not know."""
    highest = max(int(sequence.token_ids_T.max()) for sequence in layout.sequences)
    embeddings: torch.Tensor = loaded.model.get_input_embeddings().weight  # type: ignore[assignment]
    known = embeddings.shape[0]
    if highest >= known:
        raise ConfigurationError(
            f"{loaded.name}: its tokenizer gives token id {highest}, but the model knows {known}; put the model's own "
            "tokenizer files into its folder"
        )
