// The engine's state as the records of /debug/events tell it (docs/serving.md), without anything of the page.
//
// Replay holds the state at one step: who owns which block. Player keeps the last steps, so that any of them can be
// shown again. Journal writes down what happened to each request, and says why it took as long as it did.

export const NEVER = 0, OWNED = 1, HELD = 2, CACHED = 3, FREED = 4;

/** Block map and running sequences at one step. */
export class Replay {
  constructor(snapshot) {
    this.blockSize = snapshot.block_size;
    this.state = new Uint8Array(snapshot.num_blocks);
    this.holders = new Uint16Array(snapshot.num_blocks);
    this.owner = new Array(snapshot.num_blocks).fill(null); // the sequence that holds or last held a block
    this.since = new Float64Array(snapshot.num_blocks);
    this.rows = new Map(); // row -> sequence
    this.leaving = []; // blocks that wait for a step in flight
    this.owned = 0;
    this.used = snapshot.used;
    this.waiting = snapshot.waiting;
    this.numWaiting = snapshot.waiting.length;
    this.at = snapshot.at;
    this.step = null;
    for (const [row, id, index, prompt, tokens, cached, blocks] of snapshot.sequences) {
      this.#join(row, id, index, prompt, cached);
      this.rows.get(row).computed = tokens;
      this.#take(row, blocks);
    }
  }

  clone() {
    const copy = Object.assign(new Replay({ num_blocks: 0, sequences: [], waiting: [] }), this);
    for (const name of ["state", "holders", "owner", "since", "leaving"]) copy[name] = this[name].slice();
    const twins = new Map([...this.rows.values()].map((seq) => [seq, { ...seq, blocks: seq.blocks.slice() }]));
    copy.owner = this.owner.map((seq) => twins.get(seq) ?? seq);
    copy.rows = new Map([...this.rows].map(([row, seq]) => [row, twins.get(seq)]));
    return copy;
  }

  apply(record) {
    this.at = record.at;
    this.used = record.used;
    for (const [row] of record.left) this.#leave(row);
    if (record.type === "step") {
      this.step = record;
      for (const [row, id, index, prompt, cached] of record.joined) this.#join(row, id, index, prompt, cached);
      for (const [row, blocks] of record.blocks) this.#take(row, blocks);
      for (const [row, start, tokens] of record.prefill) this.#compute(row, start + tokens);
      for (const row of record.decode) this.#compute(row, (this.rows.get(row)?.computed ?? 0) + 1);
      this.waiting = record.waiting;
      this.numWaiting = record.num_waiting;
    }
    while (this.leaving.length && this.owned + this.leaving.length > record.used) this.#letGo(this.leaving.shift());
  }

  /** How full a block is, from 0 to 1. */
  fill(block) {
    const seq = this.owner[block];
    if (this.state[block] !== OWNED || !seq) return 1;
    return Math.max(0, Math.min(1, (seq.computed - seq.blocks.indexOf(block) * this.blockSize) / this.blockSize));
  }

  #join(row, id, index, prompt, cached) {
    this.rows.set(row, { key: `${id}/${index}`, id, index, row, prompt, cached, computed: cached, blocks: [] });
  }

  #take(row, blocks) {
    const seq = this.rows.get(row);
    if (!seq) return;
    for (const block of blocks) {
      seq.blocks.push(block);
      const at = this.leaving.findIndex((gone) => gone.block === block);
      if (at >= 0) this.leaving.splice(at, 1);
      if (this.holders[block]++ === 0) {
        this.owned++;
        this.state[block] = OWNED;
        this.owner[block] = seq;
        this.since[block] = this.at;
      }
    }
  }

  #compute(row, computed) {
    const seq = this.rows.get(row);
    if (seq) seq.computed = computed;
  }

  #leave(row) {
    const seq = this.rows.get(row);
    if (!seq) return;
    this.rows.delete(row);
    const heir = (block) => [...this.rows.values()].find((other) => other.blocks.includes(block));
    seq.blocks.forEach((block, i) => {
      if (--this.holders[block] > 0) {
        if (this.owner[block] === seq) this.owner[block] = heir(block) ?? seq;
        return;
      }
      this.owned--;
      this.state[block] = HELD;
      this.since[block] = this.at;
      this.leaving.push({ block, full: (i + 1) * this.blockSize <= seq.computed });
    });
  }

  #letGo({ block, full }) {
    this.state[block] = full ? CACHED : FREED;
  }
}

