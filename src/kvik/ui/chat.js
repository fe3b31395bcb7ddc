// The chat page: conversations in localStorage, answers from /v1/chat/completions as they are generated.

import { byId, copyButton, el, events, keyDialog, load, request, save, themeButton } from "./common.js";
import { render } from "./markdown.js";

const log = byId("log");
const prompt = byId("prompt");
const params = byId("params");
const MAX_CHATS = 50;
const MIN_SPAN = 0.25; // seconds; one read of the browser's may bring many tokens, so less says nothing of the speed

let chats = load("chats", []).filter((chat) => chat && Array.isArray(chat.messages));
let chat = chats.find((one) => one.id === load("chat", "")) ?? chats[0] ?? blank();
let model = null;
let answering = null; // {controller, message, chat} while an answer comes
let afterKey = () => {};

function newId() {
  return Date.now().toString(36) + Math.random().toString(36).slice(2, 6);
}

function blank() {
  return { id: newId(), messages: [] };
}

function store() {
  chats = [chat, ...chats.filter((one) => one !== chat && one.messages.length)].slice(0, MAX_CHATS);
  save("chat", chat.id);
  keep(chat);
  showChats();
}

/** Write all conversations down, after a change of this one. */
function keep(changed) {
  changed.at = Date.now();
  byId("unsaved").hidden = save("chats", chats.filter((one) => one.messages.length));
}

const say = (text) => (byId("status").textContent = text);

// --- what is shown -------------------------------------------------------------------------------------------------

function show() {
  log.replaceChildren(...chat.messages.map(article));
  if (!chat.messages.length) log.append(welcome());
  if (chat.from) {
    const note = "The messages above are no longer sent to the model: the conversation outgrew its context.";
    log.children[chat.from].before(el("p", { className: "note cut" }, note));
  }
  showChats();
  bottom();
}

function welcome() {
  const ideas = ["Tell me a story.", "Once upon a time, there was a little fox who", "Write three sentences about the sea."];
  const buttons = ideas.map((idea) => {
    const button = el("button", { type: "button" }, idea);
    button.addEventListener("click", () => send(idea));
    return el("li", {}, button);
  });
  return el("div", { className: "welcome" }, el("h2", {}, "What shall we talk about?"), el("ul", {}, ...buttons));
}

function showChats() {
  const items = chats.filter((one) => one.messages.length).map((one) => {
    const title = one.messages[0].content.slice(0, 60);
    const open = el("button", { type: "button", className: "open", title }, title);
    if (one === chat) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => choose(one));
    const remove = el("button", { type: "button", className: "icon", "aria-label": `Delete “${title}”`, title: "Delete" }, "×");
    remove.addEventListener("click", () => forget(one));
    return el("li", {}, open, remove);
  });
  byId("conversations").replaceChildren(...items);
}

function article(message) {
  const own = message.role === "user";
  const body = el("div", { className: "body" });
  const foot = el("footer");
  const thoughts = el("details", { className: "thoughts" }, el("summary", {}, "Reasoning"), el("p"));
  const node = el("article", { className: message.role, "aria-label": own ? "You" : "Answer" }, thoughts, body, foot);
  message.show = () => {
    thoughts.hidden = !message.reasoning;
    thoughts.lastChild.textContent = message.reasoning ?? "";
    if (own) body.textContent = message.content;
    else render(body, message.content);
    node.classList.toggle("pending", message === answering?.message);
    foot.replaceChildren(...(message === answering?.message ? [speed(message)] : tools(message, node)));
  };
  Object.defineProperty(message, "show", { enumerable: false }); // not for the storage
  message.show();
  return node;
}

function tools(message, node) {
  const button = (label, action, className = "quiet") => {
    const made = el("button", { type: "button", className }, label);
    made.addEventListener("click", action);
    return made;
  };
  if (message.role === "user") return [button("Edit", () => edit(message, node))];
  const parts = [];
  const question = chat.messages.indexOf(message) - 1;
  const outgrown = message.full && question > (chat.from ?? 0);
  if (message.error) {
    const what = outgrown ? "This conversation no longer fits into the model's context: " : "";
    parts.push(el("p", { className: "error", role: "alert" }, what + message.error));
  }
  if (outgrown) {
    parts.push(button("Send without the oldest messages", () => leaveOut(message, question), ""));
    parts.push(button("Ask in a new chat", () => askAfresh(chat.messages[question].content), ""));
  }
  for (const warning of message.warnings ?? []) parts.push(el("p", { className: "note" }, `Server: ${warning}`));
  parts.push(button(message.error ? "Try again" : "Regenerate", () => regenerate(message)));
  if (message.content) parts.push(copyButton(message.content));
  parts.push(speed(message));
  return parts;
}

