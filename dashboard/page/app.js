// The live page: history once, then updates over server-sent events; every update redraws what is shown.

import { Chart, redraw, setView } from "./chart.js";
import { element, number, percent } from "./format.js";
import {
  coarse, drawEvaluations, drawEvents, drawFigures, drawProcesses, drawStages, WORLDS,
} from "./panels.js";
import { drawRobots } from "./robots.js";
import { changes, combine, Store } from "./store.js";

const $ = (id) => document.getElementById(id);
const store = new Store();
const PALETTE = ["blue", "teal", "amber", "violet", "pink", "green", "cyan", "grey"];
const SOURCES = { demo: "violet", twin: "blue", real: "green" };
const whole = (v) => (Number.isInteger(v) ? number(v) : v.toFixed(Math.abs(v) < 10 ? 1 : 0));
let range = 0, level = "", lastUpdate = 0, waiting = false;

const given = new URLSearchParams(location.search).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname + location.hash); // not into screenshots and bookmarks
}
const token = sessionStorage.getItem("token");

const charts = {
  success: new Chart($("chart-success"), { format: percent, min: 0, max: 1, labels: true, empty: "No episode has ended yet" }),
  steps: new Chart($("chart-steps"), { min: 0 }),
  flow: new Chart($("chart-flow"), { min: 0 }),
  size: new Chart($("chart-size"), { min: 0, stacked: true }),
  updates: new Chart($("chart-updates"), { min: 0 }),
  version: new Chart($("chart-version"), { step: true, format: whole }),
  interventions: new Chart($("chart-interventions"), { format: percent, min: 0, max: 1, step: true }),
  lag: new Chart($("chart-lag"), { min: 0, step: true, format: whole }),
};
const losses = new Map();
const tiles = {};

const named = (list) => list.map(({ name, points }, i) => ({ label: name, points, color: PALETTE[i % PALETTE.length] }));

function drawCharts() {
  const actors = (figure) => named(store.find("actor", figure));
  charts.steps.set(actors(/env\/steps_per_s/));
  charts.lag.set(actors(/policy\/lag/));
  charts.flow.set([
    ["in", "teal", store.find("replay", /replay\/inserts_per_s/)],
    ["out, sampled", "blue", store.find("replay", /replay\/samples_per_s/)],
  ].filter(([, , list]) => list.length).map(([label, color, list]) => ({ label, color, points: combine(list) })));
  const bySource = new Map();
  for (const each of store.find("replay", /replay\/transitions\/(.+)/)) {
    bySource.set(each.groups[1], [...(bySource.get(each.groups[1]) ?? []), each]);
  }
  charts.size.set([...bySource].sort().map(([source, list], i) => ({
    label: source, color: SOURCES[source] ?? PALETTE[i + 4], points: combine(list),
  })));
  charts.updates.set([
    ["updates", "cyan", store.find("learner", /learner\/updates_per_s/)],
    ["batches", "violet", store.find("learner", /learner\/batches_per_s/)],
  ].filter(([, , list]) => list.length).map(([label, color, list]) => ({ label, color, points: combine(list) })));
  charts.version.set([
    ...store.find("learner", /policy\/version/).map(({ points }) => ({ label: "learner", color: "text", points })),
    ...actors(/policy\/version/).map((each) => ({ ...each, dash: true })),
  ]);
  charts.success.set(successSeries());
  const helped = store.find("", /robot\/([^/]+)\/intervention_rate/).map(({ groups, points }) => ({ name: groups[1], points }));
  const whole = store.find("", /gateway\/intervention_rate/).map(({ points }) => ({ label: "all robots", color: "text", points, dash: true }));
  $("interventions-panel").hidden = !helped.length;
  charts.interventions.set([...named(helped), ...(helped.length > 1 ? whole : [])]);
  drawLosses();
}

