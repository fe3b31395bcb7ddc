// A small subset of markdown, made into nodes. Text only ever becomes text nodes: there is no way to write HTML.

import { copyButton, el } from "./common.js";

const FENCE = /^( {0,3})(```+|~~~+)\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const TABLE = /^\s*\|?(\s*:?-+:?\s*\|)+(\s*:?-+:?\s*)?$/; // the line under the heads of the columns
const MAX_DEPTH = 6;

/** Show `text` in `container`. Blocks whose source did not change keep their nodes, so that streaming is cheap. */
export function render(container, text) {
  const blocks = split(text.split("\n"));
  blocks.forEach((block, i) => {
    const source = `${block.kind}\n${block.open ?? ""}\n${block.lines.join("\n")}`;
    const old = container.childNodes[i];
    if (old?.source === source) return;
    const node = build(block, 0);
    node.source = source;
    if (old) old.replaceWith(node);
    else container.append(node);
  });
  while (container.childNodes.length > blocks.length) container.lastChild.remove();
}

/** Lines to blocks: {kind, lines}. */
function split(lines) {
  const blocks = [];
  let last = null;
  const add = (kind, line, more = {}) => blocks.push((last = { kind, lines: line === null ? [] : [line], ...more }));
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i];
    const fence = FENCE.exec(line);
    if (fence) {
      const [, indent, mark, language] = fence;
      add("code", null, { language, open: language });
      const outdent = (text) => text.slice(Math.min(indent.length, /^ */.exec(text)[0].length));
      for (i++; i < lines.length && !lines[i].trim().startsWith(mark); i++) last.lines.push(outdent(lines[i]));
      last = null;
    } else if (startsTable(line, lines[i + 1]) && !(last?.kind === "list" && /^\s/.test(line))) {
      add("table", line);
      for (i++; i < lines.length && lines[i].includes("|"); i++) last.lines.push(lines[i]);
      i--;
      last = null;
    } else if (!line.trim()) {
      const begin = i;
      while (i + 1 < lines.length && !lines[i + 1].trim()) i++;
      const next = lines[i + 1] ?? "";
      if (last?.kind !== "list" || !(ITEM.test(next) || /^\s{2,}/.test(next))) last = null;
      else for (let blank = begin; blank <= i; blank++) last.lines.push("");
    } else if (RULE.test(line)) {
      add("rule", line);
      last = null;
    } else if (HEADING.test(line)) {
      add("heading", line);
      last = null;
    } else if (QUOTE.test(line)) {
      if (last?.kind === "quote") last.lines.push(line.replace(QUOTE, ""));
      else add("quote", line.replace(QUOTE, ""));
    } else if (last?.kind === "list" ? !startsOther(last.lines[0], line) : last && !ITEM.test(line)) {
      last.lines.push(line);
    } else {
      add(ITEM.test(line) ? "list" : "text", line);
    }
  }
  return blocks;
}

/** Whether a line begins a list of the other kind than the one that began with `first`. */
function startsOther(first, line) {
  const [, indent, mark] = ITEM.exec(first);
  const item = ITEM.exec(line);
  return item && item[1].length <= indent.length + 1 && /\d/.test(mark) !== /\d/.test(item[2]);
}

/** The cells of a line of a table. */
function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.replaceAll("\\|", "|").trim());
}

const startsTable = (line, next = "") =>
  line.includes("|") && TABLE.test(next) && cells(line).length === cells(next).length;

function build(block, depth) {
  const text = block.lines.join("\n");
  if (block.kind === "code") return code(text, block.language);
  if (block.kind === "rule") return el("hr");
  if (block.kind === "table") return table(block.lines);
  if (block.kind === "heading") {
    const [, marks, title] = HEADING.exec(text);
    return el(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(title)); // the page has its own h1 and h2
  }
  if (depth < MAX_DEPTH && block.kind === "list") return list(block.lines, depth);
  if (depth < MAX_DEPTH && block.kind === "quote") {
    return el("blockquote", {}, ...split(block.lines).map((inner) => build(inner, depth + 1)));
  }
  return el("p", {}, ...inline(text));
}

/** A list; lines that stand further right than its first item belong to the item before them. */
function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(mark);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) items.push([item[3]]);
    else items.at(-1).push(line.slice(Math.min(indent.length + 2, /^\s*/.exec(line)[0].length)));
  }
  const nodes = items.map((item) => {
    const blocks = split(item);
    const tight = blocks[0]?.kind === "text" ? inline(blocks.shift().lines.join("\n")) : [];
    return el("li", {}, ...tight, ...blocks.map((inner) => build(inner, depth + 1)));
  });
  return el(ordered ? "ol" : "ul", ordered ? { start: parseInt(mark, 10) } : {}, ...nodes);
}

function table([heads, marks, ...lines]) {
  const sides = cells(marks).map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "end") : "start"));
  const row = (line, name) => {
    const found = cells(line);
    return el("tr", {}, ...sides.map((side, i) => {
      const cell = el(name, {}, ...inline(found[i] ?? ""));
      cell.style.textAlign = side;
      return cell;
    }));
  };
  const body = el("tbody", {}, ...lines.map((line) => row(line, "td")));
  return el("div", { className: "table", tabIndex: 0 }, el("table", {}, el("thead", {}, row(heads, "th")), body));
}

function code(text, language) {
  const head = el("div", { className: "code-head" }, el("span", {}, language || "code"), copyButton(text));
  return el("div", { className: "code" }, head, el("pre", { tabIndex: 0 }, el("code", {}, text)));
}

const INLINE = new RegExp(
  [
    /\\([\\`*_{}[\]()#+.!>~|-])/, // 1 an escaped character
    /(`+)([^`](?:[^\n]*?[^`])?)\2(?!`)/, // 2, 3 code
    /\*\*(?=\S)([^\n]*?\S)\*\*/, // 4 bold
    /\*(?=[^\s*])([^\n*]*[^\s*])\*/, // 5 italic
    /(?<![\p{L}\p{N}])_(?=[^\s_])([^\n_]*[^\s_])_(?![\p{L}\p{N}])/, // 6 italic
    /\[([^\]\n]+)\]\(((?:[^()\s]|\([^()\s]*\))+)(?:\s+"[^"\n]*")?\)/, // 7, 8 link, with or without a title
    /(https?:\/\/(?:[^\s<>"'`()\]]|\([^\s<>"'`()\]]*\))+(?<![.,;:!?]))/, // 9 bare link
  ].map((part) => part.source).join("|"),
  "gu",
);

/** Nodes and strings of one line of text or more. */
function inline(text, depth = 0) {
  const nodes = [];
  let end = 0;
  if (depth > MAX_DEPTH) return [text];
  for (const found of text.matchAll(INLINE)) {
    const [all, escaped, , codeText, bold, star, under, label, target, bare] = found;
    nodes.push(text.slice(end, found.index));
    end = found.index + all.length;
    if (escaped) nodes.push(escaped);
    else if (codeText) nodes.push(el("code", {}, codeText.trim() || codeText));
    else if (bold) nodes.push(el("strong", {}, ...inline(bold, depth + 1)));
    else if (star || under) nodes.push(el("em", {}, ...inline(star || under, depth + 1)));
    else nodes.push(link(label ?? bare, target ?? bare) ?? all);
  }
  nodes.push(text.slice(end));
  return nodes;
}

/** A link to http(s), or null. */
function link(label, target) {
  if (!/^https?:\/\//i.test(target) || !URL.canParse(target)) return null;
  return el("a", { href: target, rel: "noopener noreferrer", target: "_blank" }, label);
}
