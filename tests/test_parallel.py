"""The processes of torchrun: what each has, and how they end together. python -m pytest tests/test_parallel.py"""

import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.commands import ROOT, after_each_step
from support.runs import has_lines, last_line, lines, ranks_of, wait_until

from lowmem.training import checkpoint, command, parallel
from lowmem.training.errors import UserError


@pytest.mark.parametrize(("rows", "ranks"), [(8, 2), (7, 2), (5, 3), (4, 3), (2, 3), (0, 2), (8, 1)])
def test_each_rank_has_the_rows_that_torch_deals_it(rows, ranks, monkeypatch):
    """Of a sharded tensor; of a batch every n-th."""
    monkeypatch.setattr(parallel, "world_size", lambda: ranks)
    whole = torch.arange(rows)
    chunks = [chunk.tolist() for chunk in torch.chunk(whole, ranks)]
    for rank in range(ranks):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        assert whole[parallel.rows_of_rank(rows)].tolist() == (chunks[rank] if rank < len(chunks) else [])
    dealt = parallel.deal_to_ranks(whole.tolist())
    assert len(dealt) == ranks
    assert sorted(row for shard in dealt for row in shard) == whole.tolist()
    assert max(map(len, dealt)) == len(dealt[0]) <= min(map(len, dealt)) + 1


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes on this machine, which has 1 GPUs: --nproc-per-node 1$"):
        parallel.processes().__enter__()


def test_a_run_folder_that_machines_do_not_share_is_refused(tmp_path):
    checkpoint.wait_for_folder(tmp_path)
    with pytest.raises(UserError, match="a file system that all machines share"):
        checkpoint.wait_for_folder(tmp_path / "elsewhere", seconds=0.2)


# ---------------------------------------------------------------------------------------------------------------------
# How ranks end together


def goes_on_from(line, folder):
    """The step that the line says is saved, and that is."""
    saved = int(re.fullmatch(r".*the same command with --resume goes on from step (\d+)", line)[1])
    assert checkpoint.last(folder).name == f"step-{saved}"
    return saved


def test_a_signal_to_one_rank_ends_all_after_the_same_step(argv, commands, tmp_path):
    first = "import os, signal\n" + after_each_step(
        "step == 3 and os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGTERM)"
    )
    (code, _, err), other = commands.run_ranks(2, "finetune_base", *argv("r", "--epochs", 9), first=first)
    assert code == 128 + signal.SIGTERM
    assert other == (code, "", "")
    assert last_line(err).startswith("interrupted: ")
    assert 3 <= goes_on_from(last_line(err), tmp_path / "r") <= 5
    commands.run_ranks(2, "finetune_base", *argv("r", "--epochs", 1, "--resume"))
    assert [line["step"] for line in lines(tmp_path / "r" / "metrics.jsonl") if "lr" in line] == [*range(1, 16)]


def test_all_ranks_leave_a_finished_run_alone(argv, commands, tmp_path):
    """A process that ends without its group is torn down would abort now and then."""
    again = argv("r", "--epochs", 0)
    commands.run_ranks(2, "finetune_base", *again)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "r").rglob("*")}
    torn_down = "import torch.distributed as dist\nplain = dist.destroy_process_group\n"
    torn_down += "dist.destroy_process_group = lambda: (plain(), print('torn down'))"
    (code, said, _), other = commands.run_ranks(2, "finetune_base", *again, "--resume", first=torn_down)
    assert (code, other[0]) == (0, 0)
    assert f"{tmp_path / 'r'} is finished: its scores are in summary.json" in said
    assert "torn down" in said
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "r").rglob("*")} == before


@pytest.mark.slow
def test_a_signal_to_one_rank_while_it_loads_leaves_no_traceback(argv, commands):
    commands.run_ranks(2, "finetune_lowmem", *argv("r", "--max_steps", 2))
    first = "import os, signal\nfrom torch.distributed.checkpoint import HuggingFaceStorageReader as Reader\n"
    first += "plain = Reader.read_data\ndef read_data(*args):\n    if os.environ['RANK'] == '1':\n"
    first += "        os.kill(os.getpid(), signal.SIGINT)\n    return plain(*args)\nReader.read_data = read_data"
    (code, _, err), other = commands.run_ranks(
        2, "finetune_lowmem", *argv("r", "--max_steps", 4, "--resume"), first=first
    )
    assert code == 128 + signal.SIGINT
    assert other == (code, "", "")
    assert last_line(err) == "interrupted: the same command with --resume goes on from step 2"


