"""Works a plan off with a streamed model: some whole shards at a time go through all layers, then they are written.

Within a pass a layer takes every batch of the plan in turn, so a run reads the weights once a pass, whatever the number
of batches. After each layer the state of the pass is on disk, where a resumed run takes it up. Hidden states stay in
memory, too, as far as the budget goes. Signals are heeded between batches, and cost the layer under way.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch import Tensor

from collection.hidden import HiddenSample
from collection.layer_running import LayerRunner
from collection.output import LOCAL, Bar, Output
from collection.pass_state import BlockResult, PassState
from collection.passes import BLOCK_TOKENS, cut_passes
from collection.plan import Layout
from collection.tokens import TokenText
from collection.writing import Routed, write_shards
from groundwork.background import Background
from groundwork.disk import free_bytes
from groundwork.errors import ConfigurationError
from groundwork.interrupt import finishing_steps
from moe.streaming.captured import unpack
from moe.streaming.tracer import StreamedTracer
from traces.plan import Plan, PlannedShard
from traces.run_folder import SPARE_SPACE
from traces.schema import decoded_bytes_per_token


class ShardStreamer:
    """Takes the shards of `plan` that are not written yet through the layers of `tracer`, which stays in its context.

    A pass holds about `pass_tokens`, and `memory_budget` bytes of hidden states are kept in memory, besides those of up
    to four blocks on their way.
    """

    def __init__(
        self,
        run_dir: Path,
        plan: Plan,
        layout: Layout,
        tracer: StreamedTracer,
        hidden: HiddenSample | None,
        pass_tokens: int,
        memory_budget: int,
        output: Output = LOCAL,
    ) -> None:
        self._run_dir, self._plan, self._layout = run_dir, plan, layout
        self._tracer, self._runner = tracer, LayerRunner(tracer, layout, hidden)
        self._pass_tokens, self._budget = pass_tokens, memory_budget
        self._folder, self._output = run_dir / output.working, output
        shard_of = plan.sequences["shard"].to_numpy()
        self._batches: dict[int, list[int]] = {shard.index: [] for shard in plan.shards}
        for number, batch in enumerate(layout.batches):
            self._batches[int(shard_of[batch[0]])].append(number)

    def write_shards(self, finished: set[int], text: TokenText) -> None:
        """Write every shard that is not `finished`; the caller holds the folder.

        Raises KeyboardInterrupt between two batches once a signal has come, ConfigurationError where a pass would not
        fit on the disk, and ExpertSpeculationError where a lone sequence does not fit in memory.
        """
        state = PassState.found(self._folder, self._plan.fingerprint)
        left = {shard.index: shard for shard in self._plan.shards if shard.index not in finished}
        begun = [left.pop(index) for index in state.shards if index in left] if state else []
        passes = ([begun] if begun else []) + cut_passes(left.values(), self._pass_tokens)
        self._check_free_space(passes)
        layers = self._tracer.num_layers
        bar = self._output.bar(
            sum(shard.num_tokens for shards in passes for shard in shards) * layers,
            "token-layer",
            sum(shard.num_tokens for shard in begun) * (state.layers if state else 0),
        )
        with bar, finishing_steps() as step_done:
            for shards in passes:
                if state is None or shards is not begun:
                    numbers = [shard.index for shard in shards]
                    state = PassState.begin(self._folder, self._plan.fingerprint, numbers)
                blocks = self._cut_blocks(state.shards)
                self._run_layers(state, blocks, bar, step_done)
                self._write(state, blocks, shards, text, step_done)
                PassState.clear(self._folder)
        PassState.clear(self._folder)  # of a run that was killed just before

    def _check_free_space(self, passes: list[list[PlannedShard]]) -> None:
        """Raise ConfigurationError unless the state of the largest pass will fit on the disk, beside what is there."""
        config = self._tracer.layered.model.config.get_text_config()
        hidden = config.hidden_size * self._tracer.layered.model.dtype.itemsize
        each = 2 * hidden + 2 * decoded_bytes_per_token(self._plan.spec)  # of two layers; weights are float32 here
        tokens = max((sum(shard.num_tokens for shard in shards) for shards in passes), default=0)
        there = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        needed, free = SPARE_SPACE * each * tokens - there, free_bytes(self._run_dir)
        if needed > free:
            raise ConfigurationError(
                f"{self._run_dir}: a pass of {tokens} tokens needs about {needed / 1e9:.2f} GB there and "
                f"{free / 1e9:.2f} GB are free; free some, lower --pass_tokens, or make smaller shards in a new run"
            )

    def _run_layers(self, state: PassState, blocks: list[list[int]], bar: Bar, step_done: Callable[[], None]) -> None:
        """Take all batches through the layers that are not finished, one layer at a time."""
        kept = KeptStates(self._budget)
        self._runner.notes = dict(state.notes)
        with self._tracer.layers(state.layers) as layers, ThreadPoolExecutor(1) as disk:
            for index in layers:
                last = index == self._tracer.num_layers - 1
                written: list[Future[None]] = []
                for block, numbers in enumerate(blocks):
                    before = kept.take(block) or (state.hidden(block) if index else {})
                    after, shown = {}, {}
                    for number in numbers:
                        step_done()
                        after[number], shown[number] = self._runner.run(index, number, before.pop(number, None))
                        bar.update(sum(self._layout.num_tokens_S[each] for each in self._layout.batches[number]))
                    if not last:
                        kept.put(block, after)
                    if block > 1:
                        written[block - 2].result()  # no more than two blocks wait to be written
                    written.append(disk.submit(state.write, BlockResult(block, {} if last else after, shown)))
                for each in written:
                    each.result()
                state.commit(self._runner.notes)

    def _write(
        self,
        state: PassState,
        blocks: list[list[int]],
        shards: list[PlannedShard],
        text: TokenText,
        step_done: Callable[[], None],
    ) -> None:
        """Write the shards of a pass that has finished all layers."""
        wanted = {number for shard in shards for number in self._batches[shard.index]}
        write = partial(write_shards, self._run_dir, self._plan.spec, shards, self._layout, text, output=self._output)
        layout = self._tracer.layout
        with Background(write) as writing:
            for block, numbers in enumerate(blocks):
                if wanted.isdisjoint(numbers):
                    continue
                shown = state.shown(block)
                for number in numbers:
                    step_done()
                    if number in wanted:
                        batch = self._layout.batches[number]
                        routing = unpack(shown.pop(number), len(batch), layout.num_experts, self._plan.spec.horizons)
                        writing.put(Routed([(batch, routing)], state.notes.get(number)))

    def _cut_blocks(self, shards: list[int]) -> list[list[int]]:
        """Return the batches of some shards, by number, in blocks."""
        blocks: list[list[int]] = []
        room = 0
        for number in (number for shard in shards for number in self._batches[shard]):
            lengths = [len(self._layout.sequences[each].token_ids_T) for each in self._layout.batches[number]]
            padded = len(lengths) * max(lengths)
            if not blocks or padded > room:
                blocks.append([])
                room = BLOCK_TOKENS
            blocks[-1].append(number)
            room -= padded
        return blocks


class KeptStates:
    """Hidden states of blocks in memory, up to `budget` bytes; those that do not fit are not kept."""

    def __init__(self, budget: int) -> None:
        self._room = budget
        self._kept: dict[int, dict[int, Tensor]] = {}

    def put(self, block: int, hidden: dict[int, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in hidden.values())
        if size <= self._room:
            self._kept[block] = dict(hidden)
            self._room -= size

    def take(self, block: int) -> dict[int, Tensor]:
        """Return a block's hidden states, which are kept no longer; nothing where they are not."""
        hidden = self._kept.pop(block, {})
        self._room += sum(tensor.nbytes for tensor in hidden.values())
        return hidden
