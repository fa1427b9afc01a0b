// The dashboard: listens to the orchestrator's events and shows them. It sends nothing.
//
// Names of models, backends and errors come from others. They are only ever set as text.

import { Chart } from "/charts.js";

const SPAN = 5 * 60 * 1000;
const SILENCE = 4000; // Events come twice a second; after this the connection is as good as lost.
const RECENT = 200; // Ended requests that are kept.
const SHOWN = 60; // Those that are on the page.
const OUTCOMES = 3000; // Ended requests that count in the tiles and the charts.

const $ = (id) => document.getElementById(id);

/** Makes an element; `attributes` with a function listen to events. */
function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((each) => each !== null && each !== undefined && each !== ""));
  return node;
}

/** Sets text where it differs, so that what a reader has selected stays. */
function put(node, text) {
  if (node.textContent !== String(text)) node.textContent = text;
}

/** Makes the children of `parent` those of `items`, in order, and keeps the nodes of items that stay. */
function sync(parent, items, key, make, update) {
  const known = new Map(Array.from(parent.children, (node) => [node.dataset.key, node]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    let node = known.get(name);
    if (node) known.delete(name);
    else {
      node = make(item);
      node.dataset.key = name;
    }
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
    update(node, item);
  }
  for (const node of known.values()) node.remove();
}

// How things are written.

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.0995) return `${(seconds * 1000).toFixed(seconds < 0.00995 ? 1 : 0)} ms`;
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 9.995) return `${seconds.toFixed(2)} s`;
  if (seconds < 99.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${String(Math.floor(seconds % 60)).padStart(2, "0")} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${String(Math.floor((seconds % 3600) / 60)).padStart(2, "0")} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

/** Whole seconds and more, for what goes on and would flicker. */
function lasting(seconds) {
  return seconds < 60 ? `${Math.max(0, Math.floor(seconds))} s` : duration(seconds);
}

function count(number) {
  if (number < 10000) return String(number);
  const [size, unit] = number < 1e6 ? [1e3, "k"] : number < 1e9 ? [1e6, "M"] : [1e9, "G"];
  return `${(number / size).toPrecision(3)} ${unit}`;
}

function rate(number) {
  if (!number) return "–";
  return number < 10 ? number.toFixed(1) : count(Math.round(number));
}

function bytes(number) {
  if (number < 2 ** 20) return `${Math.round(number / 2 ** 10)} KiB`;
  return number < 2 ** 30 ? `${Math.round(number / 2 ** 20)} MiB` : `${(number / 2 ** 30).toFixed(1)} GiB`;
}

function axisSeconds(seconds) {
  return seconds < 1 ? `${Number((seconds * 1000).toPrecision(2))} ms` : `${seconds} s`;
}

function clock(ms) {
  return new Date(ms).toLocaleTimeString([], { hour12: false });
}

function median(values) {
  if (!values.length) return null;
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[Math.floor(sorted.length / 2)];
}

const STATES = {
  active: ["good", "Active"],
  draining: ["warn", "Draining"],
  ejected: ["bad", "Ejected"],
  unreachable: ["bad", "Unreachable"],
};
const PHASES = {
  queued: ["warn", "Queued"],
  routing: ["quiet", "Routing"],
  loading: ["warn", "Loading"],
  prefill: ["water", "Prefill"],
  decode: ["good", "Writing"],
  succeeded: ["good", "Done"],
  failed: ["bad", "Failed"],
  cancelled: ["quiet", "Cancelled"],
};
const MODELS = {
  active: ["good", "in memory"],
  loading: ["warn", "loading"],
  unloading: ["warn", "unloading"],
  failed: ["bad", "failed"],
  quarantined: ["bad", "quarantined"],
  available: ["quiet", "on disk"],
};

const tone = (table, name) => table[name] ?? ["quiet", name];

function pill(node, [colour, text]) {
  const wanted = `pill ${colour}`;
  if (node.className !== wanted) node.className = wanted;
  put(node, text);
}

// What is known.

const state = {};

function reset(told) {
  Object.assign(state, {
    now: told.t,
    traceUrl: told.trace_url,
    backends: new Map(),
    samples: [],
    recent: [],
    outcomes: [],
    active: [],
    queue: told.queue,
    totals: told.totals,
  });
}

function take(told) {
  state.now = told.t;
  state.queue = told.queue;
  state.totals = told.totals;
  state.active = told.active;
  for (const backend of told.backends) state.backends.set(backend.name, backend);
  state.names = told.names;
  state.samples.push(...told.samples);
  const begin = state.now - SPAN - 5000;
  while (state.samples.length && state.samples[0][0] < begin) state.samples.shift();
  for (const request of told.ended) {
    request.ended = request.created + request.elapsed * 1000;
    request.key = `${request.created}/${request.id}`;
    state.recent.unshift(request);
    state.outcomes.push({
      ended: request.ended,
      began: request.created + (request.first ?? 0) * 1000,
      // A cached reply tells nothing of how soon a backend begins.
      first: request.cached ? null : request.first,
      failed: request.phase === "failed",
      backend: request.backend,
      model: request.served || request.model,
    });
  }
  state.recent.length = Math.min(state.recent.length, RECENT);
  state.outcomes = state.outcomes.filter((each) => each.ended > state.now - SPAN).slice(-OUTCOMES);
}

const series = (backend) => Math.max(0, state.names.indexOf(backend)) % 6;

// What is shown.

const charts = {
  first: new Chart($("chart-first"), { label: "Time to first token", span: SPAN, format: axisSeconds, log: true, none: "No reply has begun in the last five minutes" }),
  rate: new Chart($("chart-rate"), { label: "Tokens a second", span: SPAN, format: (value) => count(Number(value.toPrecision(3))), none: "Collecting" }),
  queue: new Chart($("chart-queue"), { label: "Requests running and waiting", span: SPAN, format: (value) => String(Math.round(value * 10) / 10), whole: true, none: "Collecting" }),
};

function legend(node, names) {
  sync(node, names, ([name]) => name, ([name, index]) => h("span", {}, h("i", { class: `s${index}` }), name), () => {});
}

function showTiles() {
  const { queue, totals } = state;
  const speed = smooth(state.samples).at(-1)?.[1] ?? 0;
  put($("tile-rate"), speed ? rate(speed) : "0");
  put($("tile-rate-more"), `${count(totals.tokens)} in all`);
  put($("tile-running"), queue.running);
  if (queue.permits) $("tile-running").append(h("small", {}, ` of ${count(queue.permits)}`));
  const backends = [...state.backends.values()];
  const up = backends.filter((each) => each.state === "active").length;
  put($("tile-running-more"), `${up} of ${backends.length} backends up`);
  const waiting = queue.interactive + queue.normal + queue.batch;
  put($("tile-waiting"), waiting);
  const kinds = [["interactive", queue.interactive], ["normal", queue.normal], ["batch", queue.batch]];
  const parts = kinds.filter(([, number]) => number).map(([name, number]) => `${number} ${name}`);
  if (queue.oldest !== null) parts.push(`oldest ${duration(queue.oldest)}`);
  else if (queue.expected !== null) parts.push(queue.expected < 0.05 ? "no wait expected" : `${duration(queue.expected)} expected`);
  put($("tile-waiting-more"), parts.join(" · "));
  const lately = state.outcomes;
  const firsts = lately.filter((each) => each.first !== null).map((each) => each.first);
  put($("tile-first"), duration(median(firsts)));
  const slow = [...firsts].sort((one, other) => one - other)[Math.min(firsts.length - 1, Math.floor(firsts.length * 0.95))];
  put($("tile-first-more"), firsts.length ? `95 % within ${duration(slow)}` : "in the last five minutes");
  const failed = lately.filter((each) => each.failed).length;
  put($("tile-failed"), failed);
  $("tile-failed").className = failed ? "figure bad" : "figure";
  put($("tile-failed-more"), `of ${lately.length} lately · ${count(totals.failed)} of ${count(totals.requests)} in all`);
  const said = [
    ["requests", totals.requests], ["refused", totals.refused], ["from the cache", totals.hits], ["joined another", totals.coalesced],
    ["tried again", totals.retries], ["hedged", totals.hedges], ["continued elsewhere", totals.continuations],
  ];
  put($("totals"), `Since the start: ${said.map(([name, number]) => `${count(number)} ${name}`).join(" · ")}`);
}

/** Returns tokens a second, each the mean of three seconds: deltas come in bursts. */
function smooth(samples) {
  return samples.map(([ms], index) => {
    const near = samples.slice(Math.max(0, index - 2), index + 1);
    return [ms, near.reduce((sum, [, tokens]) => sum + tokens, 0) / near.length];
  });
}

function showCharts() {
  const { now, samples } = state;
  const begun = state.outcomes.filter((each) => each.first !== null);
  const marks = begun.map((each) => ({
    ms: each.began,
    value: each.first,
    series: series(each.backend),
    text: `${duration(each.first)} · ${each.model} on ${each.backend}`,
  }));
  const middle = duration(median(marks.map((each) => each.value)));
  charts.first.show(now, { marks, summary: marks.length ? `${marks.length} replies, median ${middle}` : "No replies" });
  const seen = [...new Set(begun.map((each) => each.backend))];
  legend($("legend-first"), seen.sort().map((name) => [name, series(name)]));
  const last = samples.at(-1) ?? [0, 0, 0, 0];
  charts.rate.show(now, {
    lines: [{ name: "tokens/s", series: 0, points: smooth(samples) }],
    summary: `Now ${rate(smooth(samples).at(-1)?.[1] ?? 0)}`,
  });
  charts.queue.show(now, {
    lines: [
      { name: "running", series: 0, points: samples.map(([ms, , , running]) => [ms, running]) },
      { name: "waiting", series: 1, points: samples.map(([ms, , waiting]) => [ms, waiting]) },
    ],
    summary: `Now ${last[3]} running and ${last[2]} waiting`,
  });
  legend($("legend-queue"), [["running", 0], ["waiting", 1]]);
}

const opened = new Set(); // backends whose whole list of models is shown

function makeBackend(backend) {
  const card = h("article", { class: "backend" });
  const part = (tag, attributes) => {
    const node = h(tag, attributes);
    card.append(node);
    return node;
  };
  const header = part("header", {});
  const name = h("h3"), framework = h("span", { class: "framework" }), mark = h("span", { class: "pill" });
  header.append(name, framework, mark);
  const why = part("p", { class: "why" });
  const list = part("dl", { class: "figures" });
  const figure = (title) => {
    const value = h("dd");
    list.append(h("div", {}, h("dt", {}, title), value));
    return value;
  };
  const nodes = {
    name, framework, mark, why,
    active: figure("Active"), queued: figure("Queued"), first: figure("First token"), rate: figure("Tokens/s"),
    share: part("div", { class: "meter" }), memory: part("div", { class: "meter" }),
    breakers: part("ul", { class: "breakers" }), models: part("ul", { class: "models" }),
  };
  card.nodes = nodes;
  return card;
}

/** A bar with a sentence above it; parts are fractions of the whole. */
function meter(node, text, parts) {
  node.hidden = !text;
  if (!text) return;
  if (!node.firstChild) node.append(h("span"), h("div", { class: "track", "aria-hidden": "true" }));
  put(node.firstChild, text);
  const track = node.lastChild;
  while (track.children.length < parts.length) track.append(h("span"));
  parts.forEach((part, index) => {
    track.children[index].style.width = `${Math.max(0, Math.min(1, part)) * 100}%`;
  });
}

function memoryOf({ memory }) {
  if (!memory) return ["", []];
  const whole = memory.limit || memory.total;
  if (!whole) return [memory.used ? `${bytes(memory.used)} in memory` : "", []];
  const kept = memory.reserved ? `, ${bytes(memory.reserved)} set aside` : "";
  return [`${bytes(memory.used)} of ${bytes(whole)} for models${kept}`, [memory.used / whole, memory.reserved / whole]];
}

function showBackend(card, backend) {
  const { nodes } = card;
  const [colour, text] = tone(STATES, backend.state);
  card.className = `backend ${colour}`;
  put(nodes.name, backend.name);
  put(nodes.framework, [backend.framework === backend.name ? "" : backend.framework, backend.address].filter(Boolean).join(" · "));
  nodes.framework.title = nodes.framework.textContent;
  const lasts = (state.now - backend.since) / 1000;
  pill(nodes.mark, [colour, backend.state === "active" ? text : `${text} for ${lasting(lasts)}`]);
  nodes.why.hidden = !backend.detail;
  put(nodes.why, backend.detail);
  put(nodes.active, backend.slots ? `${backend.active} of ${backend.slots}` : backend.active);
  put(nodes.queued, backend.queued);
  put(nodes.first, duration(backend.first));
  put(nodes.rate, rate(backend.rate));
  const isSlow = backend.share > 0 && backend.share < 1 && backend.state !== "unreachable";
  meter(nodes.share, isSlow ? `Returns slowly: ${Math.round(backend.share * 100)} % of its share of requests` : "", [backend.share]);
  meter(nodes.memory, ...memoryOf(backend));
  nodes.breakers.hidden = !backend.breakers.length;
  sync(nodes.breakers, backend.breakers, (each) => each.model, () => h("li"), (node, each) => {
    const next = each.remaining === null ? "" : `, next try in ${lasting(Math.ceil(each.remaining))}`;
    put(node, `Breaker ${each.model ? `of ${each.model} ` : ""}is ${each.state.replace("_", "-")}: ${each.reason || "calls failed"}${next}`);
  });
  showModels(nodes.models, backend);
}

function showModels(list, backend) {
  const isOpen = opened.has(backend.name);
  const loaded = backend.models.filter((each) => each.state !== "available").length;
  const shown = isOpen ? backend.models : backend.models.slice(0, Math.max(3, Math.min(6, loaded)));
  const items = shown.map((model) => ({ key: `model ${model.id}`, model }));
  const hidden = backend.model_count - shown.length;
  if (!backend.model_count) items.push({ key: "none" });
  if (hidden > 0 || isOpen) items.push({ key: "more" });
  sync(list, items, (each) => each.key, ({ model, key }) => {
    if (model) return h("li", {}, h("span", { class: "name" }), h("span", { class: "state" }));
    if (key === "none") return h("li", { class: "more" });
    return h("li", {}, h("button", { type: "button", class: "link", click: () => {
      if (!opened.delete(backend.name)) opened.add(backend.name);
      render();
    } }));
  }, (node, { model, key }) => {
    if (key === "none") put(node, "No models");
    else if (key === "more") {
      const left = backend.model_count - backend.models.length;
      put(node.firstChild, isOpen ? `Show fewer${left > 0 ? ` (${left} more are not told)` : ""}` : `${hidden} more`);
      node.firstChild.setAttribute("aria-expanded", String(isOpen));
    } else {
      const [colour, text] = tone(MODELS, model.state === "unspecified" ? "" : model.state);
      node.className = colour;
      put(node.firstChild, model.id);
      const more = [model.size, model.quantization, model.context ? `${count(model.context)} tokens of context` : "", model.detail];
      node.title = [model.id, ...more].filter(Boolean).join(" · ");
      const size = model.memory && model.state === "active" ? bytes(model.memory) : "";
      put(node.lastChild, [model.pinned ? "pinned" : "", size, text].filter(Boolean).join(" · "));
    }
  });
}

const cells = (row, number) => {
  for (let index = 0; index < number; index++) row.append(h("td"));
  return row;
};

function nameModel(cell, request) {
  const served = request.served && request.served !== request.model ? request.served : "";
  const key = `${request.model}\n${served}`;
  if (cell.dataset.name === key) return;
  cell.dataset.name = key;
  cell.className = "name";
  cell.title = served ? `${request.model}, served as ${served}` : request.model;
  cell.replaceChildren(request.model, ...(served ? [h("span", { class: "also" }, `as ${served}`)] : []));
}

function showLive() {
  const { active } = state;
  const running = state.queue.running + state.queue.interactive + state.queue.normal + state.queue.batch;
  put($("live-count"), active.length ? (running > active.length ? `${active.length} of ${running}` : active.length) : "");
  $("live-empty").hidden = active.length > 0;
  const fastest = Math.max(1, ...active.map((each) => each.rate));
  sync($("live"), active, (each) => `${each.created}/${each.id}`, () => {
    const row = cells(h("tr"), 9);
    row.children[0].append(h("span"));
    for (const index of [4, 5, 6, 7, 8]) row.children[index].className = "num";
    row.children[7].append(h("span"), h("span", { class: "track bars", "aria-hidden": "true" }, h("span")));
    return row;
  }, (row, request) => {
    const cell = row.children;
    pill(cell[0].firstChild, tone(PHASES, request.phase));
    nameModel(cell[1], request);
    put(cell[2], request.backend || "–");
    put(cell[3], request.class || request.op);
    put(cell[4], duration(request.elapsed));
    put(cell[5], duration(request.first));
    put(cell[6], request.out || "–");
    put(cell[7].firstChild, rate(request.rate));
    cell[7].lastChild.firstChild.style.width = `${(request.rate / fastest) * 100}%`;
    put(cell[8], request.attempts || "–");
  });
}

// Recent requests, and why each went where it did.

const recent = { filter: "all", open: new Set(), held: null };

const FILTERS = {
  all: () => true,
  failed: (each) => each.phase === "failed",
  moved: (each) => each.attempts > 1 || each.continued > 0,
};

function toggle(key) {
  if (!recent.open.delete(key)) recent.open.add(key);
  // While a reader looks at a request, it does not move away under their eyes.
  if (!recent.open.size) recent.held = null;
  else if (recent.held === null) recent.held = state.recent.filter(FILTERS[recent.filter]).slice(0, SHOWN);
  render();
}

function showRecent() {
  const current = state.recent.filter(FILTERS[recent.filter]);
  const shown = recent.held ?? current.slice(0, SHOWN);
  const newer = recent.held === null ? 0 : current.findIndex((each) => each.key === shown[0]?.key);
  $("newer").hidden = newer === 0;
  put($("newer"), newer > 0 ? `Show ${newer} newer` : "Show newer");
  $("recent-empty").hidden = shown.length > 0;
  put($("recent-empty"), state.recent.length ? "None of the recent requests." : "No request has ended yet.");
  const rows = shown.flatMap((request) => (recent.open.has(request.key) ? [{ request }, { request, isDecision: true }] : [{ request }]));
  sync($("recent"), rows, ({ request, isDecision }) => (isDecision ? "why " : "") + request.key,
    ({ request, isDecision }) => (isDecision ? makeDecision(request) : makeEntry(request)),
    (row, { request, isDecision }) => {
      if (isDecision) return;
      const isOpen = recent.open.has(request.key);
      row.classList.toggle("open", isOpen);
      row.firstChild.firstChild.setAttribute("aria-expanded", String(isOpen));
    });
}

function makeEntry(request) {
  const row = cells(h("tr", { class: "entry", click: (event) => {
    if (!event.target.closest("a")) toggle(request.key);
  } }), 12);
  const cell = row.children;
  cell[0].append(h("button", { type: "button", class: "why-button", "aria-label": `Why: the decision behind the request for ${request.model}` }));
  put(cell[1], clock(request.ended));
  const mark = h("span");
  const [colour, text] = tone(PHASES, request.phase);
  pill(mark, [colour, request.error || text]);
  cell[2].append(mark);
  if (request.cached) cell[2].append(h("span", { class: "tag" }, "cached"));
  if (request.continued) cell[2].append(h("span", { class: "tag" }, "continued"));
  nameModel(cell[3], request);
  put(cell[4], request.backend || "–");
  put(cell[5], request.class || request.op);
  put(cell[6], duration(request.first));
  put(cell[7], duration(request.elapsed));
  put(cell[8], request.out ? `${request.in || "?"} → ${request.out}` : "–");
  put(cell[9], rate(request.rate));
  put(cell[10], request.attempts || "–");
  for (const index of [6, 7, 8, 9, 10]) cell[index].className = "num";
  if (request.trace && state.traceUrl) {
    const url = state.traceUrl.replaceAll("{trace_id}", encodeURIComponent(request.trace));
    cell[11].append(h("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, "trace"));
  } else put(cell[11], "–");
  return row;
}

function makeDecision(request) {
  const box = h("td", { colspan: "12" });
  const fact = (name, value) => (value ? h("span", {}, `${name} `, h("b", {}, value)) : null);
  box.append(h("p", { class: "facts" },
    fact("Request", request.id), fact("came", clock(request.created)), fact("as", request.op),
    fact("taken for", request.class), fact("served as", request.served), fact("trace", request.trace)));
  if (!request.candidates.length) {
    const text = request.cached ? "It was answered without asking a backend: from the cache, or with another request's reply."
      : request.phase === "failed" ? "It ended before a backend was chosen." : "The decision behind it was not told.";
    box.append(h("p", {}, text));
  } else {
    box.append(h("h3", {}, request.attempts > 1 ? `The last of ${request.attempts} decisions` : "The decision behind it"));
    const list = h("div", { class: "candidates" });
    for (const candidate of request.candidates) list.append(makeCandidate(candidate, request));
    box.append(list);
  }
  return h("tr", { class: "decision" }, box);
}

function makeCandidate(candidate, request) {
  const isChosen = !candidate.refused && candidate.backend === request.backend;
  const [colour, verdict] = candidate.refused ? ["bad", `refused: ${candidate.refused}`] : isChosen ? ["good", "chosen"] : ["quiet", "passed over"];
  const total = candidate.refused ? "" : ` · score ${candidate.total.toFixed(2)}`;
  const who = h("div", { class: "who" }, candidate.backend,
    candidate.model ? h("small", {}, candidate.model) : null, h("div", { class: "verdict" }, verdict + total));
  if (candidate.refused) return h("div", { class: `candidate ${colour}` }, who, h("p", { class: "reason" }, candidate.detail));
  const scores = h("div", { class: "scores" });
  for (const [name, value] of Object.entries(candidate.scores)) {
    const fill = h("span");
    fill.style.width = `${Math.max(0, Math.min(1, value)) * 100}%`;
    scores.append(h("div", { class: "score" }, h("span", {}, name), h("div", { class: "track", "aria-hidden": "true" }, fill), h("span", {}, value.toFixed(2))));
  }
  return h("div", { class: `candidate ${colour}` }, who, scores);
}

for (const button of document.querySelectorAll("[data-filter]")) {
  button.addEventListener("click", () => {
    recent.filter = button.dataset.filter;
    recent.held = null;
    recent.open.clear();
    for (const each of document.querySelectorAll("[data-filter]")) each.setAttribute("aria-pressed", String(each === button));
    render();
  });
}

$("newer").addEventListener("click", () => {
  recent.held = null;
  recent.open.clear();
  render();
});

function render() {
  if (!state.now) return;
  showTiles();
  showCharts();
  sync($("backends"), state.names.filter((name) => state.backends.has(name)), (name) => name, makeBackend,
    (card, name) => showBackend(card, state.backends.get(name)));
  showLive();
  showRecent();
}

// The connection.

const link = { source: null, heard: 0, lostAt: 0, retry: 0 };

function say(kind, text) {
  document.body.dataset.link = kind;
  document.title = kind === "lost" ? "Lost – Forebay" : "Forebay";
  put($("link-text"), text);
  $("lost").hidden = kind !== "lost";
}

function lose() {
  link.source?.close();
  link.source = null;
  if (!link.lostAt) link.lostAt = Date.now();
  say("lost", "Lost");
  clearTimeout(link.retry);
  link.retry = setTimeout(connect, 1000);
}

function connect() {
  const source = (link.source = new EventSource("/events"));
  link.heard = Date.now();
  const hear = (event, isFirst) => {
    if (source !== link.source) return;
    link.heard = Date.now();
    link.lostAt = 0;
    const told = JSON.parse(event.data);
    if (isFirst) reset(told);
    take(told);
    say("live", "Live");
    put($("since"), `as of ${clock(told.t)}`);
    render();
  };
  source.addEventListener("hello", (event) => hear(event, true));
  source.addEventListener("tick", (event) => hear(event, false));
  source.addEventListener("error", () => source === link.source && lose());
}

setInterval(() => {
  if (link.source && Date.now() - link.heard > SILENCE) lose();
  if (link.lostAt) put($("lost-text"), `Trying again, for ${lasting((Date.now() - link.lostAt) / 1000)}. What is below was true then.`);
}, 500);

connect();
