"""Files that are written whole, locks, and how differing settings are shown."""

import errno
import fcntl
import multiprocessing
import os
import time

import pytest

from edt.utils.errors import UserError
from edt.utils.files import atomic_write, differences, file_lock, write_json


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    for name in ("absent", "present"):
        target, link = tmp_path / name / "file", tmp_path / f"{name}-link"
        target.parent.mkdir()
        if name == "present":
            target.write_text("old")
        link.symlink_to(target)
        write_json(link, {"a": 1})
        assert link.readlink() == target
        assert target.read_text() == '{\n  "a": 1\n}\n'
        assert [path.name for path in target.parent.iterdir()] == ["file"]
        with pytest.raises(KeyError), atomic_write(link) as temporary:
            temporary.write_text("half")
            raise KeyError
        assert target.read_text() == '{\n  "a": 1\n}\n'
        assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for name, kind in (("fifo", "a pipe"), ("folder", "a folder"), ("link", "a pipe")):
        with pytest.raises(UserError, match=f"{name} is {kind}, not a file; name a file"):
            write_json(tmp_path / name, {})
    assert (tmp_path / "fifo").is_fifo()
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError) as error:
        write_json(tmp_path / "loop", {})
    assert error.value.errno == errno.ELOOP
    assert (tmp_path / "loop").is_symlink()
    assert len(list(tmp_path.iterdir())) == 4


def test_the_longest_names_are_written(tmp_path):
    write_json(tmp_path / ("x" * 255), {})
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL])
@pytest.mark.parametrize("refusal", ["another run", None])
def test_a_file_system_without_locks_is_warned_of_once(
    code, refusal, tmp_path, monkeypatch, caplog
):
    def flock(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    entered = 0
    for _ in range(2):
        with file_lock(tmp_path / ".lock", refusal):
            entered += 1
    assert entered == 2
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith(f"cannot lock {tmp_path} ({os.strerror(code)})")


def test_a_lock_that_is_held_is_refused_and_free_afterwards(tmp_path):
    with file_lock(tmp_path / ".lock"):
        with pytest.raises(UserError, match="another run"):
            with file_lock(tmp_path / ".lock", "another run"):
                pytest.fail("two hold the lock")
        context = multiprocessing.get_context("fork")
        started = context.Event()
        reader = context.Process(target=lambda: (started.set(), time.sleep(60)))
        reader.start()
        started.wait()
    # A reader of the run that has ended is still there, as after a kill -9.
    with file_lock(tmp_path / ".lock", "another run"):
        pass
    reader.kill()
    reader.join()


def test_a_lock_file_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot write to .*absent/.lock"):
        with file_lock(tmp_path / "absent" / ".lock"):
            pytest.fail("there is no such folder")


def test_differences_are_shown_where_they_are():
    names = [f"class {i}" for i in range(1000)]
    renamed = [*names[:7], "owl", *names[8:]]
    assert differences({"classes": names, "n": 1}, {"classes": names, "n": 1}) == ""
    assert differences({"classes": names}, {"classes": renamed}) == "classes[7]: class 7 -> owl"
    shorter = differences({"classes": names}, {"classes": names[:9]})
    assert shorter == "classes: 1000 values -> 9 values"
    assert differences({"classes": names}, {}) == "classes: 1000 values -> None"


def test_a_hash_decides_over_the_name_beside_it():
    old, moved = {"vae": "a", "vae_sha256": "1"}, {"vae": "b", "vae_sha256": "1"}
    assert differences(old, moved) == ""
    assert differences(old, {"vae": "a", "vae_sha256": "2"}) == "vae_sha256: 1 -> 2"
    assert differences(old, {"vae": "b", "vae_sha256": "2"}) == "vae: a -> b, vae_sha256: 1 -> 2"
    assert differences({"vae": "a", "vae_sha256": None}, {"vae": "b", "vae_sha256": None})
    assert differences({"vae": "a"}, {"vae": "b"}) == "vae: a -> b"
    nested = {"vae": {"id": "a", "sha256": "1"}}
    assert differences(nested, {"vae": {"id": "b", "sha256": "1"}}) == ""
    assert differences(nested, {"vae": {"id": "b", "sha256": "2"}})
    assert differences(nested, {"vae": {"id": "a", "sha256": "1", "shift_factor": 0.1}})


def test_a_hash_of_a_configuration_that_was_not_recorded_fits_any():
    old, new = {"vae_sha256": "1"}, {"vae_sha256": "1", "vae_config_sha256": "2"}
    assert differences(old, new) == differences(new, old) == ""
    other = {"vae_sha256": "1", "vae_config_sha256": "3"}
    assert differences(new, other) == "vae_config_sha256: 2 -> 3"
