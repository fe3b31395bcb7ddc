// The inspector: reads /debug/events, keeps the state (replay.js) and shows it (drawing.js for the canvases).

import { byId, el, events, keyDialog, request, themeButton } from "./common.js";
import { blockAt, color, drawMap, drawTimeline, LEGENDS, sparkline, stepAt, sample } from "./drawing.js";
import { FREED, CACHED, HELD, Journal, NEVER, OWNED, Player, spansOf, verdict } from "./replay.js";

const SPARK = 150; // samples of a sparkline, one each SAMPLE_MS
const SAMPLE_MS = 200;
const SHOWN_REQUESTS = 16;
const SHOWN_WAITING = 6;

const journal = new Journal();
let player = null;
let frozen = null; // {player, place, state, requests, now, lines} while paused
let selected = null; // key of the request that is lit up
let clock = 0; // the server's time minus this browser's
let dirty = true;
let connection = null;
const recent = []; // [time, tokens generated] of the last second
let speed = 0; // tokens in `recent`
const lines = { at: [], speed: [], use: [], running: [], step: [] };

const now = () => Math.max(player?.live.at ?? 0, Date.now() / 1000 + clock);
const whole = (number) => Math.round(number).toLocaleString("en");
const took = (step) => step.ms.reduce((a, b) => a + b);

// --- the feed ------------------------------------------------------------------------------------------------------

function take(record) {
  if (record.type === "snapshot") {
    clock = record.at - Date.now() / 1000;
    player = new Player(record);
    journal.snapshot(record);
  } else if (player && record.step > (player.live.step?.step ?? player.begun) + 1) {
    listen(); // the server dropped steps, since they were not read fast enough: begin anew
  } else if (player && !(record.step <= player.begun)) {
    player.add(record);
    const generated = journal.add(record);
    recent.push([record.at, generated]);
    speed += generated;
    forget(record.at - 1);
    Object.assign(record, { speed, prompts: journal.prompts, cached: journal.cached }); // for a later look
  }
  dirty = true;
}

function forget(before) {
  while (recent.length && recent[0][0] < before) speed -= recent.shift()[1];
}

/** Listen until the page is hidden; come back with growing pauses when the connection breaks. */
async function listen() {
  connection?.abort();
  const mine = (connection = new AbortController());
  for (let pause = 0.5; !mine.signal.aborted; pause = Math.min(10, pause * 2)) {
    try {
      const answer = await request("debug/events", { signal: mine.signal });
      tell("live", "connected");
      for await (const record of events(answer)) {
        if (mine.signal.aborted) return;
        pause = 0.5;
        take(record);
      }
    } catch (error) {
      if (mine.signal.aborted) return;
      if (error.status === 401) {
        tell("lost", "needs an API key");
        return askKey();
      }
    }
    tell("lost", `connection lost, trying again in ${Math.ceil(pause)} s`);
    await new Promise((done) => setTimeout(done, pause * 1000));
  }
}

function tell(state, text) {
  byId("state").dataset.state = state;
  byId("state").textContent = text;
}

const askKey = keyDialog(byId("key"), listen);

// --- pause and slider ----------------------------------------------------------------------------------------------

function pause(place) {
  if (!player?.steps.length) return;
  const kept = frozen?.player ?? player.freeze();
  const at = Math.max(0, Math.min(kept.steps.length - 1, place ?? kept.steps.length - 1));
  const { requests, now: then, lines: drawn } = frozen ?? structuredClone({ requests: latest(), now: now(), lines });
  frozen = { player: kept, place: at, state: kept.at(at), requests, now: then, lines: drawn };
  showPlayer();
}

function play() {
  frozen = null;
  showPlayer();
}

function showPlayer() {
  const { steps } = frozen?.player ?? player ?? { steps: [] };
  const place = frozen?.place ?? steps.length - 1;
  byId("pause").textContent = frozen ? "▶ Live" : "❚❚ Pause";
  byId("pause").setAttribute("aria-pressed", String(Boolean(frozen)));
  byId("slider").max = Math.max(0, steps.length - 1);
  byId("slider").value = Math.max(0, place);
  const step = steps[place];
  byId("shown").textContent = step ? describe(step) : "no steps yet";
  byId("slider").setAttribute("aria-valuetext", byId("shown").textContent);
  dirty = true;
}

function describe(step) {
  const prefill = step.prefill.reduce((sum, [, , tokens]) => sum + tokens, 0);
  const parts = [`step ${whole(step.step)}`, `${took(step).toFixed(1)} ms`];
  if (step.decode.length) parts.push(`${step.decode.length} decode${step.decode.length > 1 ? "s" : ""}`);
  if (prefill) parts.push(`${whole(prefill)} prefill tokens`);
  return parts.join(" · ");
}

