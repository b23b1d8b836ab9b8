// The panels that are not charts: stages, tiles, evaluations, robots, processes, events, all figures.

import { ago, bytes, clock, duration, element, number, percent } from "./format.js";

const STAGES = [
  ["SFT", "demonstrations and supervised fine-tuning"],
  ["Twin RL", "online RL in the randomised twins"],
  ["Real RL", "on the arm, with takeovers"],
];
const EVALUATED = ["sft", "stage1", "stage2", "stage3"];
const EVALUATED_NAMES = { sft: "SFT", stage1: "Stage 1", stage2: "Stage 2", stage3: "Stage 3" };
const COLUMNS = [["twin", "id"], ["twin", "ood"], ["real", "id"], ["real", "ood"]];
export const WORLDS = { twin: "twin", real: "stand-in" };

// A run's own steps in each stage, with a rough share of its time.
const STEPS = [
  [["demonstrations", 1], ["pretrain", 3], ["sft", 2], ["stage1", 3], ["eval-stage1", 1]],
  [["stage2", 9], ["eval-stage2", 1]],
  [["mining", 1], ["stage3", 7], ["eval-stage3", 1], ["video", 1]],
];

// Which of the three stages a run's own stage name belongs to; 3 when the run is over.
export function coarse(name) {
  const text = String(name ?? "").toLowerCase();
  if (/done|finished|complete/.test(text)) return 3;
  if (/demo|expan|pretrain|sft|stage.?1/.test(text)) return 0;
  if (/real|stage.?3|mining|video|report/.test(text)) return 2;
  return /twin|ppo|stage.?2/.test(text) ? 1 : 0;
}

// How far the stage is: its steps that are done, and what the learner says of the present one.
function stageShare(stage, store) {
  const idle = /idle/.test(String(store.value("learner", "learner/stage")));
  const learner = idle ? 0 : store.value("learner", "learner/progress");
  const steps = STEPS[coarse(stage)] ?? [], at = steps.findIndex(([name]) => name === stage);
  if (at < 0) return learner ?? store.value("run", "run/progress") ?? 0;
  const total = steps.reduce((sum, [, weight]) => sum + weight, 0);
  const done = steps.slice(0, at).reduce((sum, [, weight]) => sum + weight, 0);
  return (done + steps[at][1] * (learner ?? 0)) / total;
}

export function drawStages(node, store) {
  const stage = store.value("run", "run/stage") ?? store.value("learner", "learner/stage");
  const share = stageShare(stage, store);
  const now = coarse(stage), { started, time, ended } = store.snapshot;
  const last = Math.max(...store.processes.map((p) => p.time));
  const cards = STAGES.map(([title, what], i) => {
    const state = i < now ? "done" : i === now && stage !== undefined ? "now" : "next";
    const part = state === "now" ? Math.min(1, Math.max(0, share)) : state === "done" ? 1 : 0;
    const fill = element("i");
    fill.style.width = `${part * 100}%`;
    const label = state === "now" ? `${stage} · ${Math.round(part * 100)} %` : state === "done" ? "done" : what;
    return element("div", { class: `stage ${state}` },
      element("div", {}, element("b", {}, `${i + 1}  ${title}`), element("em", {}, label)),
      element("div", { class: "track", role: "progressbar", "aria-valuenow": Math.round(part * 100) }, fill));
  });
  const over = ended || store.snapshot.finished;
  const elapsed = started ? (over ? last : time) - started : 0;
  node.replaceChildren(...cards, element("div", { class: "clock" },
    element("b", { id: "elapsed" }, duration(elapsed)), element("span", {}, over ? "finished" : "elapsed")));
}

export function drawEvaluations(node, store) {
  const cells = new Map(), stages = new Set();
  for (const process of store.processes) {
    for (const [key, value] of Object.entries(process.data)) {
      const match = key.match(/^eval\/([^/]+)\/([^/]+)\/([^/_]+)$/);
      if (!match) continue;
      stages.add(match[1]);
      const [low, high, n] = ["low", "high", "n"].map((end) => process.data[`${key}_${end}`]);
      cells.set(match.slice(1).join("/"), { value, low, high, n });
    }
  }
  if (!stages.size) return node.replaceChildren();
  const order = [...EVALUATED.filter((s) => stages.has(s)), ...[...stages].filter((s) => !EVALUATED.includes(s))];
  const head = element("tr", {}, element("th", {}, ""), ...COLUMNS.map(([world, region]) =>
    element("th", {}, `${WORLDS[world]} ${region.toUpperCase()}`)));
  const rows = order.map((stage) => element("tr", {}, element("th", {}, EVALUATED_NAMES[stage] ?? stage),
    ...COLUMNS.map(([world, region]) => {
      const cell = cells.get(`${stage}/${world}/${region}`);
      if (!cell) return element("td", { class: "none" }, "–");
      const range = cell.low === undefined ? "" : `${Math.round(cell.low * 100)}–${Math.round(cell.high * 100)}`;
      const td = element("td", { title: cell.n ? `${cell.n} episodes` : "" },
        element("b", {}, percent(cell.value)), element("small", {}, range));
      td.style.setProperty("--level", cell.value);
      td.style.setProperty("--tone", `var(--${region === "id" ? "teal" : "amber"})`);
      return td;
    })));
  node.replaceChildren(element("table", { class: "matrix" }, head, ...rows));
}

