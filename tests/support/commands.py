"""The scripts as commands, each in a process of its own, without waiting 6 s for the imports each time.

A server process imports what the scripts import, and forks for each command. What then runs is the script itself, as
`__main__`, with its arguments, exit code and signals. Started by the fixture `commands` in conftest.py.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


def after_each_step(code):
    """Code for `first`: `code`, one line, runs after each training step; it sees torch, the `run` and the `step`."""
    return (
        "import torch\n"
        "from lowmem.training.run import Run\n"
        "plain = Run.after_step\n"
        "def after_step(run, *args):\n"
        "    plain(run, *args)\n"
        "    step = run.progress['step']\n"
        f"    {code}\n"
        "Run.after_step = after_step"
    )


class Commands:
    """The server's side in the tests' process."""

    def __init__(self, folder, gpu=False):
        self.folder, self.count = Path(folder), 0
        # the server itself must not start CUDA, which does not survive a fork: NVML can say whether there is a GPU
        where = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
        environment = os.environ | where | {"HF_HUB_OFFLINE": "1"}
        environment.pop("TRITON_INTERPRET", None)
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, script, *argv, first="", env=None):
        """Start `script argv` and return it as a `Command`. first: Python code that runs before the script does; env:
        what is added to the environment.
        """
        self.count += 1
        streams = [str(self.folder / f"{self.count}.{stream}") for stream in ("out", "err")]
        for stream in streams:
            Path(stream).touch()
        argv = [str(a) for a in argv]
        request = {"script": script, "argv": argv, "streams": streams, "first": first, "env": env or {}}
        return Command(self, self.ask(**request), *map(Path, streams))

    def run(self, script, *argv, first=""):
        """(exit code, stdout, stderr); minus the signal's number where one ended the process."""
        return self.start(script, *argv, first=first).wait()

    def start_ranks(self, count, script, *argv, first=""):
        """Start `script argv` as `count` ranks, with what torchrun puts into the environment of each."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.start(script, *argv, first=first, env=common | {"RANK": rank, "LOCAL_RANK": rank})
            for rank in range(count)
        ]

    def run_ranks(self, count, script, *argv, first=""):
        """[(exit code, stdout, stderr)] of each rank."""
        return [command.wait() for command in self.start_ranks(count, script, *argv, first=first)]

    def close(self):
        self.server.stdin.close()
        self.server.wait()


class Command:
    def __init__(self, commands, pid, out, err):
        self.commands, self.pid, self.out, self.err = commands, pid, out, err

    def running(self):
        """Whether the process is still there and no zombie."""
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    def send(self, number):
        os.kill(self.pid, number)

    def wait(self):
        return self.commands.ask(wait=self.pid), self.out.read_text(), self.err.read_text()


def serve():
    import runpy

    sys.path.insert(0, str(ROOT))
    import datasets  # noqa: F401
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import finetune_lowmem  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a suite that nohup or a background job runs ignores both
    gc.freeze()  # a collection would copy all of these modules' pages
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif not (answer := os.fork()):
            break
        print(json.dumps(answer), flush=True)
    else:
        os._exit(0)
    for number, path in enumerate(request["streams"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update({name: str(value) for name, value in request["env"].items()})
    sys.argv = [f"{request['script']}.py", *request["argv"]]
    code = 1
    try:
        exec(request["first"], {})
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError):
                stream.flush()
        os._exit(code)  # the interpreter's own end takes a second, for all that was imported


if __name__ == "__main__":
    serve()
