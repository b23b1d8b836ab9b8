// The run as the page knows it: last values, series and events. Figures are named "role|name|figure".

const MOST_POINTS = 4000;
const MOST_EVENTS = 500;

export class Store {
  constructor() {
    this.clear();
  }

  clear() {
    this.series = new Map();
    this.events = new Map();
    this.processes = [];
    this.snapshot = null;
    this.times = new Map();
    this.updates = 0;
  }

  loadHistory(history) {
    this.series.clear();
    this.times.clear();
    for (const [role, name, figure, points] of history.series) {
      this.series.set(`${role}|${name}|${figure}`, points);
      const who = `${role}|${name}`, last = points.length ? points[points.length - 1][0] : 0;
      this.times.set(who, Math.max(last, this.times.get(who) || 0));
    }
  }

  update(snapshot) {
    this.updates += 1;
    this.snapshot = snapshot;
    this.processes = snapshot.processes;
    for (const event of snapshot.events) {
      this.events.set(`${event.time}|${event.role}|${event.name}|${event.text}`, event);
    }
    while (this.events.size > MOST_EVENTS) this.events.delete(this.events.keys().next().value);
    for (const process of snapshot.processes) {
      const who = `${process.role}|${process.name}`;
      // History times are rounded to 0.1 s.
      if (process.time <= (this.times.get(who) || 0) + 0.1) continue;
      this.times.set(who, process.time);
      for (const [figure, value] of Object.entries(process.data)) {
        if (typeof value === "number" && !process.stale.includes(figure)) this.append(`${who}|${figure}`, process.time, value);
      }
    }
  }

  append(key, time, value) {
    let points = this.series.get(key);
    if (!points) this.series.set(key, (points = []));
    points.push([time, value]);
    if (points.length > MOST_POINTS) {
      // Thin the older half; the newest points stay whole.
      const half = MOST_POINTS / 2;
      this.series.set(key, points.filter((_, i) => i >= half || i % 2 === 0));
    }
  }

  // [{role, name, figure, points}] of every process of `role` ("" for any) whose figure matches.
  find(role, pattern) {
    const found = [];
    for (const [key, points] of this.series) {
      const [r, name, ...rest] = key.split("|"), figure = rest.join("|");
      const match = (!role || r === role) && figure.match(pattern);
      if (match && match[0] === figure) found.push({ role: r, name, figure, groups: match, points });
    }
    return found.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
  }

  // The newest value of a figure over all processes of `role` that report it.
  value(role, figure) {
    let best = null;
    for (const p of this.processes) {
      if ((!role || p.role === role) && p.data[figure] !== undefined && (!best || p.time > best.time)) best = p;
    }
    return best ? best.data[figure] : undefined;
  }

  sorted() {
    return [...this.events.values()].sort((a, b) => b.time - a.time);
  }
}

// Several processes' series as one: at each time the sum or mean of everybody's last value.
export function combine(list, mean = false) {
  if (list.length === 1) return list[0].points;
  const all = list.flatMap(({ points }, i) => points.map(([t, v]) => [t, v, i])).sort((a, b) => a[0] - b[0]);
  const last = new Map(), out = [];
  let sum = 0;
  for (const [t, v, i] of all) {
    sum += v - (last.get(i) || 0);
    last.set(i, v);
    const point = [t, mean ? sum / last.size : sum];
    // One point a second: everybody's reports of that second.
    if (out.length && t - out[out.length - 1][0] < 0.8) out[out.length - 1][1] = point[1];
    else out.push(point);
  }
  return out;
}

// Where a figure changes: an evaluation reports one result again and again until the next one.
export const changes = (points) => points.filter(([, v], i) => i === 0 || v !== points[i - 1][1]);
