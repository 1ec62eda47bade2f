"""The layout against the number of processes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapipe.config import Config, check_layout, load_config
from megapipe.config.layout import usable_world_sizes
from megapipe.errors import ConfigError
from megapipe.models.families import FAMILIES
from tests.config.examples import write


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config(write(tmp_path_factory.mktemp("config")), [], FAMILIES)


def test_data_follows_from_the_world_size(config: Config) -> None:
    for world_size, data in ((4, 1), (8, 2), (32, 8)):
        assert check_layout(config, world_size).parallel.data == data


def test_the_arithmetic_is_shown(config: Config) -> None:
    with pytest.raises(ConfigError) as caught:
        check_layout(config, 6)
    assert str(caught.value) == (
        "the layout needs parallel.tensor 2 * parallel.pipeline 2 = 4 processes for each replica "
        "of the model, and there are 6, which is not a multiple of 4. World sizes that work with "
        "this config: 4, 8, 16, 32."
    )
    with pytest.raises(ConfigError, match=r"make 3 replicas .* 16 / train.micro_batch_size 2 = 8"):
        check_layout(config, 12)
    with pytest.raises(ConfigError, match="there is 1, which is not a multiple of 4"):
        check_layout(config, 1)


def test_a_given_data_size_must_agree(config: Config) -> None:
    parallel = config.parallel.model_copy(update={"data": 2})
    given_data = Config(**{**dict(config), "parallel": parallel})
    assert check_layout(given_data, 8) == given_data
    with pytest.raises(ConfigError, match=r"parallel.data 2 = 8 processes, and there are 4"):
        check_layout(given_data, 4)


@given(world_size=st.integers(1, 80))
def test_exactly_the_world_sizes_that_are_named_work(config: Config, world_size: int) -> None:
    if world_size in usable_world_sizes(config):
        check_layout(config, world_size)
    else:
        with pytest.raises(ConfigError):
            check_layout(config, world_size)
