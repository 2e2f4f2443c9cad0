"""A Python that starts in no time: each run of it is forked from a server that has imported the frameworks.

`python("torch")` is a command to be used as `sys.executable` is: its arguments (`-m MODULE` or `-c CODE`),
environment, folder, streams, exit code and signals are those of a process of its own, and it ends as any
interpreter does. This package is imported anew in each. What a framework read from the environment when it
was imported stays as the server read it, and no `sitecustomize` runs: where that matters, `sys.executable`.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

Kind = Literal["torch", "job"]
_TORCH = ("torch", "torch.distributed", "torch.optim", "safetensors.torch", "yaml")
_JOB = (
    *_TORCH,
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "datasets",
    "matplotlib.pyplot",
    "peft",
    "rich.console",
    "sklearn.datasets",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.vit.modeling_vit",
    "typer",
)
_PRELOAD = {"torch": _TORCH, "job": _JOB}
_SUPERVISOR = "SHARDED_SPD_SUPERVISOR"

_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd(), sys.argv[0]]).encode()
socket.send_fds(link, [len(request).to_bytes(8, "big")], [0, 1, 2])
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: link.sendall(bytes([number])))
link.sendall(request)
answer = link.recv(8)
code = int(answer) if answer else 1
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def python(kind: Kind) -> str:
    """The command; its server is started at the first call and ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = folder / "python"
    command.write_text(_CLIENT.format(python=sys.executable, address=str(folder / "socket")))
    command.chmod(0o755)
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.warm", str(folder / "socket"), *_PRELOAD[kind]],
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    ) as server:
        assert server.stdout is not None
        if server.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the server of {command} ended with exit code {server.wait()}")
        server.stdout.close()
        server.returncode = 0  # nobody waits for it: the kernel ends it with this process
    return str(command)


def _serve(address: str) -> dict[str, Any]:
    """Forks a child per request; in a child, returns what it is to run."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(reader, selectors.EVENT_READ)
    links: dict[int, socket.socket] = {}  # by process
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                link = listener.accept()[0]
                size, streams, _, _ = socket.recv_fds(link, 8, 3)
                request = json.loads(_read(link, int.from_bytes(size, "big")))
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    for target, stream in enumerate(streams):
                        os.dup2(stream, target)
                        os.close(stream)
                    selector.close()
                    for other in (listener, link, *links.values()):
                        other.close()
                    return dict(zip(("arguments", "environment", "folder", "command"), request, strict=True))
                for stream in streams:
                    os.close(stream)
                links[pid] = link
                selector.register(link, selectors.EVENT_READ, pid)
            elif key.fileobj == reader:
                os.read(reader, 4096)
                _reap(links, selector)
            elif key.data in links:
                sent = links[key.data].recv(1)
                # Who asked for it is gone: so is what it started.
                _signal(key.data, sent[0] if sent else signal.SIGKILL)
                if not sent:
                    selector.unregister(links[key.data])


def _reap(links: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    while links:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        link = links.pop(pid)
        if link in [key.fileobj for key in selector.get_map().values()]:
            selector.unregister(link)
        try:
            link.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        except OSError:
            pass
        link.close()


def _signal(pid: int, number: int) -> None:
    if number == signal.SIGKILL:
        os.killpg(pid, number)
    else:
        os.kill(pid, number)


def _read(link: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        parts += link.recv(size - len(parts))
    return parts


def _main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    request = _serve(sys.argv[1])
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    if _SUPERVISOR in os.environ:
        os.environ[_SUPERVISOR] = str(os.getppid())  # the client follows the one that was named
    os.chdir(request["folder"])
    sys.executable = request["command"]
    sys.path[0] = os.getcwd()
    if "torch" in sys.modules and "OMP_NUM_THREADS" in os.environ:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    how, what, *arguments = request["arguments"]
    if how == "-m":
        sys.argv = [what, *arguments]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [how, *arguments]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    _main()
