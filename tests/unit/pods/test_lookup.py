"""Which container a person means."""

import pytest

from nixlet import errors
from nixlet.pods import criconfig, lookup
from nixlet.rpc.gen import cri_pb2


def container(id_: str, name: str, pod: str, namespace: str = "default") -> cri_pb2.Container:
    labels = {criconfig.POD_NAME: pod, criconfig.POD_NAMESPACE: namespace}
    return cri_pb2.Container(id=id_, metadata=cri_pb2.ContainerMetadata(name=name), labels=labels)


#: Each ID begins with the name of another container, or is one.
THERE = (
    container("f5aa01", "db", "db"),
    container("dbaa02", "f5", "f5"),
    container("dbbb03", "main", "shop"),
    container("c0ffee", "side", "shop"),
    container("c0ff01", "main", "bar"),
    container("c0ff02", "main", "bar", "other"),
    container("0a0a0a", "c0ffee", "hot"),
    container("beef00", "0a0a", "bar", "third"),
)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("db", "f5aa01"),
        ("f5", "dbaa02"),
        ("f5aa", "f5aa01"),
        ("dba", "dbaa02"),
        ("c0ffee", "c0ffee"),
        ("0a0a", "beef00"),
        ("0a0a0", "0a0a0a"),
        ("shop/main", "dbbb03"),
        ("side", "c0ffee"),
        ("hot", "0a0a0a"),
        ("other/bar/main", "c0ff02"),
    ],
)
def test_names_go_before_the_beginnings_of_ids(wanted: str, found: str) -> None:
    assert lookup.find(wanted, THERE).id == found
    assert lookup.find(wanted, THERE[::-1]).id == found


@pytest.mark.parametrize("wanted", ["main", "shop", "bar/main", "c0", "dbb0", "c0f"])
def test_what_can_mean_several_means_none(wanted: str) -> None:
    several = (*THERE, container("dbb001", "x", "x"), container("dbb002", "y", "y"))
    with pytest.raises(errors.InvalidArgumentError, match=f"^{wanted} can mean several containers: ") as caught:
        lookup.find(wanted, several)
    assert "(" in caught.value.message


@pytest.mark.parametrize("wanted", ["", "no", "/", "//", "shop/", "F5AA", "DB", "5aa", "default/shop/none"])
def test_what_is_nobodys_name(wanted: str) -> None:
    with pytest.raises(errors.NotFoundError, match=r"^there is no container "):
        lookup.find(wanted, THERE[:1])


@pytest.mark.parametrize("wanted", ["", "/", "//", "shop/", "default/shop/", "/main"])
def test_what_has_no_name_is_not_called_by_an_empty_one(wanted: str) -> None:
    """A pod without containers stands among them as one without a name; others may have no pod's."""
    there = (container("aaaa", "", "shop"), container("bbbb", "main", "", ""), container("cccc", "", "", ""))
    for each in there:
        with pytest.raises(errors.NotFoundError, match=r"^there is no container "):
            lookup.find(wanted, [each])
    assert lookup.find("shop", there[:1]).id == "aaaa"
