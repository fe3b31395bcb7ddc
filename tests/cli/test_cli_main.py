"""The dispatcher: light help, versions, and one readable line with exit code 2 for whatever is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_harness import KVIK, Result

from kvik import __version__
from kvik.cli.main import COMMANDS
from kvik.settings import ENGINE, SAMPLING

Kvik = Callable[..., Result]


def test_help_is_light() -> None:
    begin = time.perf_counter()
    shown = subprocess.run([*KVIK, "--help"], capture_output=True, text=True, check=True).stdout
    print(f"kvik --help took {time.perf_counter() - begin:.3f} s")
    assert all(command in shown for command in COMMANDS)


def test_no_help_imports_torch() -> None:
    code = (
        "import contextlib, io, sys\nfrom kvik.cli.main import COMMANDS, main\n"
        "for args in (['--help'], ['--version'], *([c, '--help'] for c in COMMANDS)):\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main(args)\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_version_and_usage(kvik: Kvik) -> None:
    assert kvik("--version") == Result(0, f"kvik {__version__}\n", "")
    assert kvik("--help").code == 0
    assert kvik().code == 2


@pytest.mark.parametrize("command", ["generate", "chat", "batch", "bench", "info"])
def test_every_option_has_its_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from kvik.cli.main import main

    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    tables = [ENGINE] if command in ("bench", "info") else [ENGINE, SAMPLING]
    flags = [option.flag for table in tables for option in table.options.values() if option.name != "model"]  # type: ignore[attr-defined]
    assert [flag for flag in flags if flag not in shown] == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generat", "demo"], r"no command 'generat' (did you mean 'generate'?)"),
        (["--verbose", "generate"], "no command '--verbose'"),
        (["generate", "m", "x", "--temprature", "1"], "'--temprature' (did you mean '--temperature'?)"),
        (["generate", "m", "x", "--max-num-seqs"], "--max-num-seqs: expected one argument"),
        (["generate", "m", "x", "--max-num-seqs", "many"], "--max-num-seqs: 'many' is not an integer"),
        (["generate", "m", "x", "--temperature", "7"], "must be a number in [0, 2], got 7.0 (from --temperature)"),
        (["generate", "m", "x", "--dtype", "int4"], "dtype must be one of"),
        (["generate", "m", "x", "--logit-bias", "7"], "--logit-bias: '7' is not ID=BIAS"),
        (["generate", "m", "x", "--config", "absent.yaml"], "cannot read the config file absent.yaml"),
        (["generate", "m"], "no prompt was given"),
        (["generate"], "required: MODEL"),
        (["generate", "m", "--file", "absent.txt"], "cannot read absent.txt"),
        (["bench", "sideways", "m"], "invalid choice: 'sideways'"),
        (["bench", "throughput", "m", "--workload", "ragged"], "did you mean 'ragged256'?"),
        (["batch", "in.jsonl"], "give [MODEL] IN OUT"),
        (["batch", "m", "absent.jsonl", "out.jsonl"], "there is no file absent.jsonl"),
        (["chat", "m", "--n", "2"], "n must be 1 in a chat"),
    ],
)
def test_wrong_command_lines(kvik: Kvik, argv: list[str], message: str) -> None:
    result = kvik(*argv)
    assert result.code == 2 and result.out == ""
    assert message in result.err and result.err.count("\n") == 1


def _copy(model: str, target: Path) -> Path:
    return Path(shutil.copytree(model, target))


def test_models_that_cannot_be_used(kvik: Kvik, model: str, tmp_path: Path) -> None:
    def fails(folder: object, *texts: str) -> None:
        result = kvik("generate", folder, "x")
        assert result.code == 2 and result.out == "" and "Traceback" not in result.err
        assert all(text in result.err for text in texts), result.err

    fails(f"{model}x", "no folder", "did you mean 'tiny'?")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "no config.json")
    fails(Path(model) / "config.json", "is a file")
    cut = _copy(model, tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    fails(cut, "truncated or corrupt")
    other = _copy(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    fails(other, "MambaForCausalLM", "LlamaForCausalLM")
    (other / "config.json").write_text("{")
    fails(other, "not valid JSON")


def test_requests_that_cannot_run(kvik: Kvik, model: str) -> None:
    result = kvik("generate", model, "")
    assert result.code == 2 and "prompt is empty" in result.err
    result = kvik("generate", model, "x " * 600)
    assert result.code == 2 and "512" in result.err and "max_model_len" in result.err
    result = kvik("generate", model, "fine", "x " * 600)
    assert result.code == 2 and "prompt 2: " in result.err
    result = kvik("generate", model, "x", "--max-tokens", 600)
    assert result.code == 2 and "max_tokens" in result.err


def test_debug_shows_the_traceback(kvik: Kvik) -> None:
    for argv in (["--debug", "generate", "/absent", "x"], ["generate", "/absent", "x", "--debug"]):
        result = kvik(*argv)
        assert result.code == 2 and "Traceback" in result.err and "no folder /absent" in result.err


def test_print_config_shows_origins(kvik: Kvik, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVIK_MAX_NUM_SEQS", "3")
    for argv in (
        ["generate", model],
        ["chat", model],
        ["batch", model, "a", "b"],
        ["info", model],
        ["bench", "latency", model],
    ):
        result = kvik(*argv, "--print-config", "--threads", "2")
        rows = {line.split()[0]: line.split()[1:] for line in result.out.splitlines() if line.startswith("  ")}
        assert result.code == 0
        assert rows["model"][0] == model and rows["threads"] == ["2", "--threads"]
        assert rows["max_num_seqs"] == ["3", "KVIK_MAX_NUM_SEQS"]
        assert rows["dtype"] == ["auto", "default"]
        assert ("temperature" in rows) == (argv[0] in ("generate", "chat", "batch"))


@pytest.mark.parametrize(
    "argv", [["info"], ["generate", "demo", "hi"], ["quantize", "demo", "out"]], ids=lambda a: a[0]
)
def test_ctrl_c_while_torch_is_imported(argv: list[str], tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from kvik.cli.main import main
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy._core.shape_base":  # torch imports it from C++, forgets what is raised, and goes on
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
sys.exit(main({[*argv, *(["--quantization", "int8"] if argv[0] == "quantize" else [])]}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "\n")
    assert list(tmp_path.iterdir()) == []
