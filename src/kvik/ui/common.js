// What both pages share: elements, the theme, the API key, requests and server-sent events.

/** Make an element. `props` are properties, or attributes where the name has a dash; children may be strings. */
export function el(name, props = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(props)) {
    if (key.includes("-") || key === "role") node.setAttribute(key, value);
    else node[key] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** A button that copies a text, and says whether it did: pages that came over plain HTTP from elsewhere may not. */
export function copyButton(text) {
  const button = el("button", { type: "button", className: "quiet" }, "Copy");
  button.addEventListener("click", async () => {
    const copied = await navigator.clipboard?.writeText(text).then(() => true, () => false);
    button.textContent = copied ? "Copied" : "Select and copy";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

/** A value of this browser's storage; storage may be full, forbidden, or hold nonsense. */
export function load(name, fallback, storage = () => localStorage) {
  try {
    return JSON.parse(storage().getItem(`kvik.${name}`)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function save(name, value, storage = () => localStorage) {
  try {
    storage().setItem(`kvik.${name}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** The button that goes from the system's theme to the other one and back. */
export function themeButton(button, changed = () => {}) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = load("theme", null);
  const show = () => {
    const theme = chosen ?? (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    button.setAttribute("aria-label", theme === "dark" ? "Use the light theme" : "Use the dark theme");
    button.title = button.getAttribute("aria-label");
    button.textContent = theme === "dark" ? "☀" : "☾";
    changed();
  };
  button.addEventListener("click", () => {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    save("theme", chosen);
    show();
  });
  dark.addEventListener("change", show);
  show();
}

const session = () => sessionStorage;
const authorization = () => {
  const key = load("key", "", session);
  return key ? { authorization: `Bearer ${key}` } : {};
};

/** Show the form for the key (a dialog) and call `accepted` when one was given. */
export function keyDialog(dialog, accepted) {
  const form = dialog.querySelector("form");
  form.addEventListener("submit", () => {
    save("key", form.elements.key.value.trim(), session);
    accepted();
  });
  return () => dialog.open || dialog.showModal();
}

/** An answer that is an error, in words for people. */
export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** fetch with the key; raises ApiError for everything but success. */
export async function request(path, { body, signal } = {}) {
  const headers = { ...authorization(), ...(body ? { "content-type": "application/json" } : {}) };
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  const why = told?.error?.message ?? answer.statusText;
  const after = answer.headers.get("retry-after");
  if (answer.status === 401) throw new ApiError(401, "This server needs an API key.");
  if (answer.status === 429) {
    throw new ApiError(429, `The server is busy: ${why}. ${after ? `Try again in ${after} s.` : ""}`.trim());
  }
  throw new ApiError(answer.status, `${why} (${answer.status})`, told?.error?.code);
}

/** The JSON records of a stream of server-sent events. Raises ApiError when it breaks off. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const data = line.startsWith("data:") ? line.slice(5).trim() : "";
        if (data === "[DONE]") return yield null;
        if (data) yield JSON.parse(data);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The connection was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