const STATUS = { running: "good", silent: "warn", crashed: "bad", ended: "wait" };
const MAIN = { actor: "env/steps_per_s", learner: "learner/updates_per_s", replay: "replay/inserts_per_s" };
const UNITS = { actor: "steps/s", learner: "updates/s", replay: "in/s" };

// Episodes whose simulation failed, and simulators that were started again.
function lost({ data }) {
  const episodes = data["env/invalid_episodes"], restarts = data["worker/restarts"];
  return [episodes ? `${number(episodes)} void` : "", restarts ? `restarted ${number(restarts)}x` : ""].filter(Boolean).join(" · ");
}

export function drawProcesses(node, store) {
  const rows = store.processes.map((p) => {
    const figure = p.data[MAIN[p.role]];
    const waits = Object.entries(p.data).find(([key, value]) => /\/waiting(_for)?$/.test(key) && typeof value === "string" && value);
    return element("tr", {},
      element("td", {}, element("span", { class: `pill ${STATUS[p.status]}` }, p.status)),
      element("td", {}, element("b", {}, p.role), p.name === p.role ? "" : ` ${p.name}`),
      element("td", { class: "muted" }, `${p.host ?? ""} · ${p.pid ?? ""}`),
      element("td", { class: "muted" }, p.status === "running" ? "" : ago(p.age)),
      element("td", { class: "num", title: waits ? waits[1] : p.data["replay/promise"] ?? "" },
        [figure === undefined ? "" : `${number(figure)} ${UNITS[p.role]}`, lost(p), waits ? "waits" : ""].filter(Boolean).join(" · ")));
  });
  const head = element("tr", {}, ...["State", "Process", "Host · pid", "", ""].map((text) => element("th", {}, text)));
  node.replaceChildren(head, ...rows);
}

const RANK = { info: 0, warning: 1, error: 2 };
const opened = new Set();

export function drawEvents(node, store, level) {
  const events = store.sorted().filter((e) => (RANK[e.level] ?? 0) >= (RANK[level] ?? 0)).slice(0, 200);
  if (!events.length) return node.replaceChildren(element("div", { class: "empty" }, "Nothing has happened yet"));
  const newest = events.find((event) => event.traceback); // shown unasked
  node.replaceChildren(...events.map((event) => {
    const what = element("div", { class: "what" }, event.text);
    if (event.traceback) {
      const key = `${event.time}${event.name}`, first = event === newest && !opened.has(`closed ${key}`);
      const details = element("details", { open: first || opened.has(key) },
        element("summary", { class: "muted" }, "Traceback"), element("pre", {}, event.traceback));
      details.addEventListener("toggle", () => {
        opened[details.open ? "add" : "delete"](key);
        opened[details.open ? "delete" : "add"](`closed ${key}`);
      });
      what.append(details);
    }
    return element("li", { class: event.level },
      element("time", { title: new Date(event.time * 1000).toLocaleString() }, clock(event.time)),
      element("span", { class: "who" }, event.name === event.role ? event.role : `${event.role} ${event.name}`), what);
  }));
}

export function drawFigures(node, store, filter) {
  const rows = [], wanted = filter.toLowerCase();
  for (const p of store.processes) {
    for (const key of Object.keys(p.data).sort()) {
      if (!`${p.role} ${p.name} ${key}`.toLowerCase().includes(wanted)) continue;
      const value = p.data[key];
      const shown = /bytes$/.test(key) && typeof value === "number" ? bytes(value)
        : value !== null && typeof value === "object" ? JSON.stringify(value) : number(value, 5);
      rows.push(element("tr", {}, element("td", {}, `${p.role} ${p.name}`), element("td", { class: "key" }, key),
        element("td", { class: "num" }, shown)));
    }
  }
  node.replaceChildren(element("tr", {}, element("th", {}, "Process"), element("th", {}, "Figure"),
    element("th", { class: "num" }, "Value")), ...rows);
}
