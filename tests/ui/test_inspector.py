"""The inspector in a headless Chromium, against the demo model and against records that are made up."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def busy_inspector(chromium: Any, url: str) -> Any:
    """The inspector, and an engine at work."""
    page = chromium()
    page.goto(f"{url}/inspector")
    page.wait_for_selector("#state[data-state=live]")
    page.click("#demo")
    page.wait_for_selector("#batch li")
    return page


def test_the_inspector_shows_the_engine(chromium: Any, url: str) -> None:
    page = busy_inspector(chromium, url)
    page.wait_for_selector("#use:text-matches('[1-9]')")
    page.wait_for_selector("#waterfall .prefill")
    page.wait_for_selector("#map-note:text-matches('[1-9][0-9]* shared')")
    page.click("#pause")
    page.focus("#slider")
    page.keyboard.press("Home")
    first = page.inner_text("#shown")
    page.wait_for_timeout(500)
    assert first.startswith("step ") and page.inner_text("#shown") == first
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#shown") != first
    page.click("#pause")
    page.wait_for_selector("#running:text-is('0 / 0')", timeout=120_000)
    page.wait_for_selector("#map-note:has-text(': 0 in use, 0 shared, 0 held')")
    page.locator("#waterfall button").first.click()
    assert page.get_attribute("#waterfall button", "aria-pressed") == "true"
    assert page.complaints == []


def test_why_a_request_was_slow_is_told_rightly(chromium: Any, url: str) -> None:
    page = chromium()
    page.goto(f"{url}/inspector")
    told = page.evaluate("""async () => {
        const { Journal, verdict } = await import("/ui/replay.js");
        const step = (at, more) => ({ type: "step", at, left: [], joined: [], decode: [], prefill: [], waiting: [],
                                      ms: [0, 10, 0], ...more });
        const begin = (records) => {
            const journal = new Journal();
            journal.snapshot({ at: 0, sequences: [], waiting: [] });
            for (const record of records) journal.add(record);
            return journal;
        };
        const joined = [[0, "cmpl-a", 0, 100, 0]], prefill = [[0, 0, 100]], decode = [0];
        const some = (from, count) => Array.from({ length: count }, (_, i) => step(from + i * 0.01, { decode }));
        const found = {};

        let journal = begin([step(1, { joined, prefill }), ...some(1.01, 50)]); // a tab that was hidden for ten seconds
        journal.snapshot({ at: 11, sequences: [[0, "cmpl-a", 0, 100, 1100, 0, []]], waiting: [] });
        for (const record of some(11, 50)) journal.add(record);
        found.hidden = verdict(journal.all.get("cmpl-a/0"), 11.5);

        journal = begin([step(1, { waiting: [["cmpl-w", 10, 0.5]] })]);
        journal.snapshot({ at: 3, sequences: [], waiting: [["cmpl-w", 10, 2.5]] });
        found.waiting = verdict(journal.all.get("cmpl-w/0"), 3.5);
        journal.snapshot({ at: 9, sequences: [], waiting: [] });
        found.gone = verdict(journal.all.get("cmpl-w/0"), 9);

        journal = begin([step(1, { joined, prefill }), ...some(1.01, 299), step(5, { left: [[0, "preempted"]] })]);
        journal.add(step(6, { joined, prefill: [[0, 0, 200]] }));
        journal.add(step(6.01, { prefill: [[0, 200, 200]] }));
        found.tokens = journal.all.get("cmpl-a/0").tokens;

        const ids = Array.from({ length: 88 }, (_, i) => `cmpl-${i}`), rows = [0, 1, 2, 3, 4, 5, 6, 7];
        const take = (from) => rows.map((row) => [row, ids[from + row], 0, 10, 0]);
        const queue = (from, seconds) => ids.slice(from, from + 64).map((id) => [id, 10, seconds]);
        journal = begin([0, 5, 10].map((at) => step(at, at ? { decode: rows, waiting: queue(8, at) }
                                                           : { joined: take(0), waiting: queue(8, 0) })));
        journal.add(step(11, { left: rows.map((row) => [row, "finished"]), joined: take(8), waiting: queue(16, 11) }));
        found.queued = rows.map((row) => verdict(journal.rows.get(row), 11));
        return found;
    }""")
    assert told == {
        "hidden": "10.50 s so far · decode 10.49 s: 1050 tokens, 10 ms each · a part of it was not seen",
        "waiting": "waiting for 3.00 s: no free place or not enough free blocks",
        "gone": "queued for 2.50 s · its rest was not seen",
        "tokens": 301,
        "queued": ["11.00 s so far · queued 11.00 s while 8 others ran"] * 8,
    }


def test_the_inspector_costs_nothing_while_nobody_looks(chromium: Any, url: str) -> None:
    page = chromium()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.add_init_script("Object.defineProperty(document, 'hidden', { get: () => !window.looking })")
    page.goto(f"{url}/inspector")  # opened in the background
    page.wait_for_selector("#state:has-text('asleep')")
    page.wait_for_timeout(300)
    assert not any("debug/events" in one for one in asked)
    page.evaluate("() => { window.looking = true; document.dispatchEvent(new Event('visibilitychange')); }")
    page.wait_for_selector("#state[data-state=live]")
    assert page.get_attribute("#shown", "aria-live") == "off"  # or a screen reader would read step after step
    session = page.context.new_cdp_session(page)

    def heap() -> int:
        session.send("HeapProfiler.collectGarbage")
        return int(session.send("Runtime.getHeapUsage")["usedSize"])

    before = heap()
    page.evaluate("""async () => {
        const { color } = await import("/ui/drawing.js");
        for (let i = 0; i < 400_000; i++) color(`cmpl-${i.toString(16).padStart(32, "0")}/0`);
    }""")
    assert heap() - before < 20e6  # the colours of requests of days


def test_an_inspector_that_missed_steps_begins_anew(chromium: Any, url: str) -> None:
    page = chromium()
    page.add_init_script("""() => {
        const real = fetch;
        window.listened = 0;
        window.fetch = async (path, options) => {
            if (path !== "debug/events") return real(path, options);
            window.listened++;
            const snapshot = { type: "snapshot", at: 0, step: 5, block_size: 16, num_blocks: 9, sequences: [], used: 0,
                               waiting: [] };
            const step = (number) => ({ type: "step", at: 0, step: number, left: [], joined: [], blocks: [], decode: [],
                                        prefill: [], used: 0, num_waiting: 0, waiting: [], ms: [0, 1, 0] });
            const numbers = window.listened === 1 ? [6, 900, 901, 902] : [5, 6, 7];
            const lines = [snapshot, ...numbers.map(step)].map((one) => `data: ${JSON.stringify(one)}\n\n`).join("");
            return new Response(new ReadableStream({ start: (out) => out.enqueue(new TextEncoder().encode(lines)) }));
        };
    }""".replace("() => {", "(() => {", 1) + ")()")  # fmt: skip
    page.goto(f"{url}/inspector")
    page.wait_for_selector("#shown:has-text('step 7')")
    page.wait_for_timeout(300)
    assert page.evaluate("window.listened") == 2 and page.complaints == []


def test_a_paused_inspector_shows_one_moment(chromium: Any, url: str) -> None:
    page = busy_inspector(chromium, url)
    page.wait_for_selector("#slider[max='299']")
    page.click("#pause")
    numbers = ["speed", "use", "running", "step-time", "hits", "hits-note"]
    ids = [*numbers, "shown", "map-note", "batch-title", "waiting-title"]
    texts = "(ids) => Object.fromEntries(ids.map((id) => [id, document.getElementById(id).textContent]))"
    seen = []
    for key in ("Home", "End", *["ArrowLeft"] * 10):
        page.focus("#slider")
        page.keyboard.press(key)
        page.wait_for_timeout(300)  # the numbers are written five times a second
        now = page.evaluate(texts, ids)
        blocks, used = map(int, re.findall(r"(\d+) (?:blocks|in use)", now["map-note"]))
        assert float(now["use"].rstrip(" %")) == pytest.approx(100 * used / blocks, abs=0.51)
        counts = [re.search(r"\((\d+)\)", now[title]) for title in ("batch-title", "waiting-title")]
        assert now["running"] == " / ".join(found[1] if found else "0" for found in counts)
        assert now["step-time"] in now["shown"]
        seen.append(now)
    assert seen[0] != seen[1]
    page.keyboard.press("Home")
    page.wait_for_timeout(2000)  # the engine goes on
    assert page.evaluate(texts, ids) == seen[0]
    page.click("#pause")
    page.wait_for_selector("#running:text-is('0 / 0')", timeout=120_000)
    page.wait_for_selector("#speed:text-is('0')")
    assert page.complaints == []
