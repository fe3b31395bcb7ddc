// The canvases of the inspector: block map, timeline, sparklines and the pictures of the legends.

import { CACHED, FREED, HELD, OWNED } from "./replay.js";

const MAX_HUES = 100_000; // more than blocks have owners
const hues = new Map();
let numHues = 0;

/** The colour of a request; neighbours in time differ by the golden angle. */
export function color(key, alpha = 1) {
  if (!hues.has(key)) {
    hues.set(key, ((numHues++ * 137.508 + 250) % 360).toFixed(1));
    if (hues.size > MAX_HUES) hues.delete(hues.keys().next().value);
  }
  return `oklch(${document.documentElement.dataset.theme === "dark" ? 0.74 : 0.64} 0.13 ${hues.get(key)} / ${alpha})`;
}

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A context in CSS pixels for a canvas of this height; cleared. */
function fit(canvas, height) {
  const scale = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const size = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== size[0] || canvas.height !== size[1]) {
    [canvas.width, canvas.height] = size;
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.ink = null;
  return { pen, width };
}

/** Set the fill, where it is another one: reading colours is most of the work of many small rectangles. */
function ink(pen, fill) {
  if (pen.ink !== fill) pen.fillStyle = pen.ink = fill;
}

// --- the block map -------------------------------------------------------------------------------------------------

const MAX_CELL = 48, MIN_CELL = 2, MAP_HEIGHT = 400;
let grid = { cell: MAX_CELL, columns: 1 };

function layOut(width, blocks) {
  let cell = MAX_CELL;
  while (cell > MIN_CELL && Math.ceil(blocks / Math.floor(width / cell)) * cell > MAP_HEIGHT) cell--;
  const columns = Math.max(1, Math.floor(width / cell));
  grid = { cell: width / columns, columns };
  return Math.ceil(blocks / columns) * grid.cell;
}

export function blockAt(x, y) {
  const column = Math.floor(x / grid.cell);
  return column < 0 || column >= grid.columns ? null : Math.floor(y / grid.cell) * grid.columns + column;
}

function paintCell(pen, x, y, size, look, colors) {
  const gap = size > 7 ? 2 : size > 4 ? 1 : 0;
  const side = size - gap;
  const rect = (fill, top = 0) => {
    ink(pen, fill);
    if (size <= 7) return pen.fillRect(x, y + top, side, side - top);
    pen.beginPath();
    pen.roundRect(x, y + top, side, side - top, top ? 1 : Math.min(5, side / 6));
    pen.fill();
  };
  if (size > 7 || look.kind === FREED || !look.kind) rect(colors.cell);
  if (look.kind === CACHED) {
    rect(look.color(0.3));
  } else if (look.kind === HELD) {
    rect(look.color(0.2));
    pen.strokeStyle = look.color(1);
    pen.lineWidth = 1;
    pen.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
  } else if (look.kind === OWNED) {
    if (look.fill < 1) rect(look.color(0.38));
    if (look.fill > 0) rect(look.color(1), side * (1 - look.fill));
    if (look.shared && size > 4) {
      ink(pen, colors.shared);
      pen.beginPath();
      pen.arc(x + side / 2, y + side / 2, Math.min(5, side * 0.19), 0, 7);
      pen.fill();
    }
  }
}

export function drawMap(canvas, state, selected) {
  const height = layOut(canvas.clientWidth, state.state.length);
  const { pen } = fit(canvas, height);
  const colors = { cell: variable("--cell"), shared: variable("--shared") };
  const spot = (block) => [(block % grid.columns) * grid.cell, Math.floor(block / grid.columns) * grid.cell, grid.cell];
  const fade = (key, alpha) => color(key, selected && key !== selected ? alpha * 0.28 : alpha);
  state.state.forEach((kind, block) => {
    if (kind === OWNED) return;
    if (!kind || kind === FREED) return paintCell(pen, ...spot(block), { kind }, colors);
    const key = state.owner[block]?.key;
    paintCell(pen, ...spot(block), { kind, color: (alpha) => fade(key, alpha) }, colors);
  });
  const drawn = new Uint8Array(state.state.length);
  const seqs = [...state.rows.values()].sort((a, b) => (b.key === selected) - (a.key === selected));
  for (const seq of seqs) {
    seq.blocks.forEach((block, i) => {
      if (drawn[block]) return;
      drawn[block] = 1;
      const key = seq.key === selected ? seq.key : (state.owner[block]?.key ?? seq.key);
      const fill = Math.max(0, Math.min(1, seq.computed / state.blockSize - i));
      const look = { kind: OWNED, fill, shared: state.holders[block] > 1, color: (alpha) => fade(key, alpha) };
      paintCell(pen, ...spot(block), look, colors);
    });
  }
}

// --- the timeline --------------------------------------------------------------------------------------------------

const LANES_HEIGHT = 208, BARS_HEIGHT = 44, SPACE = 10;
let strip = { column: 1, lane: 1, first: 0 };

/** Place in `steps` and lane under a point. */
export function stepAt(x, y, steps) {
  const place = Math.floor((x - strip.first) / strip.column);
  return { place: place >= 0 && place < steps.length ? place : -1, lane: Math.floor(y / strip.lane) };
}

