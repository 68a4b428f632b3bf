import pytest

from groundwork.errors import ConfigurationError
from moe.mini import SIZES, mixtral_config, parameter_table, size


def test_the_172m_preset_has_the_published_number_of_parameters():
    total = dict(parameter_table(size("172m")))["total"]
    assert total == pytest.approx(172.4e6, rel=0.01)


def test_components_add_up_to_the_total():
    for shape in SIZES.values():
        *components, (name, total) = parameter_table(shape)
        assert name == "total"
        assert sum(count for _, count in components) == total


def test_the_demo_preset_fits_32_mib_in_bf16_with_at_least_8_layers():
    assert 2 * dict(parameter_table(size("demo")))["total"] < 31 * 2**20
    assert size("demo").layers >= 8


@pytest.mark.parametrize("name", SIZES)
def test_every_preset_is_a_mixtral_with_grouped_queries_a_sliding_window_and_top_2_of_8(name):
    config = mixtral_config(size(name))
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.sliding_window
    assert (config.num_experts_per_tok, config.num_local_experts) == (2, 8)


def test_an_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match="--size 'huge' is unknown; known sizes: tiny, demo, 172m"):
        size("huge")
