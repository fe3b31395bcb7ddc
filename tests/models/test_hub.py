"""Names of models: local folders without any network, the bundled model, and a hub played by a local HTTP server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny

from kvik.errors import ModelLoadError
from kvik.models import hub
from kvik.models.hub import folder_digest, load_config, load_generation_config, resolve_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("hub") / "tiny-qwen", "qwen3")


# Local folders


def test_a_local_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(model)) == model
    monkeypatch.chdir(model.parent)
    assert resolve_model("tiny-qwen") == Path("tiny-qwen")
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve_model("~/tiny-qwen") == model
    assert load_config(model)["model_type"] == "qwen3"
    assert load_generation_config(model)["eos_token_id"] == 0


@pytest.mark.parametrize("whole", [2**25, 100], ids=["whole", "sampled"])
def test_a_digest_is_of_what_a_folder_holds(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    monkeypatch.setattr(hub, "_WHOLE", whole)
    monkeypatch.setattr(hub, "_SAMPLE", 64)
    copy = shutil.copytree(model, tmp_path / "copy")
    digest = folder_digest(model)
    assert folder_digest(copy) == digest
    (copy / "README.md").write_text("not of the model")
    assert folder_digest(copy) == digest
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    for at in (0, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        weights.write_bytes(changed)
        assert folder_digest(copy) != digest
    weights.write_bytes(data)
    assert folder_digest(copy) == digest
    (copy / "config.json").write_text("{}")
    assert folder_digest(copy) != digest


def test_a_local_folder_has_no_revisions(model: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tiny-qwen is local and has no revisions; leave revision='v1' out"):
        resolve_model(str(model), "v1")


def test_a_local_folder_needs_no_network_library(model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kvik.models.hub import load_config, resolve_model\n"
        "load_config(resolve_model(sys.argv[1])); print('huggingface_hub' in sys.modules, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_a_folder_of_a_bundled_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the bundled model if it holds a model, and not otherwise; names of nobody's home are no names."""
    monkeypatch.chdir(tmp_path)
    bundled = resolve_model("demo")
    (tmp_path / "demo").mkdir()
    assert resolve_model("demo") == bundled
    shutil.copy(model / "config.json", tmp_path / "demo")
    assert resolve_model("demo") == Path("demo")
    with pytest.raises(ModelLoadError, match="there is no folder ~nobody-of-this-name/x"):
        resolve_model("~nobody-of-this-name/x")


def test_wrong_folders(model: Path, tmp_path: Path) -> None:
    def fails(path: Path, message: str) -> None:
        with pytest.raises(ModelLoadError, match=message) as caught:
            resolve_model(str(path))
        assert "\n" not in str(caught.value)

    fails(model / "config.json", "is a file; give the folder")
    fails(model.with_name("tiny-qven"), r"there is no folder .*tiny-qven \(did you mean 'tiny-qwen'\?\)")
    fails(model.with_name("zzz"), "there is no folder .*zzz; .* has .*tiny-qwen")
    fails(tmp_path / "a" / "b", r"there is no folder .*b \(nor ")
    fails(model.parent, "has no config.json, .*did you mean .*tiny-qwen")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "has no config.json, .*it has no files at all")
    (tmp_path / "empty" / "notes.txt").write_text("")
    fails(tmp_path / "empty", "it has notes.txt")


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[]", "holds a list, not an object")])
def test_a_damaged_config(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=message):
        load_config(tmp_path)


def test_no_generation_config(tmp_path: Path) -> None:
    assert load_generation_config(tmp_path) == {}


# Names


@pytest.mark.parametrize("name", hub.BUNDLED_MODELS)
def test_the_bundled_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(ModelLoadError, match="not in this installation"):
        resolve_model(name)
    make_tiny(tmp_path / "assets" / name)
    assert resolve_model(name) == tmp_path / "assets" / name


def test_modelscope_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelLoadError, match=r"pip install 'kvik\[modelscope\]'"):
        resolve_model("modelscope:Qwen/Qwen3-0.6B")


