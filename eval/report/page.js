"use strict";
// Browses the trajectories of a report. Whatever comes from a run is set as text, never parsed as HTML.
(() => {
const ROW = 50; // pixels of a result; page.css has the same
const KINDS = { p: "prompt", a: "action", o: "observation" };
const GROUPS = { correct: "✓", wrong: "✗", unfinished: "…", ungraded: "?", fault: "!" };
const HINTS = {
  correct: "the answer is right",
  wrong: "finished, and not right",
  unfinished: "cut short by a limit",
  ungraded: "the answer could not be graded",
  fault: "engine or interpreter failed",
};
const byId = (id) => document.getElementById(id);

/** An element with attributes and children; a string child becomes text. */
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  for (const child of children.flat(Infinity)) if (child != null && child !== false) node.append(child);
  return node;
}

/** Model output with characters that hide or reorder text made visible. */
const visible = (text) =>
  text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g,
    (c) => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));

// ---- packed data ----------------------------------------------------------------------------------------------

const unpacked = new Map();
function unpack(id) {
  if (!unpacked.has(id)) unpacked.set(id, unpackNow(id));
  return unpacked.get(id);
}
async function unpackNow(id) {
  const packed = byId(id).textContent;
  const bytes = Uint8Array.fromBase64
    ? Uint8Array.fromBase64(packed)
    : Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

let index, rows, total;
const chunkOf = (row) => Math.floor(row / index.chunk);
const textOf = async (row) => (await unpack(`text-${chunkOf(row)}`))[row % index.chunk];
const tokensOf = async (row) => (await unpack(`tokens-${chunkOf(row)}`))[row % index.chunk];
const problemOf = (row) => {
  const [id, question, answer, level, subject] = index.problems[rows.problem[row]];
  return { id, question, answer, level, subject };
};
const setOf = (row) => index.sets[rows.set[row]];
const setName = (set) =>
  index.sets.some((s) => s.run !== set.run) && set.name !== set.run ? `${set.run}: ${set.name}` : set.name;

function groupOf(outcome) {
  if (outcome === "correct") return "correct";
  if (outcome.startsWith("truncated")) return "unfinished";
  if (outcome.startsWith("ungraded")) return "ungraded";
  return outcome.startsWith("environment") ? "fault" : "wrong";
}

// ---- what is selected: it all stands in the address, so that a link leads back to it --------------------------

const state = { tab: "overview", set: "", other: "", q: "", shown: new Set(), marks: new Set(), at: null, view: "talk" };

function readAddress() {
  const [tab, query] = location.hash.slice(1).split("?");
  const values = new URLSearchParams(query);
  state.tab = ["trajectories", "pairs"].includes(tab) ? tab : "overview";
  const second = index.sets.findIndex((set) => set.run !== index.sets[0].run && set.total);
  const compares = query === undefined && tab === "trajectories" && second > 0; // what two runs are shown together for
  state.set = values.get("set") ?? (compares ? "0" : "");
  state.other = values.get("other") ?? (compares ? String(second) : "");
  state.q = values.get("q") ?? "";
  state.shown = new Set((values.get("show") ?? "").split(",").filter((name) => name in GROUPS));
  state.marks = new Set((values.get("only") ?? "").split(",").filter((name) => name in MARKS));
  state.view = values.get("view") === "mask" ? "mask" : "talk";
  const at = values.get("at");
  const count = state.tab === "pairs" ? index.pairs.length : total;
  state.at = at !== null && /^\d+$/.test(at) && Number(at) < count ? Number(at) : null;
}

function writeAddress() {
  const values = new URLSearchParams();
  const put = (name, value) => value !== "" && value !== null && values.set(name, value);
  put("set", state.set); put("other", state.other); put("q", state.q);
  put("show", [...state.shown].join()); put("only", [...state.marks].join());
  put("at", state.at); if (state.view === "mask") put("view", "mask");
  const query = values.toString();
  history.replaceState(null, "", `#${state.tab}${query ? "?" + query : ""}`);
}

// ---- which results ---------------------------------------------------------------------------------------------

/** The same problem and sample in the set compared with, or undefined. */
const counterparts = new Map();
function counterpart(row) {
  if (state.other === "") return undefined;
  if (!counterparts.has(state.other)) {
    const found = new Map();
    for (let r = 0; r < total; r++)
      if (String(rows.set[r]) === state.other) found.set(rows.problem[r] + "/" + rows.sample[r], r);
    counterparts.set(state.other, found);
  }
  return counterparts.get(state.other).get(rows.problem[row] + "/" + rows.sample[row]);
}
const isCorrect = (row) => index.outcomes[rows.outcome[row]] === "correct";

const MARKS = {
  error: { label: "tool error", test: (row) => rows.errors[row] > 0 },
  trained: { label: "in training", test: (row) => row in index.uses },
  changed: { label: "changed", test: (row) => hasChanged(row), compares: true },
  improved: { label: "improved", test: (row) => hasChanged(row) && isCorrect(row), compares: true },
  worsened: { label: "worsened", test: (row) => hasChanged(row) && isCorrect(counterpart(row)), compares: true },
};
function hasChanged(row) {
  const other = counterpart(row);
  return other !== undefined && groups[row] !== groups[other];
}

let groups; // of every row, its outcome's
let order; // rows by set, then by problem, then by sample: they come in the order in which they were finished
let textSearch = { words: "", hits: new Set(), done: 0 };

function results() {
  return (state.tab === "pairs" ? index.pairs.map((_, number) => number) : order).filter(isWanted);
}
function isWanted(item) {
  const sides = state.tab === "pairs" ? index.pairs[item] : [item];
  if (state.set !== "" && !sides.some((row) => String(rows.set[row]) === state.set)) return false;
  if (state.tab !== "pairs") {
    if (state.shown.size && !state.shown.has(groups[item])) return false;
    for (const name of state.marks) if (!MARKS[name].test(item)) return false;
  }
  return !state.q || sides.some(matches);
}
const wordsOf = (query) => query.toLowerCase().split(/\s+/).filter(Boolean);
function matches(row) {
  const problem = problemOf(row);
  const short = `${problem.id}:${rows.sample[row]}\n${problem.question}\n${rows.answer[row] ?? ""}`.toLowerCase();
  return wordsOf(state.q).every((word) => short.includes(word)) || textSearch.hits.has(row);
}

/** Looks through the text of every trajectory, chunk by chunk, and shows what it finds on the way. */
async function searchTexts() {
  const words = wordsOf(state.q), key = words.join(" ");
  if (textSearch.words === key) return;
  const search = (textSearch = { words: key, hits: new Set(), done: 0 });
  const chunks = Math.ceil(total / index.chunk);
  for (let chunk = 0; chunk < chunks && key; chunk++) {
    const texts = await unpack(`text-${chunk}`);
    if (textSearch !== search) return;
    texts.forEach((record, place) => {
      const text = (record.lower ??= record.segments.map((s) => s[1]).join("\n").toLowerCase());
      if (words.every((word) => text.includes(word))) search.hits.add(chunk * index.chunk + place);
    });
    search.done = (chunk + 1) / chunks;
    if (chunk % 16 === 15) { showResults(false); await new Promise(requestAnimationFrame); }
  }
  search.done = 1;
  showResults(false);
}

// ---- the list: only the results in sight are in the page -------------------------------------------------------

let found = [];
function showResults(toTop = true) {
  found = results();
  byId("runway").style.height = `${found.length * ROW}px`;
  const noun = state.tab === "pairs" ? "pair" : "trajector";
  const all = state.tab === "pairs" ? index.pairs.length : total;
  const name = state.tab === "pairs" ? (all === 1 ? "pair" : "pairs") : noun + (all === 1 ? "y" : "ies");
  const searching = state.q && textSearch.done < 1 ? `, searching ${Math.round(100 * textSearch.done)} %` : "";
  byId("count").textContent = (found.length === all ? `${all.toLocaleString("en")} ${name}`
    : `${found.length.toLocaleString("en")} of ${all.toLocaleString("en")} ${name}`) + searching;
  if (toTop) byId("list").scrollTop = 0;
  paintList();
}
function paintList() {
  const list = byId("list");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(found.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
  const items = [];
  for (let place = first; place < last; place++) items.push(resultItem(found[place], place));
  byId("runway").replaceChildren(...items);
  const chosen = found.indexOf(state.at);
  if (chosen < 0) list.removeAttribute("aria-activedescendant");
  else list.setAttribute("aria-activedescendant", `result-${found[chosen]}`);
}
function resultItem(item, place) {
  const isPair = state.tab === "pairs", row = isPair ? index.pairs[item][0] : item;
  const problem = problemOf(row);
  const node = el("div", {
    class: "result", role: "option", id: `result-${item}`, "aria-selected": String(item === state.at),
    "aria-posinset": place + 1, "aria-setsize": found.length, onclick: () => open(item),
    title: visible(setName(setOf(row))),
  });
  node.style.top = `${place * ROW}px`;
  const name = isPair
    ? `${problem.id} : ${rows.sample[row]} over ${rows.sample[index.pairs[item][1]]}`
    : `${problem.id} : ${rows.sample[row]}`;
  node.append(el("span", { class: `name${isPair ? " whole" : ""}` }, visible(name)));
  if (!isPair) node.append(mark(groups[row]));
  const facts = isPair
    ? `${rows.tokens[row]} : ${rows.tokens[index.pairs[item][1]]} tokens`
    : `${plural(rows.turns[row], "turn")}, ${rows.tokens[row]} tok${rows.errors[row] ? ", error" : ""}`;
  node.append(el("span", { class: "snippet" }, visible(problem.question.slice(0, 160))));
  node.append(el("span", { class: "facts" }, facts));
  return node;
}
const mark = (group) => el("span", { class: `mark ${group}`, title: HINTS[group] }, `${GROUPS[group]} ${group}`);
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function step(by) {
  const place = found.indexOf(state.at);
  const next = place < 0 ? (by > 0 ? 0 : found.length - 1) : Math.min(found.length - 1, Math.max(0, place + by));
  if (found.length) open(found[next]);
}
function bringIntoSight() {
  const place = found.indexOf(state.at), list = byId("list");
  if (place < 0) return;
  if (place * ROW < list.scrollTop) list.scrollTop = place * ROW;
  else if ((place + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (place + 1) * ROW - list.clientHeight;
}

// ---- the filters -----------------------------------------------------------------------------------------------

function showFilters() {
  const isPairs = state.tab === "pairs";
  const counts = {};
  for (let row = 0; row < total; row++)
    if (state.set === "" || String(rows.set[row]) === state.set) counts[groups[row]] = (counts[groups[row]] ?? 0) + 1;
  const search = el("input", {
    type: "search", id: "search", placeholder: "Search problems, answers, text", "aria-label": "Search",
    autocomplete: "off", spellcheck: "false",
    oninput: (event) => { state.q = event.target.value; changed(); later(searchTexts); },
  });
  search.value = state.q;
  const parts = [search];
  if (index.sets.length > 1) parts.push(choice("set", "In", "all sets", () => true));
  if (!isPairs) {
    if (index.sets.length > 1) parts.push(choice("other", "Compared with", "nothing", (n) => String(n) !== state.set));
    parts.push(el("div", { class: "chips", role: "group", "aria-label": "Show" },
      Object.keys(GROUPS).filter((g) => counts[g] || state.shown.has(g)).map((g) =>
        chip(state.shown, g, [`${GROUPS[g]} ${g} `, el("small", {}, (counts[g] ?? 0).toLocaleString("en"))], HINTS[g]))));
    const marks = Object.entries(MARKS).filter(([name, m]) => (m.compares ? state.other !== "" : exists(m)) || state.marks.has(name));
    parts.push(el("div", { class: "chips", role: "group", "aria-label": "Only" },
      marks.map(([name, m]) => chip(state.marks, name, [m.label], m.compares ? "against the set compared with" : null))));
  }
  byId("filters").replaceChildren(...parts);
}
const exists = (m) => { for (let row = 0; row < total; row++) if (m.test(row)) return true; return false; };
function choice(name, label, none, isOffered) {
  const select = el("select", { id: name, onchange: (event) => {
    state[name] = event.target.value;
    if (name === "other" && state.other === "") for (const m of [...state.marks]) if (MARKS[m].compares) state.marks.delete(m);
    showFilters(); changed(); showDetail(false);
  } });
  select.append(el("option", { value: "" }, none));
  index.sets.forEach((set, number) => {
    if (isOffered(number) && (name === "set" || set.total)) select.append(el("option", { value: number }, setName(set)));
  });
  select.value = state[name];
  return el("label", {}, el("span", {}, label), select);
}
function chip(chosen, name, content, hint) {
  return el("button", {
    type: "button", class: `chip ${name}`, "data-filter": name, title: hint, "aria-pressed": String(chosen.has(name)),
    onclick: (event) => {
      if (!chosen.delete(name)) chosen.add(name);
      event.currentTarget.setAttribute("aria-pressed", String(chosen.has(name)));
      changed();
    },
  }, content);
}
function changed() { writeAddress(); showResults(); }
let waiting;
function later(action) { clearTimeout(waiting); waiting = setTimeout(action, 200); }

// ---- one trajectory, or two side by side -----------------------------------------------------------------------

function open(item) {
  state.at = item;
  writeAddress();
  paintList(); bringIntoSight();
  showDetail();
}

async function showDetail(toTop = true) {
  const node = byId("detail"), item = state.at;
  document.body.classList.toggle("reading", item !== null);
  if (item === null) {
    node.replaceChildren(el("p", { class: "empty" }, "Choose one on the left, or press j."));
    return;
  }
  const shown = `${state.tab}/${item}/${state.view}/${state.other}`;
  const pair = state.tab === "pairs" ? index.pairs[item] : null;
  const other = pair ? undefined : counterpart(item);
  const sides = pair ?? (other === undefined ? [item] : [item, other]);
  const loaded = await Promise.all(sides.map(async (row) => ({ row, text: await textOf(row), tokens: await tokensOf(row) })));
  const pieces = state.view === "mask" ? await unpack("pieces") : null;
  if (shown !== `${state.tab}/${state.at}/${state.view}/${state.other}`) return; // another one was chosen meanwhile
  node.replaceChildren(...(loaded.length === 2 ? sideBySide(loaded, pieces, pair) : alone(loaded[0], pieces)));
  if (toTop) node.scrollTop = 0;
  node.dataset.shown = shown;
}

function heading(row, extra) {
  const problem = problemOf(row);
  const group = [problem.level, problem.subject].filter(Boolean).join(" · ");
  return el("header", { class: "heading" },
    el("button", { type: "button", class: "back", onclick: close }, "← back"),
    el("h2", {}, visible(problem.id), extra),
    el("p", { class: "facts" }, [group, problem.answer && `gold answer ${problem.answer}`].filter(Boolean).map(visible).join(" · ")),
    switcher());
}
function switcher() {
  const button = (view, label) => el("button", {
    type: "button", "data-view": view, "aria-pressed": String(state.view === view),
    onclick: () => { state.view = view; writeAddress(); showDetail(false); },
  }, label);
  return el("div", { class: "switch", role: "group", "aria-label": "View" }, button("talk", "Conversation"), button("mask", "Mask"));
}

function verdict(row) {
  const answer = rows.answer[row], rule = index.rules[rows.rule[row]], outcome = index.outcomes[rows.outcome[row]];
  return el("p", { class: "verdict" }, mark(groups[row]), " ",
    answer === null ? visible(outcome) : ["answer ", el("code", {}, visible(answer)), groups[row] === "wrong" || groups[row] === "correct" ? "" : `, ${outcome}`],
    rule ? el("small", {}, ` decided by ${rule}`) : null);
}
function facts({ row, text, tokens }) {
  const logps = tokens.flatMap(([, l]) => l ?? []);
  const mean = logps.length ? logps.reduce((a, b) => a + b, 0) / logps.length / 1000 : null;
  const items = [
    ["set", setName(setOf(row))],
    ["stopped", index.stops[rows.stop[row]]],
    ["turns", rows.turns[row]],
    ["tokens written", rows.tokens[row]],
    ["tool calls", rows.errors[row] ? `${rows.calls[row]}, ${plural(rows.errors[row], "error")}` : rows.calls[row]],
    ["mean log p", mean === null ? null : mean.toFixed(3)],
    ["engine / tool", text.generate_s || text.execute_s ? `${text.generate_s ?? 0} s / ${text.execute_s ?? 0} s` : null],
    ["policy", text.policy && `${text.policy}${text.fingerprint ? ` (${text.fingerprint})` : ""}`],
    ["iteration", text.iteration], ["seed", text.seed],
    ["branched off", text.parent === undefined ? null : `sample ${text.parent} at turn ${text.branch_turn}`],
    ["fault", text.fault], ["text only", text.is_from_text ? "ids were not sampled: never trained on" : null],
    ["in training", index.uses[row]?.join(", ")],
    ...Object.entries(text.metadata ?? {}),
  ];
  return el("dl", { class: "props" }, items.filter(([, value]) => value != null && value !== "").map(([name, value]) =>
    el("div", {}, el("dt", {}, visible(name)), el("dd", {}, visible(String(value))))));
}

function alone(side, pieces) {
  const body = state.view === "mask"
    ? [legend(pieces), ...maskBlocks(side, pieces, 0, Infinity, Infinity)]
    : [...talk(side, 0, 0), ...leftovers(side)];
  return [heading(side.row, el("small", {}, ` : ${rows.sample[side.row]}`)), verdict(side.row), facts(side), el("div", { class: "turns" }, body)];
}

/** Two trajectories of one problem: what they share once, then each its own. */
function sideBySide([left, right], pieces, pair) {
  const shared = sharedPrefix(left.tokens, right.tokens);
  const labels = pair ? ["chosen", "rejected"] : [setName(setOf(left.row)), setName(setOf(right.row))];
  const common = state.view === "mask"
    ? [legend(pieces), ...maskBlocks(left, pieces, 0, shared.segments, Infinity)]
    : talk(left, 0, 0, shared.segments);
  const turns = Math.floor(shared.segments / 2);
  const words = [shared.segments ? "the prompt" : null, turns ? plural(turns, "whole turn") : null].filter(Boolean).join(" and ");
  const column = (side, other, label, name) => el("section", { class: `side ${name}`, "aria-label": label },
    el("h3", {}, label, el("small", {}, ` : ${rows.sample[side.row]}`)), verdict(side.row), facts(side),
    el("div", { class: "turns" }, state.view === "mask"
      ? maskBlocks(side, pieces, shared.segments, Infinity, shared.tokens)
      : [...talk(side, shared.segments, sharedText(side, other, shared.segments)), ...leftovers(side)]));
  return [
    heading(left.row, null),
    el("div", { class: "turns shared-turns" }, common),
    el("p", { class: "parting", role: "separator" }, el("span", {},
      `${plural(shared.tokens, "token")} shared${words ? `: ${words}` : ""}${shared.rest ? `, and ${shared.rest} of the next segment` : ""}`)),
    el("div", { class: "sides" },
      column(left, right, labels[0], pair ? "good" : "here"), column(right, left, labels[1], pair ? "bad" : "there")),
  ];
}
function sharedPrefix(a, b) {
  let segments = 0, tokens = 0;
  for (; segments < Math.min(a.length, b.length); segments++) {
    const [x, y] = [a[segments][0], b[segments][0]];
    let same = 0;
    while (same < x.length && same < y.length && x[same] === y[same]) same++;
    tokens += same;
    if (same < x.length || same < y.length) return { segments, tokens, rest: same };
  }
  return { segments, tokens, rest: 0 };
}
function sharedText(side, other, segment) {
  const a = side.text.segments[segment]?.[1] ?? "", b = other.text.segments[segment]?.[1] ?? "";
  let same = 0;
  while (same < a.length && a[same] === b[same]) same++;
  return same;
}

// ---- conversation ----------------------------------------------------------------------------------------------

function talk({ text }, from, sharedChars, to = Infinity) {
  return text.segments.slice(from, to).map(([kind, content, count], offset) => {
    const place = from + offset, run = kind === "o" ? text.executions?.[place / 2 - 1] : null;
    const label = kind === "p" ? "question" : kind === "a" ? `turn ${(place + 1) / 2}` : isTalk(text) ? "reply" : "output";
    const body = el("div", { class: "body" });
    const shared = offset === 0 ? sharedChars : 0;
    if (kind === "o" && !isTalk(text)) body.append(output(content, run));
    else body.append(...prose(content, shared));
    return el("section", { class: `turn ${KINDS[kind]}` },
      el("h4", {}, label, el("small", {}, `${count} tok`), run && run[0] !== "ok" ? el("small", { class: "bad" }, run[0]) : null,
        run ? el("small", {}, `${run[1]} s`) : null), body);
  });
}
/** Whether somebody talks with the model, so that what it reads is prose. */
function isTalk(text) {
  return text.metadata?.student !== undefined;
}
/** Tool calls whose output the model never read, and the last words of somebody who ended the talk. */
function leftovers({ text }) {
  const read = text.segments.filter(([kind]) => kind === "o").length, last = text.metadata?.last_words;
  const unread = (title, ...body) => el("section", { class: "turn observation unread" }, title, el("div", { class: "body" }, ...body));
  return [
    ...(text.executions ?? []).slice(read).map(([status, seconds, content]) =>
      unread(el("h4", {}, "output, never read", el("small", {}, status), el("small", {}, `${seconds} s`)), output(content, [status]))),
    ...(last === undefined ? [] : [unread(el("h4", {}, "reply, never read"), ...prose(last, 0))]),
  ];
}
function output(content, run) {
  const pre = el("pre", { class: run && run[0] !== "ok" ? "failed" : "" });
  visible(content).split("\n").forEach((line, number) => {
    if (number) pre.append("\n");
    const isError = /^(\w+\.)*\w*(Error|Exception|Interrupt|Iteration|Warning|Timeout)\b/.test(line);
    pre.append(isError ? el("span", { class: "raise" }, line) : line);
  });
  return pre;
}
/** Prose and fenced code; the first `shared` characters are marked as common to both sides. */
function prose(content, shared) {
  const parts = [];
  const fence = /```(\w*)[^\S\n]*\n([\s\S]*?)(?:\n?```|$)/g;
  let end = 0;
  const text = (from, to) => {
    if (content.slice(from, to).trim()) parts.push(el("p", {}, marked(from, to, (piece) => boxes(piece))));
  };
  const marked = (from, to, dress) => {
    const cut = Math.min(Math.max(shared, from), to);
    return [cut > from ? el("span", { class: "shared" }, dress(content.slice(from, cut))) : null, ...dress(content.slice(cut, to))];
  };
  for (const block of content.matchAll(fence)) {
    text(end, block.index);
    const start = block.index + block[0].indexOf("\n") + 1;
    parts.push(el("pre", { class: "code" }, marked(start, start + block[2].length, python)));
    end = block.index + block[0].length;
  }
  text(end, content.length);
  return parts;
}
function boxes(text) {
  return visible(text).split(/(\\boxed\{(?:[^{}]|\{[^{}]*\})*\})/).map((part, place) => (place % 2 ? el("b", { class: "boxed" }, part) : part));
}
const PYTHON = new RegExp([
  "(?<comment>#[^\\n]*)",
  "(?<string>\\b[rbfuRBFU]{0,2}(?:'''[\\s\\S]*?'''|\"\"\"[\\s\\S]*?\"\"\"|'(?:\\\\.|[^'\\\\\\n])*'|\"(?:\\\\.|[^\"\\\\\\n])*\")|'(?:\\\\.|[^'\\\\\\n])*'|\"(?:\\\\.|[^\"\\\\\\n])*\")",
  "(?<number>\\b\\d[\\w.]*)",
  "(?<keyword>\\b(?:False|None|True|and|as|assert|async|await|break|class|continue|def|del|elif|else|except|finally|for|from|global|if|import|in|is|lambda|nonlocal|not|or|pass|raise|return|try|while|with|yield)\\b)",
  "(?<builtin>\\b(?:abs|all|any|dict|enumerate|filter|float|int|len|list|map|max|min|print|range|reversed|round|set|sorted|str|sum|tuple|zip)\\b(?=\\())",
].join("|"), "g");
function python(code) {
  const parts = [];
  let end = 0;
  for (const found of code.matchAll(PYTHON)) {
    parts.push(visible(code.slice(end, found.index)));
    const kind = Object.keys(found.groups).find((name) => found.groups[name] !== undefined);
    parts.push(el("span", { class: kind }, visible(found[0])));
    end = found.index + found[0].length;
  }
  return [...parts, visible(code.slice(end))];
}

// ---- mask view: every token, who wrote it, and how likely it was -----------------------------------------------

function legend(pieces) {
  const key = (name, label) => el("span", { class: "key" }, el("span", { class: `tok ${name}` }, " token "), ` ${label}`);
  return el("p", { class: "legend" }, key("prompt", "prompt, mask 0"), key("action", "action: the model wrote it, mask 1"),
    key("observation", "observation, mask 0"),
    el("span", { class: "key" }, el("span", { class: "tok action unlikely" }, " token "), " the thicker the line, the less likely"),
    pieces ? null : el("b", {}, "Segments only: the run's tokenizer was not at hand."));
}

/** The blocks of segments from..to; tokens of the whole before `shared` are marked as common to both sides. */
function maskBlocks({ text, tokens }, pieces, from, to, shared) {
  let place = 0;
  return tokens.map(([ids, logps], segment) => {
    const start = place;
    place += ids.length;
    if (segment < from || segment >= to) return null;
    const [letter, content] = text.segments[segment], kind = KINDS[letter];
    const sum = logps ? logps.reduce((a, b) => a + b, 0) / 1000 : null;
    const label = kind === "action" ? `action, turn ${(segment + 1) / 2}` : kind;
    const body = pieces
      ? spans(ids, pieces).map((span, i) => token(span, kind, ids[i], start + i, logps?.[i], shared !== Infinity && start + i < shared))
      : [el("span", { class: `tok ${kind}` }, visible(content))];
    return el("section", { class: `segment ${kind}` },
      el("h4", {}, label, el("small", {}, `${ids.length} tok`), el("small", {}, `mask ${kind === "action" ? 1 : 0}`),
        sum === null ? null : el("small", {}, `Σ log p ${sum.toFixed(2)}`)),
      el("div", { class: "tokens" }, body));
  }).filter(Boolean);
}
/** What is shown for each id, and a remark: bytes that are no whole character are shown in hexadecimal. */
function spans(ids, pieces) {
  const shown = ids.map((id) => {
    const piece = pieces[id] ?? `⟨${id}⟩`;
    return typeof piece === "string" ? { text: piece } : { text: piece.map((b) => b.toString(16).padStart(2, "0")).join(" "), bytes: piece };
  });
  for (let i = 0; i < shown.length; i++) {
    if (!shown[i].bytes) continue;
    let end = i;
    while (shown[end + 1]?.bytes) end++;
    const whole = new TextDecoder().decode(Uint8Array.from(shown.slice(i, end + 1).flatMap((s) => s.bytes)));
    for (; i <= end; i++) shown[i].remark = `bytes of ${whole}`;
  }
  return shown;
}
function token({ text, bytes, remark }, kind, id, place, logp, isShared) {
  const shown = visible(text).replace(/\n/g, "⏎\n").replace(/\t/g, "⇥\t");
  const node = el("span", { class: `tok ${kind}${bytes ? " bytes" : ""}${isShared ? " shared" : ""}` }, shown || "∅");
  if (logp !== undefined) node.style.setProperty("--surprise", Math.min(1, -logp / 4000).toFixed(2));
  node.dataset.tip = [
    remark ?? JSON.stringify(text),
    `id ${id}, position ${place}`,
    logp === undefined ? (kind === "action" ? "log p unknown" : `${kind}: no loss`) : `log p ${(logp / 1000).toFixed(3)}, p ${percent(logp)}`,
  ].join("\n");
  return node;
}
const percent = (logp) => { const p = 100 * Math.exp(logp / 1000); return p >= 0.1 ? `${p.toFixed(1)} %` : p >= 1e-4 ? `${p.toPrecision(2)} %` : "< 0.0001 %"; };

function showTip(event) {
  const tip = byId("tip"), target = event.target.closest?.("[data-tip]");
  tip.hidden = !target;
  if (!target) return;
  tip.textContent = visible(target.dataset.tip);
  const box = target.getClientRects()[0], width = tip.offsetWidth, height = tip.offsetHeight;
  const below = box.bottom + 6 + height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(innerWidth - width - 8, box.left))}px`;
  tip.style.top = `${below ? box.bottom + 6 : box.top - height - 6}px`;
}

// ---- start -----------------------------------------------------------------------------------------------------

function close() { state.at = null; writeAddress(); paintList(); showDetail(); byId("list").focus({ preventScroll: true }); }

function show() {
  for (const link of document.querySelectorAll("nav a"))
    if (link.hash === `#${state.tab}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  byId("figures").hidden = state.tab !== "overview";
  byId("browser").hidden = state.tab === "overview";
  document.body.classList.toggle("browsing", state.tab !== "overview");
  if (state.tab === "overview") return;
  showFilters(); showResults(); bringIntoSight(); showDetail();
  if (state.q) searchTexts();
}
function onKey(event) {
  const isTyping = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName);
  if (event.key === "Escape") {
    byId("tip").hidden = true;
    if (isTyping) document.activeElement.blur();
    else if (state.at !== null) close();
    return;
  }
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") {
    if (state.tab === "overview") { location.hash = "#trajectories"; }
    setTimeout(() => byId("search")?.focus());
    event.preventDefault();
  }
  if (state.tab === "overview") return;
  const inList = document.activeElement === byId("list");
  if (event.key === "j" || (inList && event.key === "ArrowDown")) { step(1); event.preventDefault(); }
  if (event.key === "k" || (inList && event.key === "ArrowUp")) { step(-1); event.preventDefault(); }
  if (event.key === "m" && state.at !== null) {
    state.view = state.view === "mask" ? "talk" : "mask";
    writeAddress(); showDetail(false);
  }
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    byId("count").textContent = "This browser cannot unpack the trajectories: it is older than 2023.";
    return;
  }
  index = await unpack("index");
  rows = index.rows;
  total = rows.set.length;
  const groupOfOutcome = index.outcomes.map(groupOf);
  groups = rows.outcome.map((outcome) => groupOfOutcome[outcome]);
  const before = (key) => (a, b) => rows[key][a] - rows[key][b];
  order = [...Array(total).keys()].sort((a, b) => before("set")(a, b) || before("problem")(a, b) || before("sample")(a, b));
  byId("list").addEventListener("scroll", paintList, { passive: true });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", () => { readAddress(); show(); });
  addEventListener("resize", () => state.tab !== "overview" && paintList());
  addEventListener("keydown", onKey);
  addEventListener("pointerover", showTip);
  readAddress();
  show();
  requestAnimationFrame(() => setTimeout(() => { // after the first frame that shows it all
    performance.mark("ready");
    document.documentElement.dataset.ready = "yes";
  }));
}
start();
})();
