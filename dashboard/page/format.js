// Numbers, times and elements: everything the panels write.

export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size >= 1e9) return trim(value / 1e9, digits) + "G";
  if (size >= 1e6) return trim(value / 1e6, digits) + "M";
  if (size >= 1e4) return trim(value / 1e3, digits) + "k";
  if (size < 1e-9) return "0"; // what rounding leaves of a sum
  if (size < 1e-3) return value.toExponential(1);
  return trim(value, Math.max(digits, String(Math.trunc(size)).length));
}

function trim(value, digits) {
  const text = value.toPrecision(digits);
  return text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : String(Number(text));
}

export const percent = (value) =>
  value === null || value === undefined ? "–" : `${Math.round(value * 100)} %`;

export function bytes(value) {
  for (const unit of ["B", "KB", "MB", "GB"]) {
    if (value < 1000 || unit === "GB") return `${number(value)} ${unit}`;
    value /= 1000;
  }
}

export function duration(seconds) {
  if (!(seconds >= 0)) return "–";
  const s = Math.floor(seconds), h = Math.floor(s / 3600), m = Math.floor((s % 3600) / 60);
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s % 60)}` : `${m}:${two(s % 60)}`;
}

export function ago(seconds) {
  if (seconds < 1.5) return "now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min ago` : `${Math.round(seconds / 3600)} h ago`;
}

export const clock = (time) => new Date(time * 1000).toLocaleTimeString([], { hour12: false });

// element("td", {class: "num"}, "text", child): text never becomes markup.
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
