"""What `deploy/` names exists: metrics and labels, files, extras, flags, mounted secrets. No container is built."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from server_harness import Served

from kvik.cli import bench_serve
from kvik.cli.main import main

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
METRIC = re.compile(r"((?:vllm|kvik):\w+)(?:\{([^}]*)\})?")
OF_PROMETHEUS = {"le"}


def _expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana" / "kvik.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return found + [item["definition"] for item in dashboard["templating"]["list"] if "definition" in item]


def _yaml(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def _dockerfile() -> list[list[str]]:
    """The instructions, each as its words."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line]


@pytest.fixture(scope="module")
def samples(served: Served) -> dict[str, set[str]]:
    """The names of the server's samples after a request, with their labels."""
    with served.client() as client:
        client.post("/v1/completions", json={"prompt": "Once upon a time", "max_tokens": 4, "ignore_eos": True})
        text = client.get("/metrics").text
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^([\w:]+)\{(.*)\} \S+$", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def test_every_metric_of_the_dashboard_exists(samples: dict[str, set[str]]) -> None:
    expressions = _expressions()
    used = {name for expression in expressions for name, _ in METRIC.findall(expression)}
    assert len(used) >= 15
    assert used <= set(samples), f"the server has no {sorted(used - set(samples))}"


def test_every_label_of_the_dashboard_exists(samples: dict[str, set[str]]) -> None:
    for expression in _expressions():
        (first, _), *_ = METRIC.findall(expression)
        labels = {label for _, inside in METRIC.findall(expression) for label in re.findall(r"(\w+)=~?", inside)}
        labels |= {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
        assert {label.strip() for label in labels} <= samples[first], expression


def test_the_dashboard_shows_every_number_of_the_server(samples: dict[str, set[str]]) -> None:
    shown = " ".join(_expressions())
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in samples if ":" in name}
    assert not [name for name in families if f"{name.removesuffix('_total')}" not in shown]


def test_prometheus_scrapes_the_server_of_the_composition() -> None:
    (job,) = _yaml("prometheus.yml")["scrape_configs"]
    compose = _yaml("compose.yaml")
    host, _, port = job["static_configs"][0]["targets"][0].partition(":")
    assert any(mapping.endswith(f":{port}") for mapping in compose["services"][host]["ports"])
    secret = job["authorization"]["credentials_file"].removeprefix("/run/secrets/")
    assert secret in compose["secrets"] and secret in compose["services"]["prometheus"]["secrets"]
    source = _yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in compose["services"]


def test_the_composition_mounts_what_exists() -> None:
    compose = _yaml("compose.yaml")
    provider = _yaml("grafana/provisioning/dashboards/kvik.yaml")["providers"][0]
    for service in compose["services"].values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"], mount
    assert any(provider["options"]["path"] in mount for mount in compose["services"]["grafana"]["volumes"])
    assert (DEPLOY / compose["services"]["kvik"]["build"]["context"] / "deploy/Dockerfile").exists()


def test_the_image_copies_and_installs_what_exists() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = [words.split()[:-1] for verb, words in _dockerfile() if verb == "COPY" and not words.startswith("--from")]
    assert {name for names in copied for name in names} == allowed
    assert all((ROOT / name).exists() for name in allowed)
    extras = re.findall(r"\.\[([\w,]+)\]", " ".join(words for verb, words in _dockerfile() if verb == "RUN"))
    assert extras and all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras[0].split(","))
    assert {"readme", "license-files"} <= set(re.findall(r"^([\w-]+) =", project, re.MULTILINE))


@pytest.mark.parametrize("source", ["Dockerfile", "compose.yaml"])
def test_the_commands_of_the_containers_are_accepted(
    source: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVIK_SERVER_API_KEY", "secret")  # as deploy/README.md does
    steps = dict(_dockerfile())
    assert json.loads(steps["ENTRYPOINT"]) == ["kvik"]
    command = json.loads(steps["CMD"])
    if source == "compose.yaml":
        command = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in _yaml(source)["services"]["kvik"]["command"]]
    assert main([*command, "--print-config"]) == 0
    assert re.search(r"^host +0\.0\.0\.0", capsys.readouterr().out, re.MULTILINE)


def test_the_readme_names_what_exists() -> None:
    readme = (DEPLOY / "README.md").read_text()
    files = re.findall(r"^\| `([^`]+)`", readme, re.MULTILINE)
    assert files and all((DEPLOY / name).exists() for name in files)
    (line,) = re.findall(r"^kvik bench serve (.*)$", readme, re.MULTILINE)
    assert bench_serve._parser().parse(shlex.split(line)).duration == 60
