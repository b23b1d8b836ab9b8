// Small time-series charts on canvas with a crosshair shared by all of them.

import { duration, element, number } from "./format.js";

const charts = new Set();
const view = { start: 0, from: 0, to: 1, marks: [], cursor: null };
const PAD = { left: 42, right: 10, top: 8, bottom: 20 };
let tip = null;

export function setView(next) {
  Object.assign(view, next);
}

export function redraw() {
  for (const chart of charts) chart.draw();
}

export class Chart {
  // options: {format, min, max, stacked, step, labels: stage names at the marks, empty: text, spark}
  constructor(parent, options = {}) {
    this.options = { format: number, empty: "Nothing reported yet", ...options };
    this.series = [];
    this.legend = options.spark ? null : element("div", { class: "legend" });
    this.canvas = element("canvas", { "aria-hidden": "true" });
    this.none = element("div", { class: "empty" }, this.options.empty);
    parent.replaceChildren(...[this.legend, this.canvas, options.spark ? null : this.none].filter(Boolean));
    charts.add(this);
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    if (options.spark) return;
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => this.leave());
  }

  // series: [{label, color: CSS variable, points: [[time, value]], dots, hollow, dash, intervals: [[low, high]]}]
  set(series) {
    this.series = series.filter((each) => each.points.length);
    this.draw();
    if (!this.legend) return;
    this.none.hidden = this.series.length > 0;
    this.canvas.hidden = !this.series.length;
    const shown = this.series.slice(0, 12).map(({ label, color, points, hollow, dots }) =>
      element("span", {}, swatch(color, hollow, dots), label,
        element("b", {}, this.options.format(points[points.length - 1][1]))));
    this.legend.replaceChildren(...shown);
  }

  hover(event) {
    const box = this.canvas.getBoundingClientRect();
    const share = (event.clientX - box.left - PAD.left) / (box.width - PAD.left - PAD.right);
    view.cursor = view.from + Math.min(1, Math.max(0, share)) * (view.to - view.from);
    tip ||= document.body.appendChild(element("div", { class: "tip" }));
    tip.hidden = false;
    tip.replaceChildren(element("time", {}, duration(view.cursor - view.start)),
      ...this.series.map(({ label, color, points, hollow, dots, intervals }) => {
        const i = nearest(points, view.cursor), range = intervals && intervals[i];
        const text = this.options.format(points[i][1])
          + (range ? ` [${this.options.format(range[0])}, ${this.options.format(range[1])}]` : "");
        return element("div", {}, element("span", {}, swatch(color, hollow, dots), ` ${label}`), element("b", {}, text));
      }));
    const width = tip.offsetWidth, height = tip.offsetHeight;
    tip.style.left = `${event.clientX + 16 + width > innerWidth ? event.clientX - 16 - width : event.clientX + 16}px`;
    tip.style.top = `${Math.min(event.clientY + 12, innerHeight - height - 8)}px`;
    redraw();
  }

  leave() {
    view.cursor = null;
    if (tip) tip.hidden = true;
    redraw();
  }

  draw() {
    const width = this.canvas.clientWidth, height = this.canvas.clientHeight, scale = devicePixelRatio || 1;
    if (!width || !height) return;
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
    }
    const g = this.canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    g.setTransform(scale, 0, 0, scale, 0, 0);
    g.clearRect(0, 0, width, height);
    if (!this.series.length) return;
    const shown = this.options.stacked ? stack(this.series) : this.series;
    const cut = shown.map((each) => ({ ...each, ...inside(each) }));
    const pad = this.options.spark ? { left: 0, right: 0, top: 4, bottom: 3 } : PAD;
    const [low, high] = this.limits(cut);
    const x = (t) => pad.left + ((t - view.from) / (view.to - view.from || 1)) * (width - pad.left - pad.right);
    const y = (v) => height - pad.bottom - ((v - low) / (high - low || 1)) * (height - pad.top - pad.bottom);
    if (!this.options.spark) this.axes(g, x, y, low, high, width, height, colour);
    g.save();
    g.beginPath();
    g.rect(pad.left - 1, 0, width - pad.left - pad.right + 8, height);
    g.clip();
    cut.forEach((each, i) => this.line(g, each, x, y, colour, cut[i - 1], i, low));
    g.restore();
  }

  limits(cut) {
    let low = Infinity, high = -Infinity;
    for (const { points, intervals } of cut) {
      for (const [, v] of points) { low = Math.min(low, v); high = Math.max(high, v); }
      for (const [a, b] of intervals || []) { low = Math.min(low, a); high = Math.max(high, b); }
    }
    if (!(high >= low)) [low, high] = [0, 1];
    if (this.options.min !== undefined) low = Math.min(low, this.options.min);
    if (this.options.max !== undefined) high = Math.max(high, this.options.max);
    if (high - low < 1e-12) high = low + (Math.abs(low) || 1);
    const room = (high - low) * 0.06;
    return [this.options.min !== undefined && low >= this.options.min ? low : low - room,
      this.options.max !== undefined && high <= this.options.max ? high : high + room];
  }

  axes(g, x, y, low, high, width, height, colour) {
    g.font = "11px system-ui, sans-serif";
    g.lineWidth = 1;
    g.fillStyle = colour("faint");
    g.strokeStyle = colour("line");
    g.textAlign = "right";
    g.textBaseline = "middle";
    for (const v of ticks(low, high, Math.max(2, Math.floor(height / 36)))) {
      g.beginPath();
      g.moveTo(PAD.left, Math.round(y(v)) + 0.5);
      g.lineTo(width - PAD.right, Math.round(y(v)) + 0.5);
      g.stroke();
      g.fillText(this.options.format(v), PAD.left - 7, y(v));
    }
    g.textAlign = "center";
    g.textBaseline = "alphabetic";
    for (const t of timeTicks(view.from - view.start, view.to - view.start, width / 95)) {
      g.fillText(timeLabel(t, view.to - view.from), Math.min(width - 16, Math.max(PAD.left + 4, x(t + view.start))), height - 4);
    }
    let free = -Infinity;
    g.textAlign = "left";
    for (const [time, name] of view.marks) {
      if (time <= view.from || time > view.to) continue;
      g.setLineDash([2, 3]);
      g.strokeStyle = colour("faint");
      g.beginPath();
      g.moveTo(x(time), PAD.top);
      g.lineTo(x(time), height - PAD.bottom);
      g.stroke();
      g.setLineDash([]);
      if (this.options.labels && x(time) > free) {
        g.fillText(name, x(time) + 4, height - PAD.bottom - 6);
        free = x(time) + g.measureText(name).width + 10;
      }
    }
    if (view.cursor !== null) {
      g.strokeStyle = colour("muted");
      g.beginPath();
      g.moveTo(x(view.cursor), PAD.top);
      g.lineTo(x(view.cursor), height - PAD.bottom);
      g.stroke();
    }
  }

  line(g, each, x, y, colour, below, index, low) {
    const { points, dots, hollow, dash, intervals } = each, tone = colour(each.color);
    if (!points.length) return;
    g.strokeStyle = g.fillStyle = tone;
    g.lineWidth = dots ? 1.2 : 1.7;
    g.lineJoin = "round";
    g.setLineDash(dash ? [4, 4] : []);
    g.beginPath();
    points.forEach(([t, v], i) => {
      if (i && this.options.step) g.lineTo(x(t), y(points[i - 1][1]));
      if (i) g.lineTo(x(t), y(v)); else g.moveTo(x(t), y(v));
    });
    if (dots) g.globalAlpha = 0.55;
    g.stroke();
    g.globalAlpha = 1;
    g.setLineDash([]);
    if (this.options.stacked || this.options.spark || this.options.fill) {
      const base = this.options.stacked && below ? below.points : [[points[0][0], low], [points[points.length - 1][0], low]];
      for (let i = base.length - 1; i >= 0; i--) g.lineTo(x(base[i][0]), y(base[i][1]));
      g.globalAlpha = this.options.stacked ? 0.32 : 0.13;
      g.fill();
      g.globalAlpha = 1;
    }
    if (!dots) return;
    points.forEach(([t, v], i) => {
      // Evaluations of one policy come together; side by side their intervals can be read.
      const px = x(t) + (each.shift || 0) * 5;
      if (intervals && intervals[i]) {
        g.lineWidth = 1.4;
        g.beginPath();
        for (const end of intervals[i]) { g.moveTo(px - 3, y(end)); g.lineTo(px + 3, y(end)); }
        g.moveTo(px, y(intervals[i][0]));
        g.lineTo(px, y(intervals[i][1]));
        g.stroke();
      }
      g.beginPath();
      g.arc(px, y(v), 3.6, 0, 7);
      g.fillStyle = hollow ? colour("panel") : tone;
      g.fill();
      g.lineWidth = 1.8;
      g.stroke();
    });
  }
}

