"""/v1/embeddings against the hidden states of transformers, and the shapes that clients rely on."""

from __future__ import annotations

import base64
import struct

import httpx
import pytest
import torch
from openai import OpenAI
from server_harness import Served, serve

TEXTS = ["Once upon a time there was a small engine.", "the quick brown fox", "a"]
NEAR = {"atol": 1e-2, "rtol": 0.1} if torch.cuda.is_available() else {"atol": 1e-4, "rtol": 1e-3}  # bf16 and float32


def expected(model: str, ids: list[int], pooling: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        hidden = reference.model(torch.tensor([ids])).last_hidden_state[0]
    vector = hidden.mean(0) if pooling == "mean" else hidden[-1]
    return vector / vector.norm()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_those_of_transformers(http: httpx.Client, model: str, pooling: str) -> None:
    body = {"input": TEXTS, "pooling": pooling}
    first, second = (http.post("/v1/embeddings", json=body).json() for _ in range(2))
    assert [item["index"] for item in first["data"]] == [0, 1, 2]
    for text, item, again in zip(TEXTS, first["data"], second["data"], strict=True):
        ids = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        torch.testing.assert_close(torch.tensor(item["embedding"]), expected(model, ids, pooling), **NEAR)
        assert item["embedding"] == pytest.approx(again["embedding"], abs=NEAR["atol"] / 10)


def test_chunked_prompts(model: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    ids = [3 + i % 200 for i in range(300)]
    log = tmp_path_factory.mktemp("logs") / "chunked.log"
    with serve(model, log, "--max-num-batched-tokens", "64") as served, served.client() as http:
        for pooling in ("mean", "last"):
            answer = http.post("/v1/embeddings", json={"input": ids, "pooling": pooling}).json()
            assert answer["usage"]["prompt_tokens"] == 300
            torch.testing.assert_close(
                torch.tensor(answer["data"][0]["embedding"]), expected(model, ids, pooling), **NEAR
            )


def test_shapes(http: httpx.Client, served: Served) -> None:
    numbers = http.post("/v1/embeddings", json={"input": "x"}).json()["data"][0]["embedding"]
    packed = http.post("/v1/embeddings", json={"input": ["x"], "encoding_format": "base64"}).json()
    decoded = struct.unpack("<64f", base64.b64decode(packed["data"][0]["embedding"]))
    assert list(decoded) == pytest.approx(numbers, abs=1e-6)
    assert http.post("/v1/embeddings", json={"input": "x", "dimensions": 64}).status_code == 200
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        found = client.embeddings.create(model="tiny", input="x")
    assert found.data[0].embedding == pytest.approx(numbers, abs=1e-6)


def test_more_texts_than_prompts_of_a_request(http: httpx.Client) -> None:
    """LangChain sends 1000 at a time, and `max_n` is 64."""
    texts = [TEXTS[i % 3] for i in range(150)]
    found = http.post("/v1/embeddings", json={"input": texts}).json()
    three = http.post("/v1/embeddings", json={"input": TEXTS}).json()
    assert [item["index"] for item in found["data"]] == list(range(150))
    for i, item in enumerate(found["data"]):
        assert item["embedding"] == pytest.approx(three["data"][i % 3]["embedding"], abs=NEAR["atol"] / 10)
    assert found["usage"]["prompt_tokens"] == 50 * three["usage"]["prompt_tokens"]


def test_a_text_that_fills_the_context(http: httpx.Client, model: str) -> None:
    context = http.post("/tokenize", json={"prompt": "x"}).json()["max_model_len"]
    ids = [3 + i % 200 for i in range(context + 1)]
    answer = http.post("/v1/embeddings", json={"input": ids[:-1]}).json()
    found = torch.tensor(answer["data"][0]["embedding"])
    torch.testing.assert_close(found, expected(model, ids[:-1], "mean"), **NEAR)
    error = http.post("/v1/embeddings", json={"input": ids}).json()["error"]
    assert error["code"] == "context_length_exceeded" and str(context) in error["message"]


def test_embeddings_generate_nothing(http: httpx.Client, served: Served) -> None:
    name = 'vllm:generation_tokens_total{model_name="tiny"}'
    before = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
    assert http.post("/v1/embeddings", json={"input": ["a", "b"]}).status_code == 200
    assert [line for line in http.get("/metrics").text.splitlines() if line.startswith(name)] == before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"), ({"input": []}, "input"), ({"input": [""]}, "input"), ({"input": [[]]}, "input"),
        ({"input": "x", "pooling": "max"}, "pooling"), ({"input": "x", "dimensions": 7}, "dimensions"),
        ({"input": [400]}, "input"), ({"input": list(range(1, 380)) * 2}, "input"), ({"input": ["x"] * 2049}, "input"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
    ],
)  # fmt: skip
def test_refusals(http: httpx.Client, fields: dict[str, object], param: str) -> None:
    answer = http.post("/v1/embeddings", json=fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
