"""What a node looks at before it says that it is ready."""

from pathlib import Path
from unittest import mock

import pytest

from nixlet import errors
from nixlet.host import unixsocket
from nixlet.node.lifecycle import assembly
from nixlet.node.settings import config as node_config
from nixlet.snapshots import model, snapshotter


async def test_a_snapshotter_whose_database_takes_no_changes_is_not_ready(tmp_path: Path) -> None:
    made = snapshotter.Snapshotter(
        str(tmp_path / "root"),
        store_dir="/nix/store",
        real_store_dir=str(tmp_path),
        realise=mock.sentinel.realiser,
        gc_roots=mock.Mock(),
    )
    socket = str(tmp_path / "snapshotter.sock")
    with unixsocket.listen(socket):
        checks = assembly._checks(
            mock.MagicMock(),
            mock.Mock(),
            mock.Mock(snapshotter=made),
            mock.Mock(socket=socket),
            mock.Mock(),
            node_config.Layout(str(tmp_path), str(tmp_path)),
        )
        await checks["snapshotter"]()
        await made.close()
        assert made.counts() == dict.fromkeys(model.Kind, 0)
        with pytest.raises(errors.UnavailableError, match=r"nixlet\.db is closed"):
            await checks["snapshotter"]()