function swatch(color, hollow, dots) {
  const node = element("i", { class: hollow ? "hollow" : dots ? "dot" : "" });
  node.style.background = `var(--${color})`;
  node.style.borderColor = `var(--${color})`;
  return node;
}

function inside({ points, intervals }) {
  let first = points.findIndex(([t]) => t >= view.from);
  if (first < 0) first = points.length;
  first = Math.max(0, first - 1); // the line enters from the left
  return { points: points.slice(first), intervals: intervals && intervals.slice(first) };
}

function nearest(points, time) {
  let a = 0, b = points.length - 1;
  while (b - a > 1) {
    const middle = (a + b) >> 1;
    if (points[middle][0] <= time) a = middle; else b = middle;
  }
  return time - points[a][0] <= points[b][0] - time ? a : b;
}

// Sources report together, so equal indices from the end are equal times.
function stack(series) {
  const longest = series.reduce((a, b) => (b.points.length > a.points.length ? b : a)).points;
  const total = longest.map(() => 0);
  return series.map((each) => {
    const missing = longest.length - each.points.length;
    return { ...each, points: longest.map(([t], i) => [t, (total[i] += i < missing ? 0 : each.points[i - missing][1])]) };
  });
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= raw) * power, out = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) out.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return out;
}

function timeTicks(low, high, count) {
  const steps = [5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400];
  const step = steps.find((s) => (high - low) / s <= count) || 172800, out = [];
  for (let t = Math.ceil(low / step) * step; t <= high; t += step) out.push(t);
  return out;
}

function timeLabel(t, span) {
  if (span <= 300) return duration(t);
  if (t === 0) return "0";
  return t >= 3600 ? `${number(t / 3600)} h` : `${Math.round(t / 60)} min`;
}
