"""Bytes: what the host has free, what a phase takes. python -m pytest tests/test_memory.py"""

import resource
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.training import CPU

from lowmem.training import dry_run, memory
from lowmem.training.errors import UserError


@pytest.mark.parametrize("own", ["", "0::/\n", "1:cpu:/elsewhere\n0::/user/job\n"])
def test_a_container_or_a_job_may_have_less_memory_than_its_host(own, tmp_path, monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CONTROL_GROUP", tmp_path / "own")
    (tmp_path / "own").write_text(own)
    assert memory.free_host_memory() == 1000
    for folder in [tmp_path, tmp_path / "user"][: 1 + ("user" in own)]:
        folder.mkdir(exist_ok=True)
        (folder / "memory.current").write_text("500\n")
        (folder / "memory.stat").write_text("anon 300\ninactive_file 50\nactive_file 100\n")
        for limit, free in [("2000", 1000), ("700", 350), ("max", 1000)]:
            (folder / "memory.max").write_text(f"{limit}\n")
            assert memory.free_host_memory() == free


def test_host_memory_that_is_not_free_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_host_memory", lambda: 3 * memory.GIB)
    memory.require_host_memory(3 * memory.GIB, "the model")
    with pytest.raises(memory.UserError, match=r"the model takes 3\.0 GiB of host memory, and 3\.0 are free: close"):
        memory.require_host_memory(3 * memory.GIB + 1, "the model")


def test_each_phase_has_its_own_peaks(monkeypatch):
    """On a CPU that of the process so far, which never falls."""
    resident = SimpleNamespace(ru_maxrss=2**20)
    monkeypatch.setattr(resource, "getrusage", lambda _: resident)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    taken = memory.Memory(CPU)
    resident.ru_maxrss += 2**19
    taken.start("eval")
    taken.start("train")
    resident.ru_maxrss += 2**21
    assert taken.sample() == 3.5
    taken.start("eval")
    assert {phase: peak.pop("device") for phase, peak in taken.peaks.items()} == {
        "load": 1.5,
        "eval": 1.5,
        "train": 3.5,
    }
    assert all(peak == {"allocated": None, "reserved": None} for peak in taken.peaks.values())
    monkeypatch.setattr(memory.sys, "platform", "darwin")  # where it is bytes
    assert memory.Memory(CPU).sample() == resident.ru_maxrss / 2**30


@pytest.mark.gpu
def test_the_peak_of_a_gpu_holds_what_was_given_back():
    """2 GiB that came and went, of which mem_get_info knows nothing any more."""
    taken = memory.Memory(torch.device("cuda"))
    taken.start("train")
    before = taken.sample()
    large = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    del large
    torch.cuda.empty_cache()
    assert taken.sample() >= before + 1.9
    assert taken.peaks["train"]["allocated"] >= 2
    taken.start("eval")
    assert taken.sample() < before + 1


@pytest.mark.parametrize("peak", [3, 5])
def test_a_dry_run_that_does_not_fit_says_so(peak, monkeypatch, capsys):
    """Of a card of 4 GiB."""
    monkeypatch.setattr(dry_run, "predicted_peak", lambda *_: peak * memory.GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (memory.GIB, 4 * memory.GIB))
    needed = pytest.raises(
        UserError, match="5.00 GiB of GPU memory would be needed, and there are 4.00: take a smaller"
    )
    with needed if peak > 4 else nullcontext():
        dry_run.say_peak(None, None, torch.device("cuda"), None, None)
    assert f"predicted peak {peak}.00 GiB of 4.00" in capsys.readouterr().out