byId("pause").addEventListener("click", () => (frozen ? play() : pause()));
byId("slider").addEventListener("input", () => pause(Number(byId("slider").value)));
document.addEventListener("keydown", (event) => {
  if (event.target.closest("button, input, a, dialog")) return;
  if (event.key === " ") {
    event.preventDefault();
    frozen ? play() : pause();
  } else if (frozen && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
    pause(frozen.place + (event.key === "ArrowLeft" ? -1 : 1));
  }
});

// --- what is under the pointer -------------------------------------------------------------------------------------

const tip = byId("tip");

function hover(canvas, find) {
  canvas.addEventListener("pointermove", (event) => {
    const text = player && find(event.offsetX, event.offsetY);
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
  });
  canvas.addEventListener("pointerleave", () => (tip.hidden = true));
}

/** "cmpl-3f2a…c1-4" is 3f2ac-4. */
const short = (id) => id.replace(/^[a-z]+-/, "").replace(/^(\w{5})\w*/, "$1");
const named = (seq) => short(seq.id) + (seq.index ? `#${seq.index}` : "");

hover(byId("map"), (x, y) => {
  const state = frozen?.state ?? player.live;
  const block = blockAt(x, y);
  if (block === null || block >= state.state.length) return "";
  const seq = state.owner[block];
  const age = `${Math.max(0, (frozen ? state.at : now()) - state.since[block]).toFixed(1)} s`;
  const kind = state.state[block];
  if (kind === NEVER) return `block ${block}: never used since this page listens`;
  if (kind === CACHED) return `block ${block}: free, keeps its contents for a prefix that comes again\nlast owner ${named(seq)}, freed ${age} ago`;
  if (kind === HELD) return `block ${block}: held until the step in flight is done\nlast owner ${named(seq)}`;
  if (kind === FREED) return `block ${block}: free\nlast owner ${named(seq)}, freed ${age} ago`;
  const from = seq.blocks.indexOf(block) * state.blockSize;
  const filled = Math.round(state.fill(block) * state.blockSize);
  const holders = [...state.rows.values()].filter((one) => one.blocks.includes(block)).map(named);
  const shared = holders.length > 1 ? `\nshared by ${holders.length}: ${holders.join(", ")}` : `\nowner ${named(seq)}`;
  return `block ${block}: tokens ${from} to ${from + state.blockSize - 1}, ${filled} of ${state.blockSize} filled${shared}\nin use for ${age}`;
});

hover(byId("timeline"), (x, y) => {
  const { steps } = frozen?.player ?? player;
  const { place, lane } = stepAt(x, y, steps);
  const step = steps[place];
  if (!step) return "";
  const key = step.rows.get(lane);
  const chunk = step.prefill.find(([row]) => row === lane);
  const what = chunk ? `prefill of tokens ${chunk[1]} to ${chunk[1] + chunk[2] - 1}` : step.decode.includes(lane) ? "decode of one token" : "";
  return describe(step) + (key && what ? `\nlane ${lane}: ${short(key.split("/")[0])}, ${what}` : "");
});
byId("timeline").addEventListener("click", (event) => {
  const { steps } = frozen?.player ?? player ?? { steps: [] };
  const { place, lane } = stepAt(event.offsetX, event.offsetY, steps);
  if (!steps[place]) return;
  pause(place);
  select(frozen.player.steps[place]?.rows.get(lane) ?? null);
});
byId("map").addEventListener("click", (event) => {
  const state = frozen?.state ?? player?.live;
  const block = blockAt(event.offsetX, event.offsetY);
  const owned = state && block !== null && state.state[block] === OWNED;
  select(owned ? state.owner[block].key : null);
});

function select(key) {
  selected = key === selected ? null : key;
  showRequests();
  dirty = true;
}

// --- numbers, queues, waterfall ------------------------------------------------------------------------------------

function sampleNumbers() {
  if (!player) return;
  const { live } = player;
  forget(now() - 1);
  const busy = live.step && now() - live.step.at < 1;
  sample(lines.at, now(), SPARK);
  sample(lines.speed, speed, SPARK);
  sample(lines.use, live.used / live.state.length, SPARK);
  sample(lines.running, live.rows.size, SPARK);
  sample(lines.step, busy ? took(live.step) : 0, SPARK);
}

