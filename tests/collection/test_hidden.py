"""`--sample_hidden`: a share of the tokens carries what the routers read, whichever way the run was made."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collection.collector import collect
from collection.hidden import HiddenSample
from collection.settings import CollectSettings
from groundwork.errors import ConfigurationError
from moe.load import load_model
from moe.routers import find_routers
from traces.manifest import MANIFEST_NAME
from traces.reader import TraceDataset
from traces.schema import SequenceTrace
from traces.verify import verify

Make = Callable[..., CollectSettings]
SHARE = 0.3


@pytest.fixture
def settings(
    tmp_path: Path, make_settings: Make, make_texts: Callable[..., list[str]], write_texts: Callable[..., Path]
) -> CollectSettings:
    path = write_texts(tmp_path / "texts.jsonl", make_texts(30, longest=30))
    return make_settings(datasets=str(path), sample_hidden=SHARE, shard_size_mb=0.03)


def read(run_dir: Path) -> list[SequenceTrace]:
    return list(TraceDataset(run_dir).sequences(columns=("weights", "hidden")))


@pytest.mark.parametrize("changes", [{}, {"generate": 6, "store": ("weights", "lookahead")}])
def test_stored_inputs_are_what_the_routers_read_and_the_experts_follow_from_them(
    settings: CollectSettings, changes: dict[str, object]
) -> None:
    run_dir = collect(replace(settings, **changes)).run_dir
    assert verify(run_dir) == []
    loaded = load_model(settings.model, device="cpu")
    sites = find_routers(loaded.model).sites
    read_L: list[torch.Tensor] = []
    for site in sites:
        site.module.register_forward_pre_hook(lambda module, args: read_L.append(args[0]))
    sequences = read(run_dir)
    count = sum(len(each.hidden_positions_N) for each in sequences)
    assert abs(count - SHARE * sum(each.num_tokens for each in sequences)) <= 1
    for sequence in sequences:
        read_L.clear()
        with torch.inference_mode():
            loaded.model(torch.from_numpy(sequence.token_ids_T).long()[None])
        inputs_TLD = torch.stack([each.reshape(sequence.num_tokens, -1) for each in read_L], dim=1)
        stored_NLD = torch.from_numpy(sequence.router_input_NLD)
        assert stored_NLD.shape[0] > 0
        assert torch.allclose(stored_NLD.float(), inputs_TLD[sequence.hidden_positions_N], atol=5e-3)
        for layer, site in enumerate(sites):
            best_N = site.logits(stored_NLD[:, layer].float()).argmax(dim=-1)
            chosen_N = sequence.expert_ids_TLK[sequence.hidden_positions_N, layer, 0]
            assert np.mean(best_N.numpy() == chosen_N) > 0.95  # but for scores that float16 makes change places


def test_other_batches_and_a_resumed_run_choose_the_same_tokens(settings: CollectSettings) -> None:
    settings = replace(settings, generate=3)
    run_dir = collect(settings).run_dir
    other = collect(replace(settings, batch_size=1, output_dir=run_dir.with_name("single"))).run_dir
    lines = (run_dir / MANIFEST_NAME).read_bytes().splitlines(keepends=True)
    assert len(lines) > 1
    (run_dir / MANIFEST_NAME).write_bytes(lines[0])
    collect(replace(settings, resume=True))
    for left, right in zip(read(run_dir), read(other), strict=True):
        assert np.array_equal(left.hidden_positions_N, right.hidden_positions_N)
        assert np.allclose(left.router_input_NLD, right.router_input_NLD, atol=5e-3)
    with pytest.raises(ConfigurationError, match=r"sample_hidden was 0\.3, is 0\.2"):
        collect(replace(settings, sample_hidden=0.2, resume=True))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.floats(0.001, 1), st.integers(0, 9), st.data())
def test_any_stretch_of_sequences_has_its_share_to_within_one_token(
    lengths: list[int], share: float, seed: int, data: st.DataObject
) -> None:
    sample = HiddenSample(lengths, share, seed)
    first = data.draw(st.integers(0, len(lengths) - 1))
    stop = data.draw(st.integers(first + 1, len(lengths)))
    chosen = [sample.positions(each) for each in range(first, stop)]
    assert abs(sum(map(len, chosen)) - share * sum(lengths[first:stop])) <= 1 + 1e-6
    for places, length in zip(chosen, lengths[first:stop], strict=True):
        assert set(places.tolist()) <= set(range(length))


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_what_is_no_share_is_refused(make_settings: Make, share: float) -> None:
    with pytest.raises(
        ConfigurationError, match=r"--sample_hidden .*: must be a share of the tokens, 0 to 1; give such"
    ):
        make_settings(sample_hidden=share)