/** Tokens, speed, and why the answer ended. */
function speed(message) {
  const { usage, seconds, first, tokens, finish, error } = message;
  const parts = [];
  const count = usage?.completion_tokens ?? tokens;
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${usage.prompt_tokens} prompt tokens${cached ? ` (${cached} from the cache)` : ""}`);
  }
  if (count) parts.push(`${count} tokens`);
  if (count > 1 && seconds >= MIN_SPAN) parts.push(`${Math.round((count - 1) / seconds).toLocaleString("en")} tokens/s`);
  if (first) parts.push(`first after ${first < 1 ? `${Math.round(first * 1000)} ms` : `${first.toFixed(1)} s`}`);
  if (finish === "length") parts.push("ended at the token limit");
  if (finish === "stopped") parts.push("stopped by you");
  if (!finish && !error && message !== answering?.message) parts.push("not complete: its page was closed");
  return el("span", { className: "stats" }, parts.join(" · "));
}

const nearBottom = () => log.scrollHeight - log.scrollTop - log.clientHeight < 80;
const bottom = () => (log.scrollTop = log.scrollHeight);

function busy(on) {
  byId("send").hidden = on;
  byId("stop").hidden = !on;
}

// --- what people do ------------------------------------------------------------------------------------------------

function choose(one) {
  stop();
  chat = one;
  save("chat", chat.id);
  panel("sidebar", false);
  show();
  prompt.focus();
}

function forget(one) {
  if (one === chat) stop();
  chats = chats.filter((other) => other !== one);
  if (one === chat) chat = chats[0] ?? blank();
  store();
  show();
}

function send(text) {
  if (!text.trim()) return;
  stop();
  chat.messages.push({ role: "user", content: text.trim() });
  answer();
}

/** Drop this message and what followed. */
function cut(message) {
  stop();
  chat.messages.length = chat.messages.indexOf(message);
  if (chat.messages.length < chat.from) chat.from = 0; // what remains did fit
}

function regenerate(message) {
  cut(message);
  answer();
}

/** Ask again without the oldest questions and answers: half of the text, so that some more of them fit. */
function leaveOut(message, question) {
  const size = () => chat.messages.slice(chat.from, question + 1).reduce((sum, { content }) => sum + content.length, 0);
  const half = size() / 2;
  do chat.from = (chat.from ?? 0) + 2;
  while (chat.from < question && size() > half);
  regenerate(message);
}

function askAfresh(text) {
  choose(blank());
  send(text);
}

/** Put a message of the user's into a text field; saving drops what followed and asks again. */
function edit(message, node) {
  const field = el("textarea", { value: message.content, rows: 3, "aria-label": "Edit your message" });
  const cancel = el("button", { type: "button" }, "Cancel");
  const form = el("form", { className: "edit" }, field, el("div", {}, cancel, el("button", { className: "primary" }, "Send again")));
  const back = () => {
    form.replaceWith(node);
    node.querySelector("footer button").focus();
  };
  cancel.addEventListener("click", back);
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.preventDefault(); // it means the form, not the answer that is being written
      back();
    }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === field) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!field.value.trim()) return;
    cut(message);
    send(field.value);
  });
  node.replaceWith(form);
  field.focus();
}

function stop() {
  answering?.controller.abort();
  answering = null;
  busy(false);
}

// --- an answer -----------------------------------------------------------------------------------------------------

function requestBody() {
  const fields = Object.fromEntries(new FormData(params));
  const body = { model: model ?? undefined, stream: true, stream_options: { include_usage: true } };
  for (const { name, type, value, validity, labels } of params.elements) {
    if (type !== "number") continue;
    if (validity.badInput || Math.abs(value) > Number.MAX_SAFE_INTEGER) {
      throw new Error(`${labels[0].textContent.trim()} (under ⚙) must be a number of at most ${Number.MAX_SAFE_INTEGER}.`);
    }
    if (value !== "") body[name] = Number(value);
  }
  const told = [];
  for (const { role, content } of chat.messages.slice(chat.from).filter((message) => message.content)) {
    const last = told.at(-1);
    if (last?.role === role) last.content += `\n\n${content}`; // no answer came between; many templates want turns
    else told.push({ role, content });
  }
  body.messages = fields.system.trim() ? [{ role: "system", content: fields.system.trim() }, ...told] : told;
  return body;
}

async function answer() {
  const message = { role: "assistant", content: "", tokens: 0 };
  const mine = (answering = { controller: new AbortController(), message });
  const home = chat;
  home.messages.push(message);
  show();
  busy(true);
  store();
  say("The answer is being written.");
  try {
    await stream(requestBody(), message, mine);
    say("The answer is complete.");
  } catch (error) {
    if (error.name === "AbortError") {
      message.finish = "stopped";
      if (!answering || answering === mine) say("Stopped.");
    } else {
      message.error = error.message;
      const { rangeOverflow } = params.elements.max_tokens.validity; // then no conversation is short enough
      message.full = error.code === "context_length_exceeded" && !rangeOverflow;
      say(error.message);
      if (error.status === 401) askKey(() => regenerate(message));
      if (error.status === 0 || error.status === 404) connect(); // is it there, and with another model?
    }
  }
  if (answering === mine) {
    answering = null;
    busy(false);
  }
  const follow = nearBottom();
  message.show?.();
  if (follow && home === chat) bottom();
  if (chats.includes(home)) keep(home);
}

async function stream(body, message, mine) {
  const begin = performance.now();
  const reply = await request("v1/chat/completions", { body, signal: mine.controller.signal });
  let firstAt = 0;
  let drawing = 0;
  const draw = () => {
    drawing = 0;
    const follow = nearBottom();
    if (answering === mine) message.show();
    if (follow) bottom();
  };
  let ended = false;
  for await (const chunk of events(reply)) {
    if (chunk === null) {
      ended = true;
      break;
    }
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.warnings) message.warnings = chunk.warnings;
    if (chunk.usage) message.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    const { content = "", reasoning_content, reasoning = reasoning_content ?? "" } = choice?.delta ?? {};
    if (!content && !reasoning) continue;
    const now = performance.now();
    firstAt ||= now;
    message.first ??= (now - begin) / 1000;
    message.seconds = (now - firstAt) / 1000;
    message.tokens += 1; // of the stream's events; the usage at the end knows better
    message.content += content;
    if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
    drawing ||= requestAnimationFrame(draw);
  }
  cancelAnimationFrame(drawing);
  if (!ended) throw new Error("The connection was lost before the answer was complete.");
}

// --- panels, parameters, start -------------------------------------------------------------------------------------

function panel(id, on) {
  const node = byId(id);
  const open = on ?? !(id === "settings" ? !node.hidden : node.classList.contains("open"));
  if (id === "settings") node.hidden = !open;
  else node.classList.toggle("open", open);
  byId(`show-${id}`).setAttribute("aria-expanded", String(open));
  if (open && on === undefined) node.querySelector("button, input, textarea").focus();
}

const askForKey = keyDialog(byId("key"), () => {
  const next = afterKey;
  afterKey = () => {};
  connect();
  next();
});
function askKey(next) {
  afterKey = next;
  askForKey();
}

let retry = 0;

/** Learn the model's name and context. */
async function connect() {
  clearTimeout(retry);
  try {
    const [first] = (await (await request("v1/models")).json()).data;
    model = first.id;
    byId("model").textContent = model;
    byId("model").title = `model ${model}${first.max_model_len ? `, context of ${first.max_model_len} tokens` : ""}`;
    if (first.max_model_len) {
      params.elements.max_tokens.max = first.max_model_len;
      params.elements.max_tokens.placeholder = `until the context of ${first.max_model_len} is full`;
    }
  } catch (error) {
    byId("model").textContent = error.status === 401 ? "locked" : "offline";
    say(error.message);
    if (error.status === 401) askForKey();
    else retry = setTimeout(connect, 5000);
  }
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (answering) return;
  const text = prompt.value;
  prompt.value = "";
  grow();
  send(text);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("composer").requestSubmit();
  }
});
const grow = () => {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight + 2, innerHeight * 0.4)}px`;
};
prompt.addEventListener("input", grow);
byId("stop").addEventListener("click", () => {
  stop();
  prompt.focus();
});
byId("new").addEventListener("click", () => choose(chat.messages.length ? blank() : chat));
byId("show-sidebar").addEventListener("click", () => panel("sidebar"));
byId("show-settings").addEventListener("click", () => panel("settings"));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented) return;
  if (byId("sidebar").classList.contains("open")) panel("sidebar", false);
  else if (!byId("settings").hidden) panel("settings", false);
  else if (answering) stop();
});
log.addEventListener("click", () => panel("sidebar", false));

for (const [name, value] of Object.entries(load("params", {}))) {
  if (params.elements[name]) params.elements[name].value = value;
}
params.addEventListener("input", () => save("params", Object.fromEntries(new FormData(params))));
params.addEventListener("reset", () => save("params", {}));
params.addEventListener("submit", (event) => event.preventDefault());
addEventListener("storage", (event) => {
  if (event.key !== "kvik.chats") return;
  // What another tab stored. Where it went on with the conversation that is open here, so does this one, unless it is in
  // the middle of something: then there are two from now on.
  const stored = load("chats", []);
  const twin = stored.find((one) => one.id === chat.id);
  const newer = twin && twin.at > (chat.at ?? 0);
  if (newer && (answering || log.querySelector(".edit"))) chat.id = newId();
  else if (newer) chat = twin;
  const others = stored.filter((one) => one.id !== chat.id);
  chats = chat.messages.length ? [chat, ...others] : others;
  if (chat === twin) show();
  else showChats();
});
addEventListener("pagehide", () => answering && store());

themeButton(byId("theme"));
show();
connect();
