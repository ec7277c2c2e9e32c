"""The heartbeat: what a rank is at, for others to read while it is busy or has died."""

from __future__ import annotations

from flexkernel.memory.heartbeat import Heartbeat


def test_the_last_module_has_a_name_for_whoever_reads(tmp_path):
    written = Heartbeat(tmp_path, 1, write=True)
    read = Heartbeat(tmp_path, 1)
    assert read.module_name == "", "nothing was entered, and no module has a name"
    written.name_modules({0: "(root)", 7: "model.layers.0"})
    assert read.module_name == ""
    written.beat(7)
    assert read.module_name == "model.layers.0"
    written.beat(0)
    assert read.module_name == "(root)"
    written.name_modules({})  # the model was unloaded
    assert read.module_name == ""


def test_its_files_are_this_users_alone(tmp_path):
    Heartbeat(tmp_path, 0, write=True).name_modules({0: "(root)"})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["heartbeat-0", "heartbeat-0-names"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())
