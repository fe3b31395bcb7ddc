"""Conversations of the chat page that something comes between: other tabs, a full storage, a reload, a wrong number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_page import ANSWER, STATS, ask, done, greedy_chat, set_parameter, slow_down
from ui_server import serve

pytestmark = pytest.mark.slow

QUESTIONS = "article.user .body"
LONG = "Tell me a long story."


def sent_roles(page: Any) -> list[list[str]]:
    """Fills with the roles of every request that the page sends."""
    sent: list[list[str]] = []
    page.on(
        "request", lambda it: it.method == "POST" and sent.append([m["role"] for m in it.post_data_json["messages"]])
    )
    return sent


def test_two_tabs_go_on_with_one_conversation(chromium: Any, url: str) -> None:
    one = greedy_chat(chromium, url)
    set_parameter(one, "max_tokens", "5")
    ask(one, "First.")
    done(one)
    other = one.context.new_page()
    other.goto(url)
    ask(other, "Second.")
    done(other)
    one.wait_for_selector(f"{QUESTIONS}:text-is('Second.')")
    done(one)
    ask(one, "Third.")
    done(one)
    for page in (one, other):
        page.reload()
        assert page.locator(QUESTIONS).all_inner_texts() == ["First.", "Second.", "Third."]


def test_a_tab_that_is_answering_keeps_its_conversation(chromium: Any, url: str) -> None:
    one = greedy_chat(chromium, url)
    slow_down(one)
    ask(one, LONG)
    one.wait_for_selector(f"{ANSWER} .body p")
    other = one.context.new_page()
    other.goto(url)
    assert "not complete" in other.inner_text(STATS)
    set_parameter(other, "max_tokens", "5")
    ask(other, "Meanwhile.")
    done(other)
    one.click("#stop")
    one.wait_for_selector(f"{STATS}:has-text('stopped by you')")
    assert one.locator("#conversations .open").all_inner_texts() == [LONG, LONG]
    assert one.locator(QUESTIONS).all_inner_texts() == [LONG]
    other.reload()
    other.locator("#conversations .open").last.click()
    assert other.locator(QUESTIONS).all_inner_texts() == [LONG, "Meanwhile."]


def test_a_full_storage_is_shown(chromium: Any, url: str) -> None:
    page = greedy_chat(chromium, url)
    set_parameter(page, "max_tokens", "5")
    page.evaluate("() => { window.real = Storage.prototype.setItem; Storage.prototype.setItem = () => { throw 0; }; }")
    ask(page, "Is this kept?")
    done(page)
    assert page.is_visible("#unsaved")
    page.evaluate("() => { Storage.prototype.setItem = window.real; }")
    ask(page, "And now?")
    done(page)
    assert page.is_hidden("#unsaved")
    page.reload()
    assert page.locator(QUESTIONS).count() == 2


def test_an_answer_that_a_reload_cut_off_says_so(chromium: Any, url: str) -> None:
    page = greedy_chat(chromium, url)
    slow_down(page)
    ask(page, LONG)
    page.wait_for_selector(f"{ANSWER} .body p")
    assert "not complete" not in page.inner_text(STATS)
    page.reload()
    assert "not complete: its page was closed" in page.inner_text(STATS)


def test_escape_leaves_the_editing_and_not_the_answer(chromium: Any, url: str) -> None:
    page = greedy_chat(chromium, url)
    slow_down(page)
    ask(page, LONG)
    page.wait_for_selector(f"{ANSWER} .body p")
    page.click("text=Edit")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.textContent") == "Edit"
    assert page.is_visible("#stop")


def test_questions_without_an_answer_are_told_together(chromium: Any, url: str) -> None:
    page = greedy_chat(chromium, url)
    sent = sent_roles(page)
    set_parameter(page, "max_tokens", "5000")
    ask(page, "One.")
    page.wait_for_selector(f"{ANSWER} [role=alert]")
    set_parameter(page, "max_tokens", "5")
    ask(page, "Two.")
    done(page)
    assert sent == [["user"], ["user"]]  # templates of many models refuse two in a row


@pytest.mark.parametrize(("name", "keys"), [("temperature", "1e"), ("seed", "9007199254740993")])
def test_a_number_that_cannot_be_sent_is_named(chromium: Any, url: str, name: str, keys: str) -> None:
    page = greedy_chat(chromium, url)
    sent = sent_roles(page)
    set_parameter(page, name, "")
    page.focus(f"#params [name={name}]")
    page.keyboard.type(keys)
    ask(page, "Hello.")
    page.wait_for_selector(f"{ANSWER} [role=alert]:has-text('{name.title()} (under ⚙) must be a number')")
    assert not sent


def test_another_model_after_a_restart_is_found(chromium: Any, url: str) -> None:
    page = greedy_chat(chromium, url)
    page.wait_for_selector("#model:has-text('demo')")
    set_parameter(page, "max_tokens", "5")
    gone = {"status": 404, "json": {"error": {"message": "there is no model 'demo' here"}}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**gone))
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "another"}]}))
    ask(page, "Hello.")
    page.wait_for_selector("#model:has-text('another')")


def test_a_wrong_key_is_asked_for_again(chromium: Any, tmp_path: Path) -> None:
    page = chromium()
    with serve(tmp_path / "log", "--api-key", "the-key") as locked:
        page.goto(locked)
        page.wait_for_selector("#key")
        page.keyboard.press("Escape")
        set_parameter(page, "max_tokens", "5")
        ask(page, "Hello.")
        page.fill("#key input", "the-k…y")  # which no header can carry
        page.keyboard.press("Enter")
        page.wait_for_timeout(300)
        assert page.is_visible("#key") and page.inner_text("#model") == "locked"
        for key in ("wrong", "wrong again", "the-key"):
            page.wait_for_selector("#key")
            page.fill("#key input", key.replace(" ", "-"))
            page.keyboard.press("Enter")
            page.wait_for_timeout(500)
        done(page)
        assert page.locator("article").count() == 2 and page.complaints == []