function successSeries() {
  const series = [];
  for (const [region, color] of [["id", "teal"], ["ood", "amber"]]) {
    const live = store.find("actor", new RegExp(`env/success_${region}`));
    if (live.length) series.push({ label: `training ${region.toUpperCase()}`, color, points: combine(live, true) });
  }
  let shift = -1.5;
  for (const world of ["twin", "real"]) {
    for (const [region, color] of [["id", "teal"], ["ood", "amber"]]) {
      const found = store.find("", new RegExp(`eval/[^/]+/${world}/${region}`));
      const points = found.flatMap(({ role, name, figure, points }) => changes(points).map(([t, v]) => {
        const end = (which) => store.series.get(`${role}|${name}|${figure}_${which}`)?.findLast((p) => p[0] <= t + 0.1)?.[1];
        return [t, v, end("low") ?? v, end("high") ?? v];
      })).sort((a, b) => a[0] - b[0]);
      series.push({
        label: `eval ${WORLDS[world]} ${region.toUpperCase()}`, color, dots: true, hollow: world === "real", dash: true, shift,
        points: points.map(([t, v]) => [t, v]), intervals: points.map(([, , low, high]) => [low, high]),
      });
      shift += 1;
    }
  }
  return series;
}

function drawLosses() {
  const found = store.find("learner", /loss\/(.+)/);
  $("losses-panel").hidden = !found.length;
  found.forEach(({ figure, groups, points }, i) => {
    if (!losses.has(figure)) {
      const parent = $("losses").appendChild(element("div", { class: "chart" }));
      losses.set(figure, new Chart(parent, {}));
    }
    losses.get(figure).set([{ label: groups[1], color: PALETTE[i % PALETTE.length], points }]);
  });
}

// [id, label, newest value as text, small text, points, colour]
function keyFigures() {
  const last = (points) => (points.length ? points[points.length - 1][1] : undefined);
  const steps = combine(store.find("actor", /env\/steps_per_s/)), flow = combine(store.find("replay", /replay\/inserts_per_s/));
  const batches = combine(store.find("learner", /learner\/batches_per_s/)), updates = combine(store.find("learner", /learner\/updates_per_s/));
  const versions = combine(store.find("learner", /policy\/version/), true);
  const lag = Math.max(...store.processes.map((p) => p.data["policy/lag"] ?? -1));
  const success = combine(store.find("actor", /env\/success_ood/), true), id = last(combine(store.find("actor", /env\/success_id/), true));
  return [
    ["steps", "Environment steps/s", number(last(steps)), "", steps, "blue"],
    ["inserts", "Transitions/s in", number(last(flow)), "", flow, "teal"],
    ["batches", "Batches/s out", number(last(batches)), "", batches, "violet"],
    ["updates", "Learner updates/s", number(last(updates)), total(), updates, "cyan"],
    ["version", "Policy version", versions.length ? String(Math.round(last(versions))) : "–", lag >= 0 ? `lag ≤ ${lag}` : "", versions, "pink"],
    ["success", "Training success OOD", percent(last(success)), id === undefined ? "" : `ID ${percent(id)}`, success, "amber"],
  ];
}

function total() {
  const updates = store.value("learner", "learner/updates");
  return updates === undefined ? "" : `${number(updates)} done`;
}

function drawTiles() {
  for (const [id, label, value, small, points, color] of keyFigures()) {
    if (!tiles[id]) {
      const spark = element("div", { class: "spark chart" });
      tiles[id] = { value: element("b", { id: `figure-${id}` }), small: element("small"), chart: new Chart(spark, { spark: true }) };
      $("tiles").append(element("div", { class: "tile" }, spark, element("label", {}, label, tiles[id].small), tiles[id].value));
    }
    tiles[id].value.textContent = value;
    tiles[id].small.textContent = small;
    tiles[id].chart.set([{ label, color, points }]);
  }
}

const NAMES = ["SFT", "Twin RL", "Real RL", "done"];

