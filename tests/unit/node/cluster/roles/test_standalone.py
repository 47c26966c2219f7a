"""A kubelet without a cluster; by a real one: system/test_kubelet_alone.py."""

import pytest

from nixlet import errors
from nixlet.node.cluster.roles import standalone
from nixlet.node.settings import config


@pytest.mark.parametrize("argument", ["=x", "no argument at all", "-"])
def test_what_is_no_argument_is_told_before_anything_starts(argument: str) -> None:
    settings = config.Settings(kubernetes="kubelet", node_name="n", kubelet_arg=["v=2", argument])
    with pytest.raises(errors.InvalidArgumentError, match=r"^--kubelet-arg number 2 is no argument$"):
        standalone.cluster_settings(settings)


def test_a_kubelet_s_own_settings() -> None:
    made = standalone.cluster_settings(config.Settings(kubernetes="kubelet", node_name="n", kubelet_arg=["v=2"]))
    assert (made.node_name, made.kubelet_args, made.is_standalone) == ("n", ("v=2",), True)