def test_torchrun_s_signal_does_not_cut_the_last_line_short(monkeypatch, capsys):
    """It comes as soon as another process has ended, and this one has seen that too."""
    plain = command._last_line
    monkeypatch.setattr(command, "_last_line", lambda error: [plain(error), os.kill(os.getpid(), signal.SIGTERM)][0])

    def main():
        raise UserError("another has ended")

    with pytest.raises(SystemExit) as stopped:
        command.start(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "\nerror: another has ended\n"


# ---------------------------------------------------------------------------------------------------------------------
# The same under torchrun itself, which ends all processes when one fails, and reports which failed first


@pytest.fixture
def torchrun(argv):
    """torchrun(script, *flags, first="", looks_every=0.1) -> Popen of torchrun with two ranks, in a session of its own.

    looks_every: seconds after which torchrun looks at its processes again; 0.1 is its own default.
    """
    started = []

    def go(script, *flags, first="", looks_every=0.1):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{first}\nimport {script}\n"
        code += f"from lowmem.training import command\ncommand.start({script}.main)"
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
        start += ["--monitor-interval", looks_every, "--no-python"]
        start += [sys.executable, "-c", code, *argv("r", "--epochs", 10**6, *flags)]
        variables = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        variables.pop("TRITON_INTERPRET", None)
        started.append(
            subprocess.Popen(
                list(map(str, start)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables,
                start_new_session=True,
            )
        )  # fmt: skip
        return started[-1]

    yield go
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def ended(process, seconds=120):
    """(its own error line, torchrun's report of the first failure) of a job that must end within `seconds`."""
    _, err = process.communicate(timeout=seconds)
    assert process.returncode == 1
    said = [line for line in err.splitlines() if re.match("(error|interrupted): ", line)]
    assert len(said) == 1, err
    assert err.count("Traceback") == 1, err  # torchrun's own
    return said[0], err.partition("Root Cause")[2]


def after_a_signal(process, number, pid_of, folder):
    """`ended` of a job of which the process `pid_of(torchrun)` gets the signal in the middle."""
    running = SimpleNamespace(running=lambda: process.poll() is None)
    assert wait_until(has_lines(folder, 5), running, 120)
    os.kill(pid_of(process), number)
    return ended(process)


def second_rank(process):
    return ranks_of(process)[1]


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_it_goes_on(torchrun, argv, commands, tmp_path):
    process = torchrun("finetune_lowmem", "--save_every", 2)
    line, report = after_a_signal(process, signal.SIGKILL, second_rank, tmp_path / "r")
    assert line.startswith(("error: another process of this run has ended", "interrupted: "))
    assert re.search(r"rank +: 1 .*Signal 9 \(SIGKILL\)", report, re.S)
    saved = goes_on_from(line, tmp_path / "r")
    flags = ["--save_every", 2, "--epochs", saved, "--max_steps", saved + 1, "--resume"]
    assert commands.run("finetune_lowmem", *argv("r", *flags))[0] == 0
    assert [line["step"] for line in lines(tmp_path / "r" / "metrics.jsonl") if "lr" in line] == [*range(1, saved + 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "number", "pid_of"),
    [("finetune_base", signal.SIGTERM, second_rank), ("finetune_lowmem", signal.SIGINT, lambda process: process.pid)],
    ids=["one rank", "torchrun"],
)
def test_a_signal_to_one_rank_or_torchrun_saves_a_step(script, number, pid_of, torchrun, tmp_path):
    line, _ = after_a_signal(torchrun(script), number, pid_of, tmp_path / "r")
    assert line.startswith("interrupted: ")
    goes_on_from(line, tmp_path / "r")


@pytest.mark.slow
@pytest.mark.parametrize("looks_every", [0.1, 5])
def test_torchrun_reports_the_error_of_the_rank_that_failed(looks_every, torchrun):
    """Also where the other one has ended for want of it before torchrun looks."""
    fault = "from lowmem.training import errors, parallel\ndef fail():\n    raise errors.UserError('rank 1 fails')\n"
    fault += after_each_step("step == 3 and parallel.rank() == 1 and fail()")
    line, report = ended(torchrun("finetune_lowmem", "--save_every", 2, first=fault, looks_every=looks_every))
    assert line.startswith(("error: another process of this run has ended", "interrupted: "))  # of rank 0
    assert re.search(r"rank +: 1 ", report)
    assert "error: rank 1 fails; the same command with --resume goes on from step 2" in report


@pytest.mark.slow
def test_an_error_of_all_ranks_is_said_once(torchrun, tmp_path):
    (tmp_path / "r").mkdir()
    line, report = ended(torchrun("finetune_lowmem"))
    assert "exists: take another --run-name" in line
    assert line in report
