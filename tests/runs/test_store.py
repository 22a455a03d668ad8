"""A run's folder: whole files or none, damage found, other people's files left alone."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlab.errors import RunFolderError
from attnlab.runs.store import RunFolder, decode_states, encode_states, one_sentence_for_disk_errors, write_atomically

STATES = {
    "sinks": {"hits": torch.arange(6).reshape(2, 3), "mean": torch.tensor(0.5, dtype=torch.float64)},
    "entropy": {"sum": torch.randn(4, dtype=torch.float64), "none": torch.zeros(0, 3), "seen": torch.tensor([True])},
}


def test_states_come_back_as_they_were_written() -> None:
    back = decode_states(encode_states(STATES, "run:3"), "run:3")
    assert back is not None
    assert back.keys() == STATES.keys()
    for name, state in STATES.items():
        for key, tensor in state.items():
            assert back[name][key].dtype == tensor.dtype
            assert torch.equal(back[name][key], tensor)


def test_tensors_that_share_memory_can_be_written() -> None:
    whole = torch.randn(4, 4)
    back = decode_states(encode_states({"a": {"x": whole, "row": whole[1], "turned": whole.T}}, ""), "")
    assert back is not None
    assert torch.equal(back["a"]["turned"], whole.T)


def test_the_same_states_are_the_same_bytes() -> None:
    assert encode_states(STATES, "run:3") == encode_states(STATES, "run:3")


@given(data=st.data())
def test_a_chunk_that_is_cut_short_or_changed_is_not_taken_up(data: st.DataObject) -> None:
    content = encode_states(STATES, "run:3")
    at = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[at] ^= data.draw(st.integers(1, 255))
    assert decode_states(content[:at], "run:3") is None
    back = decode_states(bytes(changed), "run:3")
    # White space in the header may change without harm; no number may.
    assert back is None or all(torch.equal(back[a][k], t) for a, state in STATES.items() for k, t in state.items())


def test_a_chunk_of_another_run_or_place_is_not_taken_up(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_chunk(2, STATES, "run")
    assert folder.read_chunk(2, "run") is not None
    assert folder.read_chunk(2, "other") is None
    (tmp_path / "chunks/000002.safetensors").rename(tmp_path / "chunks/000001.safetensors")
    assert folder.read_chunk(1, "run") is None


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fails(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunFolderError, match="No space is left"):
        write_atomically(path, fails)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "No space is left"), (errno.EACCES, "cannot be written"), (errno.EIO, "Input/output")],
)
def test_failures_of_the_disk_are_one_sentence(number: int, says: str, tmp_path: Path) -> None:
    import os

    with pytest.raises(RunFolderError, match=says), one_sentence_for_disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_clearing_removes_a_runs_files_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_description({"attnlab_run": 1, "config": {}})
    folder.write_chunk(0, STATES, "run")
    write_atomically(folder.subfolder("tables") / "heads.parquet", b"x")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tables/notes.txt").write_text("mine")
    folder.clear()
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*"))
    assert left == ["notes.txt", "tables", "tables/notes.txt"]


def test_clearing_does_not_follow_links_out_of_the_folder(tmp_path: Path) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    run.mkdir()
    (elsewhere / "precious.parquet").write_text("mine")
    (run / "tables").symlink_to(elsewhere)
    folder = RunFolder(run)
    folder.write_description({"attnlab_run": 1, "config": {}})
    folder.clear()
    assert (elsewhere / "precious.parquet").exists()


@pytest.mark.parametrize("content", ['{"scripts": {}}', "[1]", "{", ""])
def test_a_folder_with_a_foreign_run_json_is_refused_and_kept(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError):
        RunFolder(tmp_path).clear()
    assert (tmp_path / "run.json").read_text() == content


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunFolderError, match=r"thesis\.tex"):
        RunFolder(tmp_path).read_description()


def test_a_file_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(RunFolderError, match="is a file"), RunFolder(tmp_path / "out").locked():
        pass


def test_a_second_process_is_refused_and_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    hold = (
        "import sys, pathlib; from attnlab.runs.store import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])).locked(): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match="Another process"), RunFolder(tmp_path).locked():
            pass
        other.kill()
        other.wait()
    with RunFolder(tmp_path).locked():
        pass


def test_a_name_too_long_for_the_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="File name too long"), RunFolder(tmp_path / ("x" * 300)).locked():
        pass


def test_a_description_nested_without_end_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(RunFolderError, match="cannot be read"):
        RunFolder(tmp_path).read_description()


def test_a_file_that_cannot_take_its_place_is_named_and_not_its_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(RunFolderError, match=r"/report\.html: ") as caught:
        write_atomically(tmp_path / "report.html", b"page")
    assert ".tmp" not in str(caught.value)