function showNumbers() {
  const state = frozen?.state ?? player?.live;
  if (!state) return;
  const { step, used, rows, numWaiting } = state;
  const size = state.state.length;
  const { prompts, cached } = frozen ? step : journal;
  byId("speed").textContent = whole(frozen ? step.speed : speed);
  byId("use").textContent = `${((100 * used) / size).toFixed(used && used < size / 10 ? 1 : 0)} %`;
  byId("running").textContent = `${rows.size} / ${numWaiting}`;
  byId("step-time").textContent = step ? `${took(step).toFixed(1)} ms` : "–";
  byId("hits").textContent = prompts ? `${Math.round((100 * cached) / prompts)} %` : "–";
  byId("hits-note").textContent = prompts ? `${whole(cached)} of ${whole(prompts)} prompt tokens` : "since this page was opened";
  const drawn = frozen?.lines ?? lines;
  const until = frozen ? drawn.at.filter((at) => at <= state.at).length : SPARK;
  for (const [name, top] of [["speed"], ["use", 1], ["running"], ["step"]]) {
    sparkline(byId(`${name}-line`), drawn[name].slice(0, until), SPARK, top);
  }
}

function showQueues() {
  const state = frozen?.state ?? player?.live;
  if (!state) return;
  const seqs = [...state.rows.values()];
  const longest = Math.max(64, ...seqs.map((seq) => Math.max(seq.prompt, seq.computed)));
  byId("batch-title").textContent = seqs.length ? `In the batch (${seqs.length})` : "In the batch: nothing";
  byId("batch").replaceChildren(...seqs.map((seq) => {
    const bar = el("div", { className: "bar" });
    const part = (from, to, alpha) => {
      const piece = el("i");
      piece.style.left = `${(100 * from) / longest}%`;
      piece.style.width = `${(100 * (to - from)) / longest}%`;
      piece.style.background = color(seq.key, alpha);
      bar.append(piece);
    };
    part(0, seq.prompt, 0.28);
    part(0, Math.min(seq.prompt, seq.computed), 0.6);
    if (seq.computed > seq.prompt) part(seq.prompt, seq.computed, 1);
    const doing = seq.computed < seq.prompt
      ? `prefill ${Math.round((100 * seq.computed) / seq.prompt)} % of ${seq.prompt}` : `${seq.prompt} + ${seq.computed - seq.prompt + 1} tokens`;
    return line(seq.key, named(seq), doing, bar);
  }));
  const waiting = state.numWaiting ? state.waiting : [];
  byId("waiting-title").textContent = state.numWaiting ? `Waiting (${state.numWaiting})` : "Waiting: nobody";
  byId("waiting").replaceChildren(
    ...waiting.slice(0, SHOWN_WAITING).map(([id, prompt, seconds]) => line(`${id}/0`, short(id), `${prompt} tokens, ${seconds.toFixed(1)} s`)),
    ...(state.numWaiting > SHOWN_WAITING ? [el("li", { className: "empty" }, `and ${state.numWaiting - SHOWN_WAITING} more`)] : []),
  );
}

const dot = (key) => {
  const node = el("span", { className: "dot" });
  node.style.background = color(key);
  return node;
};
const line = (key, name, doing, bar = null) =>
  el("li", {}, el("div", { className: "line" }, el("span", {}, dot(key), name), el("span", {}, doing)), bar);

const requestRows = new Map(); // key -> {item, button, track, why}

/** The latest that have begun; those that still wait follow while there is room. */
function latest() {
  const all = [...journal.all.values()];
  const waits = (one) => one.began === null && !one.end;
  const begun = all.filter((one) => !waits(one)).slice(-SHOWN_REQUESTS);
  return [...begun, ...all.filter(waits)].slice(0, SHOWN_REQUESTS);
}

function showRequests() {
  const shown = frozen?.requests ?? latest();
  const at = frozen?.now ?? now();
  byId("waterfall-empty").hidden = shown.length > 0;
  const place = busyClock(shown, at);
  for (const [key, row] of requestRows) {
    if (shown.some((one) => one.key === key)) continue;
    row.item.remove();
    requestRows.delete(key);
  }
  for (const one of shown) {
    let row = requestRows.get(one.key);
    if (!row) requestRows.set(one.key, (row = requestRow(one)));
    const text = verdict(one, at);
    row.why.textContent = row.why.title = text;
    row.button.setAttribute("aria-pressed", String(one.key === selected));
    row.track.replaceChildren(...spansOf(one, at).map((span) => {
      const piece = el("i", { className: span.kind });
      piece.style.left = `${100 * place(span.from)}%`;
      piece.style.width = `${100 * (place(span.to) - place(span.from))}%`;
      if (span.kind === "prefill" || span.kind === "decode") piece.style.background = color(one.key);
      return piece;
    }));
  }
}

