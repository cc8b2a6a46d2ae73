"""A program that has imported what a compression imports, and forks for every process that is asked of it.

Each line that it reads is one run as JSON: "arguments" of Python, "size", "changes" of the environment, and "out", a
file for all that its processes print. It answers with their exit codes. Ranks meet as those of `torchrun` do, but
nobody ends the others when one of them fails: they have to do so themselves.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401

from ultralowbit.cli import app, compress  # noqa: F401
from ultralowbit.pipeline import estimate, source, stream  # noqa: F401
from ultralowbit.report import run as measured  # noqa: F401
from ultralowbit.training import finetune  # noqa: F401


def execute(arguments: list[str]) -> int:
    """`python ARGUMENTS` in this process; its exit code."""
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def started(rank: int, port: int, wanted: dict[str, Any]) -> int:
    """The id of a process that runs what is wanted, as one of its ranks."""
    if pid := os.fork():
        return pid
    size = str(wanted["size"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | wanted["changes"]
    source.BATCH_TOKENS = int(os.environ.get("BATCH_TOKENS", source.BATCH_TOKENS))  # few tokens make several lanes
    out = os.open(wanted["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for printed in (1, 2):
        os.dup2(out, printed)
    code = execute(wanted["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what this process has from the first one is left to that one


def main() -> None:
    for line in sys.stdin:
        wanted = json.loads(line)
        Path(wanted["out"]).touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = [started(rank, port, wanted) for rank in range(wanted["size"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
