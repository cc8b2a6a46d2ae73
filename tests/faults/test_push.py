"""What `--push-to-hub` sends, received by a hub on this machine: no path of it, no file that was not made for a hub."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ultralowbit.checkpoint.files import INDEX
from ultralowbit.hub import push

REPO = "org/tiny"


class Hub(ThreadingHTTPServer):
    """A hub that takes one model; `received` is what was committed to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: dict[str, bytes] = {}
        self.summaries: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Nothing: the test's output stays readable."""

    def _answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            there = [{"type": "file", "path": name, "oid": "0", "size": 1} for name in self.server.received]
            return self._answer(there)
        self._answer({"type": "user", "name": "org", "id": REPO, "sha": "0" * 40, "siblings": [], "auth": {}})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_POST(self) -> None:
        body = self._body()
        if "/preupload/" in self.path:
            names = [entry["path"] for entry in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.server.received[line["value"]["path"]]
                else:
                    self.server.summaries.append(json.dumps(line["value"]))
            self._answer({"commitUrl": f"{self.server.address}/{REPO}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._answer({"url": f"{self.server.address}/{REPO}", "errors": [], "warnings": []})


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_nothing_of_this_machine_is_uploaded(source, text, tmp_path, hub):
    model = tmp_path / "my secret folder" / "tiny"
    model.parent.mkdir()
    os.symlink(source, model)
    home = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret", "HF_ENDPOINT": hub.address}
    rest = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    arguments = [
        "compress", str(model), "--recipe", "gptq-4bit", "--calib", text, "--samples", "4", "--length", "16", "--eval",
        text, "--context", "16", "--max-tokens", "64", "--out", str(tmp_path / "deep" / "packed"), "-q",
    ]  # fmt: skip
    command = [sys.executable, "-m", "ultralowbit", *arguments]
    out = tmp_path / "deep" / "packed"
    first = subprocess.run(command, env={**os.environ, **home, **rest}, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    (out / "eval.json").write_text(f'{{"source": "{text}"}}')
    (out / ".env").write_text("TOKEN=secret")
    pushed = subprocess.run(
        [*command, "--push-to-hub", REPO], env={**os.environ, **home, **rest}, capture_output=True, text=True
    )
    assert pushed.returncode == 0, pushed.stderr
    written = json.loads((out / "manifest.json").read_text())["files"]
    assert hub.received.keys() == {*written, "manifest.json", "report.json", "report.md", "README.md"}
    secrets = [str(tmp_path), str(source.parent), str(Path(text).parent), str(Path.cwd()), "hf_secret", "my secret"]
    for name, content in hub.received.items():
        assert content == (out / name).read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], name
    assert not [secret for secret in secrets for summary in hub.summaries if secret in summary]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["model.safetensors"], ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX], ["model.safetensors"]),
        (["model-00003-of-00003.safetensors", INDEX], ["model-00001-of-00002.safetensors", INDEX]),
    ],
)
def test_weights_of_before_go_with_the_commit(tmp_path, hub, monkeypatch, before, after):
    """Those of the checkpoint that was there; what else lies there is not ours."""
    for name, value in {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub.received |= dict.fromkeys([*before, "notes.md", "adapter/adapter_model.safetensors"], b"old")
    for name in ("config.json", *after):
        (tmp_path / name).write_bytes(b"new")
    push(tmp_path, REPO)
    assert hub.received == {
        **dict.fromkeys(["config.json", *after], b"new"),
        **dict.fromkeys(["notes.md", "adapter/adapter_model.safetensors"], b"old"),
    }
    assert len(hub.summaries) == 1