def test_modelscope_downloads_with_its_library(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def snapshot_download(name: str, revision: str | None) -> str:
            if name != "Qwen/Tiny":
                raise ValueError("no such model")
            return str(model)

    monkeypatch.setitem(sys.modules, "modelscope", Library)
    assert resolve_model("modelscope:Qwen/Tiny") == model
    with pytest.raises(ModelLoadError, match="'Qwen/Other' from ModelScope failed: no such model"):
        resolve_model("modelscope:Qwen/Other")


def test_a_name_that_cannot_be_an_id() -> None:
    with pytest.raises(ModelLoadError, match="there is no folder a/b/c"):
        resolve_model("a/b/c")


# A hub on this machine


class FakeHub(BaseHTTPRequestHandler):
    """The part of the Hugging Face API that snapshot_download needs."""

    files: dict[str, dict[str, bytes]]
    served: list[str]
    protocol_version = "HTTP/1.1"
    sha = "a" * 40

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            return self.api("/".join(parts[2:4]), parts[4:])
        repo, name = "/".join(parts[:2]), "/".join(parts[4:])
        data = self.files[repo].get(name)
        if data is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.served.append(name)
        return self.answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.sha})

    def api(self, repo: str, rest: list[str]) -> None:
        if repo == "org/gated":
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if repo not in self.files:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if rest[1] not in ("main", self.sha):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        names = self.files[repo]
        if rest[0] == "tree":
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in names.items()
            ]
            return self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        info = {"id": repo, "sha": self.sha, "siblings": [{"rfilename": name} for name in names]}
        return self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def fake_hub(model: Path) -> Iterator[tuple[str, list[str]]]:
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    other = {
        "original/params.json": b"{}",
        "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
        "pytorch_model.bin": b"x",
        "README.md": b"#",
        "consolidated.safetensors": b"x",
    }
    old = {name: data for name, data in files.items() if name != "model.safetensors"}
    served: list[str] = []
    fields = {
        "files": {"org/tiny": {**files, **other}, "org/old": {**old, "pytorch_model.bin": b"x"}},
        "served": served,
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (FakeHub,), fields))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", served
    server.shutdown()
    server.server_close()


def resolve_in_process(cache: Path, names: list[str], **env: str) -> list[str]:
    """The results of resolve_model in a new process, since huggingface_hub reads the environment when imported."""
    code = (
        "import sys\nfrom kvik.errors import ModelLoadError\nfrom kvik.models.hub import resolve_model\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(resolve_model(*name.split('@')))\n"
        "    except ModelLoadError as error: print('error:', str(error).replace(chr(10), '|'))\n"
    )
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    result = subprocess.run(
        [sys.executable, "-c", code, *names],
        env={**clean, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.splitlines()


def test_downloads_what_is_needed_and_then_works_offline(fake_hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, served = fake_hub
    tiny, old = resolve_in_process(tmp_path, ["org/tiny", "org/old"], HF_ENDPOINT=endpoint)
    assert load_config(Path(tiny))["model_type"] == "qwen3"
    assert {p.name for p in Path(tiny).iterdir()} == {
        "additional_chat_templates", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert (Path(old) / "pytorch_model.bin").read_bytes() == b"x"
    assert "README.md" not in served
    (again,) = resolve_in_process(tmp_path, ["org/tiny"], HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert again == tiny


def test_what_to_do_when_it_cannot_be_had(fake_hub: tuple[str, list[str]], tmp_path: Path) -> None:
    names = ["org/nothing", "org/gated", "org/tiny@v9", "dmeo"]
    nothing, gated, revision, demo = resolve_in_process(tmp_path, names, HF_ENDPOINT=fake_hub[0])
    assert nothing.startswith("error: 'org/nothing' is neither a Hugging Face model nor a local folder")
    assert nothing.endswith("if it is private, set HF_TOKEN")
    assert gated.startswith("error: 'org/gated' is gated: accept its terms")
    assert revision == "error: model 'org/tiny' has no revision 'v9'"
    assert "did you mean 'demo'?" in demo


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_no_network(tmp_path: Path, env: dict[str, str]) -> None:
    (text,) = resolve_in_process(tmp_path, ["org/tiny"], **env)
    assert text.startswith("error: 'org/tiny' is not in the local cache and cannot be downloaded")
    assert "|" not in text
