// The planned path: where the policy's newest chunk would lead the tool, on the camera's picture or beside it.

import { element } from "./format.js";

const PLANES = [["from above, x–y", 0, 1], ["from the side, x–z", 0, 2]];
const SIZE = 100, EDGE = 12; // of a plot, in its own units
const SMALLEST = 0.06; // m that a plot shows at least

function shape(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// `overlay` lies over `picture`; `views` stand below it and are used where the camera's calibration is not known.
export function drawPath(overlay, views, path, camera, picture) {
  const points = path?.points ?? [], pixels = path?.pixels?.[camera] ?? [];
  const onPicture = pixels.length > 1 && !picture.hidden && picture.naturalWidth > 0;
  overlay.replaceChildren(...(onPicture ? [onImage(pixels, picture.naturalWidth, picture.naturalHeight)] : []));
  views.hidden = onPicture || points.length < 2;
  views.replaceChildren(...(views.hidden ? [] : PLANES.map(([title, a, b]) => plot(title, points.map((p) => [p[a], p[b]])))));
  const causes = Object.entries(path?.causes ?? {});
  if (points.length && causes.length) {
    const text = `shortened by the safety filter: ${causes.map(([cause, n]) => `${cause} ${n}`).join(", ")}`;
    (onPicture ? overlay : views).append(element("small", { class: "shortened" }, text));
  }
}

// Drawn in screen pixels, so that lines are equally thick over a picture of 64 pixels and one of 640.
function onImage(pixels, width, height) {
  const scale = 400 / Math.max(width, height), at = pixels.map(([u, v]) => [u * scale, v * scale]);
  return shape("svg", { viewBox: `0 0 ${width * scale} ${height * scale}`, class: "path", role: "img", "aria-label": "planned path" }, ...line(at, 3.2));
}

function line(at, size) {
  const points = at.map((p) => p.map((x) => x.toFixed(1)).join(",")).join(" ");
  const [x, y] = at[at.length - 1];
  return [
    shape("polyline", { points, class: "under", "stroke-width": size * 1.9 }),
    shape("polyline", { points, class: "over", "stroke-width": size }),
    ...at.slice(1, -1).map(([px, py]) => shape("circle", { cx: px, cy: py, r: size * 0.45, class: "step" })),
    shape("circle", { cx: at[0][0], cy: at[0][1], r: size * 1.5, class: "start" }),
    shape("circle", { cx: x, cy: y, r: size * 1.5, class: "end" }),
  ];
}

function plot(title, points) {
  const low = [0, 1].map((k) => Math.min(...points.map((p) => p[k]))), high = [0, 1].map((k) => Math.max(...points.map((p) => p[k])));
  const span = Math.max(SMALLEST, high[0] - low[0], high[1] - low[1]), scale = (SIZE - 2 * EDGE) / span;
  const middle = [0, 1].map((k) => (low[k] + high[k]) / 2);
  const at = points.map((p) => [SIZE / 2 + (p[0] - middle[0]) * scale, SIZE / 2 - (p[1] - middle[1]) * scale]);
  const bar = 0.02 * scale; // 2 cm
  return element("figure", {},
    shape("svg", { viewBox: `0 0 ${SIZE} ${SIZE}`, class: "path", role: "img", "aria-label": `planned path ${title}` },
      shape("line", { x1: 6, x2: 6 + bar, y1: SIZE - 5, y2: SIZE - 5, class: "scale" }),
      shape("text", { x: 8 + bar, y: SIZE - 3 }, "2 cm"), ...line(at, 1.1)),
    element("figcaption", {}, title));
}
