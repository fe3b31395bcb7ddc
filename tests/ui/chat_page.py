"""What a person does on the chat page."""

from __future__ import annotations

from typing import Any

__all__ = ["ANSWER", "STATS", "ask", "done", "greedy_chat", "set_parameter", "slow_down"]

ANSWER = "article.assistant"
STATS = f"{ANSWER} .stats"


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def done(page: Any) -> None:
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_selector(f"{ANSWER}:last-of-type .stats:has-text('prompt tokens')")


def set_parameter(page: Any, name: str, value: str) -> None:
    if page.locator("#settings").is_hidden():
        page.click("#show-settings")
    page.fill(f"#params [name={name}]", value)


def greedy_chat(chromium: Any, url: str) -> Any:
    """A page on which no answer ends early by chance."""
    page = chromium()
    page.goto(url)
    set_parameter(page, "temperature", "0")
    return page


def slow_down(page: Any) -> None:
    """Let answers come slowly, a few events at a time: the demo model could be done before the next click."""
    page.evaluate("""() => {
        const real = fetch;
        window.fetch = async (path, options) => {
            const answer = await real(path, options);
            if (!path.includes("chat")) return answer;
            const slow = new TransformStream({
                async transform(part, out) {
                    for (let at = 0; at < part.length; at += 1000) {
                        await new Promise((go) => setTimeout(go, 200));
                        out.enqueue(part.slice(at, at + 1000));
                    }
                },
            });
            return new Response(answer.body.pipeThrough(slow), { headers: answer.headers });
        };
    }""")
