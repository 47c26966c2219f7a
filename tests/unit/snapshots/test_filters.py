"""containerd's filter language."""

import pytest

from nixlet import errors
from nixlet.snapshots import filters, model


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        ([], True),
        ([""], True),
        (["name==sha256:abc"], True),
        (["name==other"], False),
        (["name!=other"], True),
        (["name~=^sha256"], True),
        (["name~=/^sha256:[a-c]+$/"], True),
        (['name=="sha256:abc"'], True),
        (["kind==active"], True),
        (["kind==committed"], False),
        (["kind==committed", "name==sha256:abc"], True),
        (["kind==active,name==other"], False),
        (["kind==active,name~=abc"], True),
        (['labels."containerd.io/snapshot.ref"==x'], True),
        (['labels."containerd.io/snapshot.ref"'], True),
        (['labels."absent"'], False),
        (["labels.plain==1"], True),
        # As in Go: what isn't there equals nothing, and differs from everything.
        (['labels.absent==""'], False),
        (['labels.absent!=""'], False),
        (["labels.absent!=x"], True),
        (['labels.absent~="^$"'], True),
        (['labels.empty==""'], True),
        (["labels.a.b==2"], True),
        (["parent=="], None),
        (['parent==""'], True),
        (["unknown==x"], False),
        (["unknown"], False),
    ],
)
def test_filters(wanted: list[str], matches: bool | None) -> None:
    snapshot = model.Info(
        "sha256:abc",
        "",
        model.Kind.ACTIVE,
        0,
        0,
        {"containerd.io/snapshot.ref": "x", "plain": "1", "empty": "", "a.b": "2"},
    )
    if matches is None:
        with pytest.raises(errors.InvalidArgumentError, match="a value should stand there"):
            filters.parse(wanted)
    else:
        assert filters.parse(wanted)(snapshot) is matches


@pytest.mark.parametrize(
    "text", ["==x", "name=x", "name==a b", ",", "name==x,", "name~=(", 'name=="\\q"', ".name", "9a==1"]
)
def test_malformed_filters_are_refused(text: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="is malformed at character"):
        filters.parse([text])
