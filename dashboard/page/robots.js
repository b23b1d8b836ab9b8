// The robots' cards: what each does, what it sees, the path that its policy plans, and what a person may ask of it.

import { element, number, percent } from "./format.js";
import { drawPath } from "./path.js";

const STATES = {
  idle: "wait", waiting: "wait", leaving: "wait", shadow: "shadow", takeover: "warn", held: "warn", holding: "warn",
  paused: "warn", gone: "bad", offline: "bad", stopped: "bad", fault: "bad",
};
const NO_SAFETY = "A software stop is not a safety function. The hardware stop button at the arm is required.";
const PICTURE_MS = 200;
const cards = new Map();

export function robotsOf(store) {
  const robots = new Map();
  for (const process of store.processes) {
    for (const [key, value] of Object.entries(process.data)) {
      const match = key.match(/^robot\/([^/]+)\/(.+)$/);
      if (!match) continue;
      if (!robots.has(match[1])) robots.set(match[1], { alive: process.status === "running" });
      robots.get(match[1])[match[2]] = value;
    }
  }
  return robots;
}

export function drawRobots(node, store, command, allowed) {
  const robots = robotsOf(store);
  if (!robots.size) {
    cards.clear();
    return node.replaceChildren(element("div", { class: "empty" },
      "No robot is attached. On the robot's PC: twinrl attach"));
  }
  for (const name of cards.keys()) if (!robots.has(name)) cards.delete(name);
  for (const [name, robot] of robots) {
    if (!cards.has(name)) cards.set(name, robotCard(name, robot, command, allowed));
    cards.get(name).show(robot);
  }
  const wanted = [...cards.values()].map((card) => card.node);
  if (wanted.some((each, i) => node.children[i] !== each) || node.children.length !== wanted.length) {
    node.replaceChildren(...wanted);
  }
}

function controls(name, command, allowed) {
  const locked = allowed ? "" : "Commands need the address with the token that twinrl launch prints";
  const button = (action, kind, text, title, question) => element("button", {
    class: kind, "data-command": action, disabled: !allowed, title: locked || title,
    onclick: () => { if (!question || confirm(question)) command(action, name); },
  }, text);
  return {
    hold: button("hold", "hold", "Hold", "Stand still until released"),
    release: button("release", "release", "Release", "End the hold; never a stop"),
    detach: button("detach", "", "Detach", "Leave after the present episode"),
    estop: button("estop", "estop", "E-stop", "A latched stop in software: not a safety function. It is released on the robot's PC",
      `Stop ${name}? It is released on the robot's PC. ${NO_SAFETY}`),
  };
}

function robotCard(name, robot, command, allowed) {
  const state = element("span", { class: "pill" }), facts = element("dl", { class: "facts" });
  const shadow = element("span", { class: "pill shadow", hidden: true, title: "The policy is asked, the arm is not commanded" }, "shadow");
  const reason = element("p", { class: "reason", hidden: true }), filtered = element("p", { class: "filtered", hidden: true });
  const { hold, release, detach, estop } = controls(name, command, allowed);
  const picture = element("img", { alt: `camera of ${name}`, hidden: true }), message = element("span", {}, "No picture yet");
  const overlay = element("div", { class: "overlay" }), views = element("div", { class: "views", hidden: true });
  const names = robot.cameras ? (Array.isArray(robot.cameras) ? robot.cameras : String(robot.cameras).split(",")) : ["side"];
  let camera = names[0].trim();
  const choice = element("div", { class: "segments" }, ...names.map((each) => element("button", {
    "aria-pressed": String(each.trim() === camera),
    onclick: (event) => {
      camera = each.trim();
      for (const button of choice.children) button.setAttribute("aria-pressed", String(button === event.target));
    },
  }, each.trim())));
  choice.hidden = names.length < 2;
  let alive = true, row = null;

  // What the gateway knows is newer than the figures, which come once a second.
  async function ask() {
    const answer = await fetch(`/api/robot/${encodeURIComponent(name)}`).catch(() => null);
    row = answer && answer.ok ? await answer.json().catch(() => null) : null;
    if (row && row.attached) showState(row.state, row.hold, row.shadow, row.reason);
    drawPath(overlay, views, row && row.attached ? row.last?.path : null, camera, picture);
  }
  function showState(doing, held, inShadow, why) {
    state.textContent = doing;
    state.className = `pill ${alive ? STATES[doing] ?? "good" : "bad"}`;
    shadow.hidden = !inShadow || doing === "shadow";
    hold.hidden = Boolean(held);
    release.hidden = !held;
    reason.textContent = why || (inShadow ? "In shadow: the policy is asked, the arm is not commanded." : "");
    reason.hidden = !reason.textContent;
  }

  const next = () => {
    if (!node.isConnected) return cards.get(name)?.node === node ? setTimeout(next, 1000) : undefined;
    if (document.hidden || !alive) return setTimeout(next, 1000);
    picture.src = `/camera/${encodeURIComponent(name)}/${encodeURIComponent(camera)}.jpg?${Date.now()}`;
  };
  // The next picture is asked for when the last has come: a slow link gets fewer, not a queue.
  picture.onload = async () => {
    picture.hidden = false;
    message.hidden = true;
    await ask();
    setTimeout(next, PICTURE_MS);
  };
  picture.onerror = async () => {
    picture.hidden = true;
    message.hidden = false;
    await ask();
    setTimeout(next, 2000);
  };
  const node = element("article", { class: "robot", "data-robot": name },
    element("header", {}, element("b", {}, name), state, shadow, element("span", { class: "spring" }), hold, release, detach),
    element("div", { class: "stop" }, estop, element("small", {}, NO_SAFETY)),
    element("div", { class: "view" }, message, picture, overlay, choice), views, reason, facts, filtered);
  setTimeout(next, 50);
  return {
    node,
    show(robot) {
      alive = robot.alive;
      const shown = robot.alive ? String(robot.state ?? "running") : "silent";
      // A gateway that knows no `hold` of its own: what the state says.
      const held = robot.hold === undefined ? /held|hold/.test(shown) : Boolean(robot.hold);
      if (!row || !row.attached || !alive) showState(shown, held, Boolean(robot.shadow) && shown !== "gone", "");
      detach.disabled = !allowed || shown === "gone";
      const rows = [["Minutes", number(robot.minutes)], ["Episodes", number(robot.episodes)], ["Success", percent(robot.success)],
        ["Takeovers", number(robot.takeovers)], ["By a person", percent(robot.intervention_rate)],
        ["Minutes by a person", number(robot.intervention_minutes)]];
      facts.replaceChildren(...rows.map(([term, value]) =>
        element("div", {}, element("dt", {}, term), element("dd", {}, value))));
      const causes = Object.entries(robot).filter(([key, value]) => key.startsWith("filter/") && value > 0)
        .map(([key, value]) => [key.slice("filter/".length), value]).sort((a, b) => b[1] - a[1]);
      filtered.hidden = !causes.length;
      filtered.replaceChildren("Safety filter: ", ...causes.map(([cause, n]) =>
        element("span", { class: "cause" }, cause, element("b", {}, number(n)))));
    },
  };
}