/** The last steps, any of which can be looked at. */
export class Player {
  constructor(snapshot, length = 300) {
    this.length = length;
    this.begun = snapshot.step; // which the snapshot holds already
    this.base = new Replay(snapshot); // before the oldest record kept
    this.live = new Replay(snapshot);
    this.records = []; // steps, and what left without one
    this.steps = [];
  }

  add(record) {
    this.live.apply(record);
    this.records.push(record);
    if (record.type !== "step") return;
    record.lanes = Math.max(0, ...this.live.rows.keys()) + 1;
    record.rows = new Map([...this.live.rows].map(([row, seq]) => [row, seq.key]));
    this.steps.push(record);
    if (this.steps.length > this.length) {
      const oldest = this.steps.shift();
      for (let gone = null; gone !== oldest; ) this.base.apply((gone = this.records.shift()));
    }
  }

  /** A copy, whose past does not move on. */
  freeze() {
    const copy = Object.assign(Object.create(Player.prototype), this);
    copy.base = this.base.clone();
    copy.live = this.live.clone();
    copy.records = this.records.slice();
    copy.steps = this.steps.slice();
    return copy;
  }

  /** The state at the step in place `i` of `steps`. */
  at(i) {
    const state = this.base.clone();
    for (const record of this.records) {
      state.apply(record);
      if (record === this.steps[i]) break;
    }
    return state;
  }
}

const MAX_REQUESTS = 2000;

/** What happened to each request, over more time than the steps are kept. */
export class Journal {
  constructor(length = 60) {
    this.length = length; // requests that have ended and are kept
    this.at = 0; // of the last record
    this.all = new Map(); // key -> request
    this.rows = new Map(); // row -> request
    this.company = 0;
    this.prompts = 0;
    this.cached = 0;
  }

  snapshot(record) {
    this.rows.clear();
    const there = new Set(record.waiting.map(([id]) => `${id}/0`));
    for (const [, id, index] of record.sequences) there.add(`${id}/${index}`);
    for (const one of this.all.values()) {
      if (one.end) continue;
      one.unseen = true; // since the last record
      if (there.has(one.key)) continue;
      if (one.began === null) one.spans.push({ kind: "queued", from: one.begin, to: this.at });
      one.end = one.spans.at(-1)?.to ?? one.begin;
    }
    for (const [row, id, index, prompt, tokens, cached] of record.sequences) {
      this.#join(record.at, row, id, index, prompt, cached);
      const one = this.rows.get(row);
      one.length = tokens;
      if (one.unseen) one.tokens = tokens - prompt;
    }
    this.#wait(record);
    this.at = record.at;
  }

  /** Note a record. Returns the number of tokens that were generated in it. */
  add(record) {
    let generated = 0;
    this.at = record.at;
    this.company = this.rows.size; // of those that wait, until this record
    for (const [row, why] of record.left) this.#leave(record.at, row, why);
    if (record.type !== "step") return generated;
    for (const [row, id, index, prompt, cached] of record.joined) {
      const again = this.all.has(`${id}/${index}`) && this.all.get(`${id}/${index}`).chunks > 0;
      this.#join(record.at, row, id, index, prompt, cached);
      if (again) continue;
      this.prompts += prompt;
      this.cached += cached;
    }
    const took = record.ms.reduce((sum, ms) => sum + ms, 0) / 1000;
    const end = record.at + took;
    const beside = record.prefill.reduce((sum, [, , tokens]) => sum + tokens, 0);
    for (const [row, start, tokens] of record.prefill) {
      const one = this.rows.get(row);
      if (!one) continue;
      one.chunks++;
      one.spans.push({ kind: "prefill", from: record.at, to: end, tokens, start });
      if (start + tokens >= one.length) generated++, one.tokens++, one.length++, (one.first ??= end);
    }
    for (const row of record.decode) {
      const one = this.rows.get(row);
      if (!one) continue;
      generated++;
      one.tokens++;
      one.length++;
      one.first ??= end;
      const last = one.spans.at(-1);
      if (last?.kind === "decode") (last.to = end), last.tokens++;
      else one.spans.push({ kind: "decode", from: last?.kind === "prefill" ? last.to : record.at, to: end, tokens: 1 });
      const where = beside ? one.mixed : one.pure;
      where.steps++;
      where.seconds += took;
    }
    this.#wait(record);
    return generated;
  }