export function drawTimeline(canvas, player, cursor, selected) {
  const { steps, length } = player;
  const lanes = steps.reduce((most, step) => Math.max(most, step.lanes), 8);
  const { pen, width } = fit(canvas, LANES_HEIGHT + SPACE + BARS_HEIGHT);
  const column = width / length, lane = LANES_HEIGHT / lanes;
  const first = width - steps.length * column;
  strip = { column, lane, first };
  pen.fillStyle = variable("--cell");
  for (let row = 0; row < lanes; row++) pen.fillRect(0, row * lane, width, Math.max(1, lane - 2));
  const most = Math.max(64, ...steps.map(tokensOf));
  const scale = BARS_HEIGHT / Math.log2(1 + most);
  const [dim, accent, danger] = [variable("--dim"), variable("--accent"), variable("--danger")];
  const fade = (key, alpha) => color(key, selected && key !== selected ? alpha * 0.28 : alpha);
  const side = Math.max(1, lane - (lane > 4 ? 2 : 0.5));
  const runs = new Map(); // row -> steps of one request's decodes without a break, drawn as one ribbon
  const ribbon = (row, run) => {
    if (!run) return;
    ink(pen, fade(run.key, 0.8));
    pen.fillRect(first + run.from * column, row * lane + side * 0.3, (run.to - run.from) * column, Math.max(0.5, side * 0.4));
  };
  steps.forEach((step, i) => {
    const x = first + i * column;
    for (const row of step.decode) {
      const key = step.rows.get(row);
      const run = runs.get(row);
      if (run?.key === key && run.to === i) run.to = i + 1;
      else if (key) ribbon(row, run), runs.set(row, { key, from: i, to: i + 1 });
    }
    for (const [row] of step.prefill) {
      if (!step.rows.has(row)) continue;
      ink(pen, fade(step.rows.get(row), 1));
      pen.fillRect(x, row * lane, Math.max(column - 0.4, 1.6), side);
    }
    ink(pen, danger);
    for (const [row, why] of step.left) if (why === "preempted") pen.fillRect(x - 1, row * lane, 2, side);
    const total = tokensOf(step);
    const bar = (tokens, fill) => {
      const tall = Math.log2(1 + tokens) * scale;
      ink(pen, fill);
      pen.fillRect(x, LANES_HEIGHT + SPACE + BARS_HEIGHT - tall, Math.max(column - 0.6, 1), tall);
    };
    if (step.prefill.length) bar(total, accent);
    if (step.decode.length) bar(step.decode.length, dim);
  });
  for (const [row, run] of runs) ribbon(row, run);
  if (cursor !== null) {
    pen.fillStyle = variable("--text");
    pen.fillRect(first + (cursor + 0.5) * column - 0.75, 0, 1.5, LANES_HEIGHT + SPACE + BARS_HEIGHT);
  }
}

const tokensOf = (step) => step.decode.length + step.prefill.reduce((sum, [, , tokens]) => sum + tokens, 0);

// --- sparklines and legends ----------------------------------------------------------------------------------------

export function sample(values, value, length) {
  values.push(value);
  if (values.length > length) values.shift();
}

export function sparkline(canvas, values, length, top = 0) {
  const height = 28;
  const { pen, width } = fit(canvas, height);
  const most = top || Math.max(1, ...values);
  const x = (i) => width - ((values.length - 1 - i) * width) / (length - 1);
  const y = (value) => height - 1.5 - (value / most) * (height - 4);
  pen.beginPath();
  values.forEach((value, i) => pen.lineTo(x(i), y(value)));
  pen.strokeStyle = variable("--accent");
  pen.lineWidth = 1.5;
  pen.lineJoin = "round";
  pen.stroke();
  pen.lineTo(width, height);
  pen.lineTo(x(0), height);
  pen.globalAlpha = 0.13;
  pen.fillStyle = variable("--accent");
  pen.fill();
  pen.globalAlpha = 1;
}

const cell = (look) => (canvas) => {
  const pen = canvas.getContext("2d");
  pen.setTransform(2, 0, 0, 2, 0, 0);
  pen.clearRect(0, 0, 14, 14);
  const colors = { cell: variable("--cell-line"), shared: variable("--shared") };
  paintCell(pen, 0, 0, 15, { color: (alpha) => color("legend", alpha), ...look }, colors);
};
const bar = (paint) => (canvas) => {
  const pen = canvas.getContext("2d");
  pen.setTransform(2, 0, 0, 2, 0, 0);
  pen.clearRect(0, 0, 14, 14);
  paint(pen);
};
const block = (fill, top, height) => bar((pen) => {
  pen.fillStyle = fill();
  pen.fillRect(0, top, 14, height);
});
const hatch = (name) => bar((pen) => {
  pen.strokeStyle = variable(name);
  for (let x = -14; x < 14; x += 4) pen.stroke(new Path2D(`M${x} 13 l10 -12`));
});

export const LEGENDS = {
  "map-legend": [
    ["owned by a request; fills as tokens are computed", cell({ kind: OWNED, fill: 0.55 })],
    ["shared prefix: several owners, one copy", cell({ kind: OWNED, fill: 1, shared: true })],
    ["held for the step in flight", cell({ kind: HELD })],
    ["free, contents still cached", cell({ kind: CACHED })],
    ["free", cell({ kind: FREED })],
  ],
  "timeline-legend": [
    ["prefill chunk: many tokens of a prompt", block(() => color("legend"), 1, 12)],
    ["decode: one token", block(() => color("legend", 0.8), 5, 4)],
    ["preempted", block(() => variable("--danger"), 1, 12)],
    ["below: tokens per step (log), with prefill", block(() => variable("--accent"), 1, 12)],
    ["decodes only", block(() => variable("--dim"), 1, 12)],
  ],
  "waterfall-legend": [
    ["queued", hatch("--dim")],
    ["prefill chunk", block(() => color("legend"), 1, 12)],
    ["decode", block(() => color("legend", 0.8), 5, 4)],
    ["preempted, waits for blocks", hatch("--danger")],
  ],
};
