"""Axes from a config and a number of processes: what fits, and what is refused, with the sums."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.config import Config, load_config
from megapipe.errors import ConfigError
from megapipe.layout.world import resolve_axes, usable_world_sizes, with_axes
from megapipe.models.families import FAMILIES
from tests.config.examples import write


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of two tensor and two pipeline ranks, and 8 microbatches, without a number of replicas."""
    return load_config(write(tmp_path_factory.mktemp("config")), [], FAMILIES)


def with_data(config: Config, data: int) -> Config:
    parallel = config.parallel.model_copy(update={"data": data})
    return Config(**{**dict(config), "parallel": parallel})


def test_data_follows_from_the_world_size(config: Config) -> None:
    for world_size, data in ((4, 1), (8, 2), (32, 8)):
        axes = resolve_axes(config, world_size)
        assert dict(axes.sizes) == {"pipeline": 2, "data": data, "tensor": 2}
        assert axes.world_size == world_size


def test_without_a_number_of_processes_it_is_the_fewest(config: Config) -> None:
    assert resolve_axes(config) == resolve_axes(config, 4)
    assert resolve_axes(config).world_size == 4
    assert resolve_axes(with_data(config, 2)) == resolve_axes(config, 8)
    assert resolve_axes(with_data(config, 2)).world_size == 8


def test_a_filled_config_names_every_size_and_nothing_else_changes(config: Config) -> None:
    filled = with_axes(config, resolve_axes(config, 8))
    assert config.parallel.data is None
    assert filled == with_data(config, 2)
    assert with_axes(filled, resolve_axes(filled, 8)) == filled


def test_the_arithmetic_is_shown(config: Config) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_axes(config, 6)
    assert str(caught.value) == (
        "the layout needs parallel.tensor 2 * parallel.pipeline 2 = 4 processes for each replica "
        "of the model, and there are 6, which is not a multiple of 4. World sizes that work with "
        "this config: 4, 8, 16, 32."
    )
    with pytest.raises(ConfigError, match=r"make 3 replicas .* 16 / train.micro_batch_size 2 = 8"):
        resolve_axes(config, 12)
    with pytest.raises(ConfigError, match="there is 1, which is not a multiple of 4"):
        resolve_axes(config, 1)


def test_a_given_data_size_must_agree(config: Config) -> None:
    given_data = with_data(config, 2)
    assert resolve_axes(given_data, 8).sizes["data"] == 2
    with pytest.raises(ConfigError, match=r"parallel.data 2 = 8 processes, and there are 4"):
        resolve_axes(given_data, 4)


@settings(deadline=None)
@given(world_size=st.integers(1, 80))
def test_exactly_the_world_sizes_that_are_named_work(config: Config, world_size: int) -> None:
    if world_size in usable_world_sizes(config):
        assert resolve_axes(config, world_size).world_size == world_size
    else:
        with pytest.raises(ConfigError):
            resolve_axes(config, world_size)