  /** Requests that wait for the first time; those that do not any more and never ran were given up. */
  #wait(record) {
    const ids = new Set([...this.all.values()].map((one) => one.id));
    for (const [id, prompt, seconds] of record.waiting) {
      if (!ids.has(id)) this.#open(`${id}/0`, { id, index: 0, prompt, begin: record.at - seconds });
    }
    const waiting = new Set(record.waiting.map(([id]) => id));
    for (const one of this.all.values()) {
      if (one.began === null && !one.end && waiting.size < 64 && !waiting.has(one.id)) {
        one.spans.push({ kind: "queued", from: one.begin, to: record.at });
        one.end = record.at;
      }
    }
  }

  #open(key, fields) {
    const one = {
      key, unseen: false, length: fields.prompt, cached: 0, tokens: 0, chunks: 0, preemptions: 0, spans: [], mixed: { steps: 0, seconds: 0 },
      pure: { steps: 0, seconds: 0 }, began: null, first: null, end: null, company: 0, ...fields,
    };
    this.all.set(key, one);
    const ended = [...this.all.values()].filter((other) => other.end);
    if (ended.length > this.length || this.all.size > MAX_REQUESTS) this.all.delete((ended[0] ?? [...this.all.values()][0]).key);
    return one;
  }

  #join(at, row, id, index, prompt, cached) {
    const key = `${id}/${index}`;
    const twin = this.all.get(`${id}/0`);
    const one = this.all.get(key) ?? this.#open(key, { id, index, prompt, begin: twin?.begin ?? at });
    if (one.began === null) {
      one.began = at;
      one.cached = cached;
      one.company = this.company;
      if (at - one.begin > 0.0005) one.spans.push({ kind: "queued", from: one.begin, to: at });
    } else if (one.left) {
      one.spans.push({ kind: "preempted", from: one.left, to: at });
    }
    one.left = one.end = null;
    this.rows.set(row, one);
  }

  #leave(at, row, why) {
    const one = this.rows.get(row);
    if (!one) return;
    this.rows.delete(row);
    one.left = at;
    if (why === "preempted") one.preemptions++;
    else one.end = one.spans.at(-1)?.to ?? at;
  }
}

const time = (seconds) => (seconds < 1 ? `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${seconds.toFixed(2)} s`);

/** The spans of a request, with the wait that is still going on. */
export function spansOf(one, now) {
  if (one.end) return one.spans;
  if (one.began === null) return [{ kind: "queued", from: one.begin, to: now }];
  return one.left ? [...one.spans, { kind: "preempted", from: one.left, to: now }] : one.spans;
}

/** Why a request took as long as it did: the largest cause first. */
export function verdict(one, now) {
  const sum = (kind) => spansOf(one, now).filter((span) => span.kind === kind).reduce((all, { from, to }) => all + to - from, 0);
  const total = (one.end ?? Math.max(now, one.spans.at(-1)?.to ?? now)) - one.begin;
  const unseen = one.unseen ? ["a part of it was not seen"] : [];
  if (one.began === null && one.end && one.unseen) return `queued for ${time(total)} · its rest was not seen`;
  if (one.began === null && one.end) return `given up after ${time(total)} in the queue`;
  if (one.began === null) return `waiting for ${time(total)}: no free place or not enough free blocks`;
  const { mixed, pure } = one;
  const each = pure.steps ? pure.seconds / pure.steps : 0;
  const lost = each ? Math.max(0, mixed.seconds - mixed.steps * each) : 0;
  const [queued, prefill, decode, preempted] = ["queued", "prefill", "decode", "preempted"].map(sum);
  const cached = one.cached ? `, ${one.cached} from the cache` : "";
  const causes = [
    [queued, `queued ${time(queued)} while ${one.company} other${one.company === 1 ? "" : "s"} ran`],
    [prefill, `prefill ${time(prefill)}: ${one.prompt} prompt tokens in ${one.chunks} chunk${one.chunks === 1 ? "" : "s"}${cached}`],
    [decode - lost, `decode ${time(decode)}: ${one.tokens} tokens${one.tokens > 1 ? `, ${time(decode / (one.tokens - 1 || 1))} each` : ""}`],
    [lost, `${time(lost)} lost to prefills of others in ${mixed.steps} steps`],
    [preempted, `preempted ${one.preemptions}×, ${time(preempted)}: the KV cache was full`],
  ];
  const told = causes.filter(([seconds]) => seconds > total * 0.02).sort((a, b) => b[0] - a[0]).map(([, text]) => text);
  return [`${time(total)}${one.end ? "" : " so far"}`, ...told, ...unseen].join(" · ");
}
