"""What clients have in front of them: sizes."""

import msgspec
import pytest

from nixlet.services import executing, running


@pytest.mark.parametrize("cells", [-1, 65536, 2**40])
@pytest.mark.parametrize("kind", [running.RunParameters, executing.ExecParameters, executing.AttachParameters])
def test_a_terminal_has_a_size_that_a_terminal_can_have(kind: type[msgspec.Struct], cells: int) -> None:
    asked = {"container": "c", "command": ["x"], "directory": "/", "image": "i", "streams": {}}
    known = {name: asked[name] for name in kind.__struct_fields__ if name in asked}
    for size in ("columns", "rows"):
        assert getattr(msgspec.convert({**known, size: 65535}, kind), size) == 65535
        with pytest.raises(msgspec.ValidationError, match=rf"\$\.{size}"):
            msgspec.convert({**known, size: cells}, kind)