function drawAll() {
  waiting = false;
  if (!store.snapshot) return;
  const { run, time, started, stages, finished, ended } = store.snapshot;
  const last = Math.max(started ?? time, ...store.processes.map((p) => p.time));
  const to = finished || ended ? last : Math.max(time, last), start = started ?? to - 1;
  const marks = stages.map(([t, name]) => [t, coarse(name)]).filter(([, c], i, all) => !i || c !== all[i - 1][1]);
  setView({ start, to, from: range ? Math.max(start, to - range) : start, marks: marks.map(([t, c]) => [t, NAMES[c]]) });
  $("run").textContent = run;
  document.title = `${run} · TwinRL`;
  document.body.dataset.updates = store.updates;
  const errors = [...store.events.values()].filter((e) => e.level === "error").length;
  $("errors").hidden = !errors;
  $("errors").textContent = errors === 1 ? "1 error" : `${errors} errors`;
  drawStages($("stages"), store);
  drawTiles();
  drawEvaluations($("evaluations"), store);
  drawRobots($("robots"), store, command, Boolean(token));
  drawProcesses($("processes"), store);
  drawEvents($("event-list"), store, level);
  if ($("all").open) drawFigures($("figures"), store, $("filter").value);
  const paused = Boolean(store.value("", "gateway/paused"));
  document.querySelector("[data-action=pause]").hidden = paused;
  document.querySelector("[data-action=resume]").hidden = !paused;
  drawCharts();
}

function soon() {
  if (waiting || document.hidden) return;
  waiting = true;
  setTimeout(drawAll, 30);
}

function showLink(kind, text, title = "") {
  $("link").className = `pill ${kind}`;
  $("link").textContent = text;
  $("link").title = title;
}

async function loadHistory() {
  const answer = await fetch("/api/history");
  if (answer.ok) store.loadHistory(await answer.json());
}

async function connect() {
  await loadHistory().catch(() => {});
  const stream = new EventSource("/api/stream");
  stream.addEventListener("update", async (event) => {
    const gap = Date.now() - lastUpdate;
    lastUpdate = Date.now();
    if (store.updates && gap > 8000) await loadHistory().catch(() => {}); // what was missed meanwhile
    const snapshot = JSON.parse(event.data);
    store.update(snapshot);
    if (snapshot.ended) { showLink("wait", "finished run"); stream.close(); } else showLink("good", "live");
    soon();
  });
  stream.addEventListener("away", (event) => showLink("warn", "collector away", JSON.parse(event.data).text));
  stream.onerror = () => showLink("bad", "reconnecting");
}

async function command(action, target) {
  let text;
  try {
    const answer = await fetch("/api/command", {
      method: "POST",
      headers: { "Content-Type": "application/json", Authorization: `Bearer ${token}` },
      body: JSON.stringify({ action, target }),
    });
    const result = await answer.json();
    text = result.error ?? result.text ?? `${action} ${target ?? ""} was asked for`;
  } catch (error) {
    text = `${action}: ${error.message}`;
  }
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(command.timer);
  command.timer = setTimeout(() => { $("toast").hidden = true; }, 5000);
}

for (const button of document.querySelectorAll("[data-action]")) {
  button.disabled = !token;
  if (!token) button.title = "Commands need the address with the token that twinrl launch prints";
  button.addEventListener("click", () => command(button.dataset.action));
}

function choose(group, apply) {
  group.addEventListener("click", (event) => {
    if (event.target.tagName !== "BUTTON") return;
    for (const each of group.children) each.setAttribute("aria-pressed", String(each === event.target));
    apply(event.target.dataset);
    drawAll();
  });
}
choose($("range"), (data) => { range = Number(data.range); });
choose($("levels"), (data) => { level = data.level; });

const dark = matchMedia("(prefers-color-scheme: dark)");
function applyTheme() {
  document.documentElement.dataset.theme = localStorage.getItem("theme") ?? (dark.matches ? "dark" : "light");
  redraw();
}
$("theme").addEventListener("click", () => {
  localStorage.setItem("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  applyTheme();
});
dark.addEventListener("change", applyTheme);
applyTheme();
$("filter").addEventListener("input", () => drawFigures($("figures"), store, $("filter").value));
$("all").addEventListener("toggle", soon);
document.addEventListener("visibilitychange", soon);
connect();