function requestRow(one) {
  const track = el("span", { className: "track", "aria-hidden": "true" });
  const why = el("span", { className: "why" });
  const button = el("button", { type: "button" }, el("span", {}, dot(one.key), named(one)), track, why);
  button.addEventListener("click", () => select(one.key));
  const item = el("li", {}, button);
  byId("waterfall").append(item);
  return { item, button, track, why };
}

/** Time to a place between 0 and 1, where times without any request are cut out. */
function busyClock(shown, last) {
  const parts = [];
  for (const one of [...shown].sort((a, b) => a.begin - b.begin)) {
    const end = one.end ?? last;
    if (parts.length && one.begin <= parts.at(-1).end) parts.at(-1).end = Math.max(end, parts.at(-1).end);
    else parts.push({ begin: one.begin, end });
  }
  const busy = parts.reduce((sum, part) => sum + part.end - part.begin, 0) || 1;
  const gap = busy * 0.015;
  const total = busy + gap * (parts.length - 1);
  return (at) => {
    let before = 0;
    for (const part of parts) {
      if (at <= part.end) return (before + Math.max(0, at - part.begin)) / total;
      before += part.end - part.begin + gap;
    }
    return 1;
  };
}

// --- drawing, and requests to look at ------------------------------------------------------------------------------

let lastDraw = 0;
function frame(time) {
  requestAnimationFrame(frame);
  const state = frozen?.state ?? player?.live;
  if (!dirty || !state || time - lastDraw < (state.state.length > 8192 ? 120 : 30)) return;
  lastDraw = time;
  dirty = false;
  drawMap(byId("map"), state, selected);
  const source = frozen?.player ?? player;
  drawTimeline(byId("timeline"), source, frozen?.place ?? null, selected);
  if (!frozen) showPlayer(), (dirty = false);
}

function showMapNote() {
  const state = frozen?.state ?? player?.live;
  if (!state) return;
  const count = (kind) => state.state.reduce((sum, one) => sum + (one === kind), 0);
  const shared = state.holders.reduce((sum, holders) => sum + (holders > 1), 0);
  byId("map-note").textContent = `${state.state.length} blocks of ${state.blockSize} tokens: ` +
    `${state.used} in use, ${shared} shared, ${count(HELD)} held, ${count(CACHED)} cached`;
}

for (const [id, entries] of Object.entries(LEGENDS)) {
  byId(id).replaceChildren(...entries.map(([label, paint]) => {
    const picture = el("canvas", { width: 28, height: 28, "aria-hidden": "true" });
    picture.paint = () => paint(picture);
    return el("li", {}, picture, label);
  }));
}

const PREFACE = "Once upon a time, in a small village near a big forest, there lived a girl named Lily and a boy named Tom. ";
const BEGINNINGS = ["One day, they found a red ball.", "The dog was sad.", "Tom made a cake.", "It rained.", "A bird sang."];

/** Requests of many sizes, some with a prefix in common. A browser opens few connections, so each brings several. */
async function demo() {
  byId("demo").disabled = byId("problem").hidden = true;
  if (frozen) play();
  const some = (from, to) => Math.floor(from + Math.random() * (to - from));
  const worker = async (number) => {
    await new Promise((done) => setTimeout(done, number * 250));
    for (let round = 0; round < 4; round++) {
      const prompt = BEGINNINGS.map((text, i) => PREFACE.repeat([0, 9, 9, 18, some(1, 5)][i]) + text);
      const body = { prompt, max_tokens: some(40, 320), temperature: 1, min_tokens: 20, ...(number % 2 ? { stop: ["\n\n"] } : {}) };
      await (await request("v1/completions", { body })).text();
    }
  };
  try {
    await Promise.all([0, 1, 2, 3, 4].map(worker));
  } catch (error) {
    if (error.status === 401) askKey();
    byId("problem").textContent = error.message;
    byId("problem").hidden = false;
  }
  byId("demo").disabled = false;
}

byId("demo").addEventListener("click", demo);
function wakeOrSleep() {
  if (document.hidden) {
    connection?.abort(); // nobody looks: the engine need not tell
    tell("wait", "asleep");
  } else listen();
}
document.addEventListener("visibilitychange", wakeOrSleep);
addEventListener("resize", () => (dirty = true));
themeButton(byId("theme"), () => {
  dirty = true;
  for (const picture of document.querySelectorAll(".legend canvas")) picture.paint();
});
setInterval(() => {
  sampleNumbers();
  showNumbers();
  showQueues();
  showRequests();
  showMapNote();
}, SAMPLE_MS);
requestAnimationFrame(frame);
wakeOrSleep();
