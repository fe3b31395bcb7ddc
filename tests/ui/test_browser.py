"""The pages in a headless Chromium, against the demo model. Skipped where chromium or playwright is missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from chat_page import ANSWER, STATS, ask, done, greedy_chat, set_parameter, slow_down
from ui_server import serve

pytestmark = pytest.mark.slow


def test_a_chat_streams_and_outlives_a_reload(chromium: Any, url: str) -> None:
    page = greedy_chat(chromium, url)
    set_parameter(page, "max_tokens", "60")
    ask(page, "Tell me a story.")
    done(page)
    text = page.inner_text(f"{ANSWER} .body")
    assert len(text) > 40
    assert re.search(r"\d+ prompt tokens.* · 60 tokens · .*first after \d", page.inner_text(STATS))
    page.reload()
    assert page.inner_text(f"{ANSWER} .body") == text
    assert page.input_value("#params [name=max_tokens]") == "60"
    page.click("#new")
    assert page.locator("article").count() == 0
    page.click("#conversations .open")
    assert page.inner_text(f"{ANSWER} .body") == text
    assert page.complaints == []


def test_two_tabs_keep_both_conversations(chromium: Any, url: str) -> None:
    one = greedy_chat(chromium, url)
    set_parameter(one, "max_tokens", "5")
    other = one.context.new_page()
    other.goto(url)
    for page, text in ((one, "From the first tab."), (other, "From the second tab."), (one, "Once more.")):
        ask(page, text)
        done(page)
    other.reload()
    titles = other.locator("#conversations .open").all_inner_texts()
    assert sorted(titles) == ["From the first tab.", "From the second tab."]
    other.click("#conversations .open:has-text('first tab')")
    assert other.locator("article.user").count() == 2


@pytest.mark.parametrize("pause_ms", [0, 150])
def test_a_speed_is_shown_where_it_can_be_told(chromium: Any, url: str, pause_ms: int) -> None:
    page = chromium()
    page.goto(url)
    page.evaluate(
        """(pause) => {  // an engine of a known speed
            const event = (data) => new TextEncoder().encode(`data: ${data}\\n\\n`);
            window.fetch = async () => new Response(new ReadableStream({
                async start(out) {
                    for (let i = 0; i < 5; i++) {
                        if (i && pause) await new Promise((go) => setTimeout(go, pause));
                        out.enqueue(event('{"choices": [{"delta": {"content": "word "}}]}'));
                    }
                    out.enqueue(event('{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}'));
                    out.enqueue(event("[DONE]"));
                    out.close();
                },
            }));
        }""",
        pause_ms,
    )
    ask(page, "How fast?")
    done(page)
    stats = page.inner_text(STATS)
    assert "3 prompt tokens · 5 tokens · " in stats
    if pause_ms:
        assert re.search(r" [1-7] tokens/s", stats)  # four pauses of 150 ms or a little more
    else:
        assert "tokens/s" not in stats


def test_stop_keeps_what_came(chromium: Any, url: str) -> None:
    page = greedy_chat(chromium, url)
    slow_down(page)
    ask(page, "Tell me a long story.")
    page.wait_for_selector(f"{ANSWER} .body p")
    page.click("#stop")
    page.wait_for_selector(f"{STATS}:has-text('stopped by you')")
    text = page.inner_text(f"{ANSWER} .body")
    page.wait_for_timeout(800)
    assert text and page.inner_text(f"{ANSWER} .body") == text
    assert page.is_visible("#send")
    page.reload()
    assert page.inner_text(f"{ANSWER} .body") == text


def test_edit_and_regenerate(chromium: Any, url: str) -> None:
    page = greedy_chat(chromium, url)
    set_parameter(page, "max_tokens", "20")
    for text in ("First question.", "Second question."):
        ask(page, text)
        done(page)
    assert page.locator("article").count() == 4
    page.locator("article.user >> text=Edit").first.click()
    page.fill(".edit textarea", "Another question.")
    page.keyboard.press("Enter")
    done(page)
    assert page.locator("article").count() == 2
    assert page.inner_text("article.user .body") == "Another question."
    set_parameter(page, "max_tokens", "33")
    page.click(f"{ANSWER} >> text=Regenerate")
    page.wait_for_selector(f"{STATS}:has-text('33 tokens')")
    assert page.locator("article").count() == 2


def test_errors_are_told(chromium: Any, url: str) -> None:
    page = chromium()
    page.goto(url)
    set_parameter(page, "max_tokens", "5000")
    ask(page, "Too much.")
    page.wait_for_selector(f"{ANSWER} [role=alert]:has-text('5000')")
    busy = {"status": 429, "headers": {"retry-after": "7"}, "json": {"error": {"message": "the queue is full"}}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**busy))
    page.click(f"{ANSWER} button:has-text('Try again')")
    page.wait_for_selector(f"{ANSWER} [role=alert]:has-text('Try again in 7 s')")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.click(f"{ANSWER} button:has-text('Try again')")
    page.wait_for_selector(f"{ANSWER} [role=alert]:has-text('cannot be reached')")


def test_a_conversation_that_outgrew_the_context_goes_on(chromium: Any, url: str) -> None:
    page = greedy_chat(chromium, url)
    set_parameter(page, "max_tokens", "5")
    sent: list[list[str]] = []

    def note_questions(request: Any) -> None:
        if request.method == "POST":
            sent.append([one["content"] for one in request.post_data_json["messages"] if one["role"] == "user"])

    page.on("request", note_questions)
    note = page.locator("#log > .cut:has-text('no longer sent')")
    long = "Once upon a time, there was a little girl. " * 55
    for text in ("Hello.", long):
        ask(page, text)
        done(page)
    assert note.count() == 0
    ask(page, long + "The end.")
    alert = page.locator(f"{ANSWER} [role=alert]")
    alert.wait_for()
    assert "no longer fits into the model's context" in alert.inner_text()
    page.click("text=Send without the oldest messages")
    done(page)
    assert sent[-1] == [long + "The end."]
    for _ in range(2):  # also after a reload
        assert note.count() == 1 and alert.count() == 0
        assert page.locator("#log > *").evaluate_all("all => all.findIndex((one) => one.matches('.cut'))") == 4
        page.reload()
    ask(page, "Go on.")
    done(page)
    assert sent[-1] == [long + "The end.", "Go on."]

    ask(page, long)
    page.click("text=Ask in a new chat")
    done(page)
    assert sent[-1] == [long.strip()]
    assert note.count() == 0 and page.locator("article").count() == 2
    assert page.locator("#conversations .open").count() == 2

    page.click("#conversations .open:has-text('Hello')")
    assert note.count() == 1
    page.locator(f"{ANSWER} >> text=Regenerate").first.click()
    done(page)
    assert sent[-1] == ["Hello."] and note.count() == 0
    assert page.complaints == []


def test_no_shorter_conversation_is_offered_where_it_cannot_help(chromium: Any, url: str) -> None:
    page = chromium()
    page.goto(url)
    ask(page, "Once upon a time, there was a little girl. " * 200)
    page.wait_for_selector(f"{ANSWER} [role=alert]:has-text('max_model_len')")
    assert page.locator(f"{ANSWER} button").all_inner_texts() == ["Try again"]
    page.click("#new")
    set_parameter(page, "max_tokens", "5")
    ask(page, "Hello.")
    done(page)
    set_parameter(page, "max_tokens", "5000")
    ask(page, "Go on.")
    page.wait_for_selector(f"{ANSWER} [role=alert]:has-text('5000')")
    assert page.locator(f"{ANSWER}:last-of-type button").all_inner_texts() == ["Try again"]


def test_markdown_makes_no_html(chromium: Any, url: str) -> None:
    page = chromium()
    page.goto(url)
    text = (
        "# A\n<img src=x onerror=alert(1)> **b** [ok](https://example.org/a) [no](javascript:alert(1))\n\n"
        "- one\n  1. two\n\n```html\n<b>\n```\n1. three"
    )
    html = page.evaluate(
        """async (text) => {
            const { render } = await import("/ui/markdown.js");
            const node = document.createElement("div");
            for (let i = 0; i <= text.length; i++) render(node, text.slice(0, i));
            return node.innerHTML;
        }""",
        text,
    )
    assert html == (
        "<h3>A</h3><p>&lt;img src=x onerror=alert(1)&gt; <strong>b</strong> "
        '<a href="https://example.org/a" rel="noopener noreferrer" target="_blank">ok</a> [no](javascript:alert(1))</p>'
        '<ul><li>one<ol start="1"><li>two</li></ol></li></ul>'
        '<div class="code"><div class="code-head"><span>html</span><button type="button" class="quiet">Copy</button>'
        '</div><pre tabindex="0"><code>&lt;b&gt;</code></pre></div><ol start="1"><li>three</li></ol>'
    )


RENDER = """async (text) => {
    const { render } = await import("/ui/markdown.js");
    const node = document.createElement("div");
    document.getElementById("log").replaceChildren(node);
    node.className = "body";
    for (let end = 0; end < text.length; end += 7) render(node, text.slice(0, end));  // as it comes
    render(node, text);
    return node.%s;
}"""


def test_markdown_shows_tables_lines_and_links(chromium: Any, url: str) -> None:
    page = chromium()
    page.goto(url)
    table = "Look:\n| A | b |\n|:--|--:|\n| `x` | 1 |\n| p\\|q |\n\nx | y\n--- | ---\n1 | 2 | 3\nEnd"
    assert page.evaluate(RENDER % "innerHTML", table).replace(' style="text-align: start;"', "") == (
        '<p>Look:</p><div class="table" tabindex="0"><table><thead><tr><th>A</th><th style="text-align: end;">b</th>'
        '</tr></thead><tbody><tr><td><code>x</code></td><td style="text-align: end;">1</td></tr><tr><td>p|q</td>'
        '<td style="text-align: end;"></td></tr></tbody></table></div><div class="table" tabindex="0"><table><thead>'
        "<tr><th>x</th><th>y</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table></div><p>End</p>"
    )
    for text in ("a | b\nc", "a | b\n---", "a | b\n|---|", "- a\n  | b"):
        assert "<table>" not in page.evaluate(RENDER % "innerHTML", text)
    assert page.evaluate(RENDER % "innerText", "Roses are red\nViolets are blue") == "Roses are red\nViolets are blue"
    code = "1. Run\n   ```python\n   def f():\n       pass\n   ```\n2. Done"
    assert "<code>def f():\n    pass</code>" in page.evaluate(RENDER % "innerHTML", code)
    code = "- Run\n    ```\n    a\n\n\n    b\n    ```"
    assert "<code>a\n\n\nb</code>" in page.evaluate(RENDER % "innerHTML", code)
    for text in ("[a](https://x.org/F_(b))", '[a](https://x.org/F_(b) "title")', "(see https://x.org/F_(b))."):
        assert 'href="https://x.org/F_(b)"' in page.evaluate(RENDER % "innerHTML", text)
    right = page.evaluate(RENDER % "firstChild.getBoundingClientRect().right", "مرحبا")
    text_right = page.evaluate("() => { const r = document.createRange(); r.selectNode(document.querySelector('#log p')"
                               ".firstChild); return r.getBoundingClientRect().right; }")  # fmt: skip
    assert right - text_right < 2  # a line that is read from right to left begins at the right
    assert page.evaluate(RENDER.replace("+= 7", "+= 9000") % "childNodes.length", "- a\n" + "\n" * 20_000 + "b") == 2


def test_a_key_is_asked_for(chromium: Any, tmp_path: Path) -> None:
    page = chromium()
    with serve(tmp_path / "log", "--api-key", "the-key") as locked:
        for path in ("/", "/inspector"):
            page.evaluate("() => { try { sessionStorage.clear(); } catch {} }")
            page.goto(locked + path)
            page.fill("#key input", "the-key")
            page.keyboard.press("Enter")
            page.wait_for_selector("#model:has-text('demo')" if path == "/" else "#state[data-state=live]")


@pytest.mark.parametrize("path", ["/", "/inspector"])
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_a_phone_needs_no_sideways_scrolling(chromium: Any, url: str, path: str, theme: str) -> None:
    page = chromium(width=390, theme=theme)
    page.goto(url + path)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    page.click("#theme")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") != theme
