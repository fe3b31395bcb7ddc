"""LangChain's chat model and LiteLLM against a running server. Run by hand; nothing here is needed by CI.

    pip install langchain-openai litellm
    kvik serve demo --served-model-name demo
    python tests/clients/openai_clients.py http://127.0.0.1:8000

Each client that is installed must get answers; one that is not is named and skipped. lm-eval has `lm_eval_local.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

__all__ = ["main"]

MESSAGES = [("system", "You are brief."), ("human", "Tell me about a cat.")]


def langchain(url: str, model: str) -> str:
    """Invoke, stream and batch."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, max_tokens=24, temperature=0, max_retries=0)
    whole = chat.invoke(MESSAGES).content
    streamed = "".join(str(chunk.content) for chunk in chat.stream(MESSAGES))
    assert whole and streamed == whole, (whole, streamed)
    assert all(answer.content for answer in chat.batch([MESSAGES, MESSAGES]))
    return f"{whole!r}"


def litellm(url: str, model: str) -> str:
    """A completion, a stream and an error class."""
    import litellm as client

    options = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}
    messages = [{"role": "user", "content": "Hello"}]
    whole = client.completion(**options, messages=messages, max_tokens=16, temperature=0).choices[0].message.content
    stream = client.completion(**options, messages=messages, max_tokens=16, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole
    try:
        client.completion(**options, messages=messages, max_tokens=10**6)
    except client.BadRequestError as error:
        return f"{whole!r}; {type(error).__name__} for a context overflow"
    raise AssertionError("a context overflow was accepted")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", default="demo")
    args = parser.parse_args()
    for module, check in {"langchain_openai": langchain, "litellm": litellm}.items():
        found = importlib.util.find_spec(module) is not None
        print(f"{module}: {check(args.url, args.model) if found else 'not installed, skipped'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
