// The pool drawn: groups (regions or fences) as boxes, workers as cards in them, links between groups by their bandwidth, and
// over them what flows just now, with its sum in words. In a large pool workers are small squares, and flows go between groups.

import { el, svg } from "./dom.js";
import { bits, plural, rate, seconds } from "./format.js";

const MOST_CARDS = 40;
const CARD = { width: 132, height: 46, gap: 44, below: 34 };
const DOT = { width: 20, height: 20, gap: 6, below: 6 };
const PAD = 14;
const HEAD = 30;
const FOOT = 28;
const FAINT = 0.005; // of the strongest flow
const SIGNS = { idle: "○", busy: "●", draining: "◐", joined: "◌", lost: "✕" };

export class TopologyView {
  constructor() {
    this.drawing = svg("svg", { class: "topology", role: "img", "aria-label": "The pool" });
    const key = ["idle", "busy", "draining", "lost"].map((state) => el("span", { class: "key", text: `${SIGNS[state]} ${state}` }));
    this.element = el("figure", { class: "chart-box" }, this.drawing,
      el("figcaption", {}, el("span", { class: "keys" }, ...key,
        el("span", { class: "key", text: "▬ link, the thicker the faster" }), el("span", { class: "key", text: "┅ over a relay" }), el("span", { class: "key flow-key", text: "⇢ bytes on their way" }))));
    this.shown = { groups: [], between: [], relayed: [], traffic: [], workers: new Map() };
    this.resized = new ResizeObserver(() => this.#draw());
    this.resized.observe(this.element);
  }

  close() {
    this.resized.disconnect();
  }

  // `groups`, `between` and `relayed` as the map gives them, `traffic` as the pulse does, `workers` by name.
  show(shown) {
    this.shown = shown;
    this.#draw();
  }

  #draw() {
    const { groups, between, relayed, traffic, workers } = this.shown;
    const width = this.element.clientWidth - 2;
    if (width <= 0) return;
    const total = groups.reduce((sum, group) => sum + group.workers.length, 0);
    const size = total > MOST_CARDS ? DOT : CARD;
    const { boxes, spots, height } = layOut(groups, width, size);
    const home = new Map(groups.flatMap((group, index) => group.workers.map((name) => [name, { name: group.name, index }])));
    const layers = { boxes: svg("g"), links: svg("g"), flows: svg("g"), workers: svg("g"), labels: svg("g") };
    const there = ({ workers: names }) => names.filter((name) => (workers.get(name)?.state ?? "lost") !== "lost").length;
    groups.forEach((group, index) => drawBox(layers.boxes, boxes[index], group.name, there(group)));
    const drawn = new Set();
    const indexOf = new Map(groups.map((group, index) => [group.name, index]));
    const sums = byGroup(traffic, home);
    const now = (a, b) => sums.get(`${a} ${b}`)?.bytes_per_second ?? 0;
    // Groups between which something flows are joined, whether or not their link was measured.
    for (const link of [...between, ...sums.values()]) {
      const [a, b] = [indexOf.get(link.from), indexOf.get(link.to)];
      if (a === undefined || b === undefined || drawn.has(`${Math.min(a, b)} ${Math.max(a, b)}`)) continue;
      drawn.add(`${Math.min(a, b)} ${Math.max(a, b)}`);
      if (a === b) drawInner(layers.labels, boxes[a], link, now(a, a));
      else drawLink(layers, boxes[a], boxes[b], link, now(a, b), now(b, a));
    }
    if (size === CARD) for (const pair of relayed) drawRelayed(layers.links, spots.get(pair.from), spots.get(pair.to), pair);
    const flows = size === CARD
      ? traffic.map((flow) => ({ ...flow, a: spots.get(flow.from), b: spots.get(flow.to) }))
      : [...sums.values()].filter(({ from, to }) => from !== to).map((flow) => ({ ...flow, a: centre(boxes[indexOf.get(flow.from)]), b: centre(boxes[indexOf.get(flow.to)]) }));
    const least = FAINT * flows.reduce((most, flow) => Math.max(most, flow.bytes_per_second), 0);
    for (const flow of flows) if (flow.a && flow.b && flow.bytes_per_second > least) drawFlow(layers, flow, size);
    for (const [name, spot] of spots) drawWorker(layers.workers, spot, name, workers.get(name), size);
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.drawing.setAttribute("height", height);
    this.drawing.replaceChildren(arrowHead(), ...Object.values(layers));
    for (const words of layers.labels.querySelectorAll("text")) putGroundBehind(words);
    const sum = traffic.reduce((all, flow) => all + flow.bytes_per_second, 0);
    this.drawing.setAttribute("aria-label",
      `${plural(groups.reduce((sum, group) => sum + there(group), 0), "worker")} in ${groups.map((group) => `${group.name} (${there(group)})`).join(", ") || "no group"}; ` +
      `${rate(sum)} between them now${relayed.length ? `; ${plural(relayed.length, "pair")} over a relay` : ""}. The tables below have every worker and link.`);
  }
}

const centre = (box) => ({ x: box.x + box.width / 2, y: box.y + box.height / 2 });

// Boxes side by side as far as the width goes, with room between them for the links' words.
function layOut(groups, width, size) {
  const lane = width < 620 ? 64 : 190;
  const stacked = width < 620;
  const columns = (count, room) => Math.max(1, Math.min(count, Math.floor((room - 2 * PAD + size.gap) / (size.width + size.gap))));
  const boxes = [];
  const spots = new Map();
  let y = 0, tall = 0;
  const perRow = stacked ? 1 : Math.min(groups.length || 1, width > 1000 ? 3 : 2);
  const most = stacked ? width : (width - lane * (perRow - 1)) / perRow;
  groups.forEach((group, index) => {
    // A column for a few, so that flows to other groups fan out.
    const wanted = size === CARD ? (group.workers.length <= 4 ? 1 : Math.ceil(Math.sqrt(group.workers.length))) : group.workers.length;
    const across = stacked ? columns(group.workers.length, most) : Math.min(columns(group.workers.length, most), Math.max(1, groups.length === 1 ? group.workers.length : wanted));
    const down = Math.ceil(group.workers.length / across) || 1;
    const box = {
      across,
      width: Math.max(stacked ? width : 250, across * (size.width + size.gap) - size.gap + 2 * PAD),
      height: HEAD + down * (size.height + size.below) - size.below + FOOT,
    };
    box.width = Math.min(box.width, most);
    if (index % perRow === 0 && index > 0) {
      y += tall + (stacked ? lane : 90);
      tall = 0;
    }
    box.y = y;
    tall = Math.max(tall, box.height);
    boxes.push(box);
  });
  for (let start = 0; start < boxes.length; start += perRow) {
    const row = boxes.slice(start, start + perRow);
    let x = (width - row.reduce((sum, box) => sum + box.width, lane * (row.length - 1))) / 2;
    for (const box of row) {
      box.x = x;
      x += box.width + lane;
    }
  }
  groups.forEach((group, index) => {
    const box = boxes[index], { across } = box;
    const inside = (box.width - (across * (size.width + size.gap) - size.gap)) / 2;
    group.workers.forEach((name, place) => spots.set(name, {
      x: box.x + inside + (place % across) * (size.width + size.gap) + size.width / 2,
      y: box.y + HEAD + Math.floor(place / across) * (size.height + size.below) + size.height / 2,
      group: index,
    }));
  });
  return { boxes, spots, height: Math.max(60, y + tall + 2) };
}

// Sums by pair of groups, named as the links between groups are.
function byGroup(traffic, home) {
  const sums = new Map();
  for (const { from, to, bytes_per_second: speed } of traffic) {
    const [a, b] = [home.get(from), home.get(to)];
    if (!a || !b) continue;
    const key = `${a.index} ${b.index}`;
    sums.set(key, { from: a.name, to: b.name, bytes_per_second: (sums.get(key)?.bytes_per_second ?? 0) + speed, flowing: true });
  }
  return sums;
}

function drawBox(layer, box, name, count) {
  layer.append(svg("rect", { class: "group", x: box.x, y: box.y, width: box.width, height: box.height, rx: 12 }),
    svg("text", { class: "group-name", x: box.x + PAD, y: box.y + 20, text: `${name} · ${count}` }));
}

// What is known of a link in words; a flow alone says nothing of its link.
function words({ bytes_per_second: speed, seconds: latency, source, relay, flowing }) {
  const known = [source === "declared" ? "" : source, relay && `relayed over ${relay}`].filter(Boolean).join(", ");
  return flowing ? "" : `${bits(speed)}, ${seconds(latency)}${known ? ` (${known})` : ""}`;
}

function drawInner(layer, box, link, now) {
  const text = [words(link), now ? `${rate(now)} now` : ""].filter(Boolean).join(" · ");
  const end = box.x + box.width - PAD;
  layer.append(svg("text", { class: "link-words", x: end, y: box.y + box.height - 8, "text-anchor": "end", text }));
}

// Flows pass below words, not through them.
function putGroundBehind(words) {
  const { x, y, width, height } = words.getBBox();
  words.before(svg("rect", { class: words.classList.contains("over") ? "behind over" : "behind", x: x - 3, y, width: width + 6, height, rx: 3 }));
}

// The thicker, the more bits: a tenth of the speed takes about a pixel off.
const thickness = (speed) => Math.max(1, Math.min(9, Math.log10(Math.max(speed, 1)) - 2.5));

function drawLink(layers, a, b, link, there, back) {
  const [from, to] = [edgeOf(a, centre(b)), edgeOf(b, centre(a))];
  if (!link.flowing) {
    layers.links.append(svg("line", {
      class: link.relay ? "link relayed" : "link", x1: from.x, y1: from.y, x2: to.x, y2: to.y, "stroke-width": thickness(link.bytes_per_second),
    }));
  }
  const middle = { x: (from.x + to.x) / 2, y: (from.y + to.y) / 2 };
  // Beside a line that goes down, above and below one that goes across.
  const steep = Math.abs(to.y - from.y) > Math.abs(to.x - from.x);
  const arrows = steep ? ["↓", "↑"] : from.x < to.x ? ["→", "←"] : ["←", "→"];
  const lines = [words(link), there || back ? `${arrows[0]} ${rate(there)}  ${arrows[1]} ${rate(back)}` : ""];
  lines.forEach((text, index) => text && layers.labels.append(svg("text", {
    class: `${index ? "flow-words" : "link-words"} over`, x: middle.x + (steep ? 14 : 0),
    y: middle.y + (steep ? [-4, 14] : [-34, 42])[index], "text-anchor": steep ? "start" : "middle", text,
  })));
}

// Two workers that meet at a relay.
function drawRelayed(layer, a, b, { from, to, relay }) {
  if (!a || !b) return;
  layer.append(svg("line", { class: "link relayed pair", x1: a.x, y1: a.y, x2: b.x, y2: b.y },
    svg("title", { text: `${from} and ${to} can't reach each other: relayed over ${relay}` })));
}

// Where the line from the middle of the box to `target` leaves it.
function edgeOf(box, target) {
  const middle = centre(box);
  const [dx, dy] = [target.x - middle.x, target.y - middle.y];
  const share = Math.min(Math.abs(box.width / 2 / (dx || 1e-9)), Math.abs(box.height / 2 / (dy || 1e-9)));
  return { x: middle.x + dx * share, y: middle.y + dy * share };
}

function drawFlow(layers, { a, b, from, to, bytes_per_second: speed }, size) {
  const cut = (near, far) => edgeOf({ x: near.x - size.width / 2, y: near.y - size.height / 2, width: size.width, height: size.height }, far);
  const [begin, end] = [cut(a, b), cut(b, a)];
  const [dx, dy] = [end.x - begin.x, end.y - begin.y];
  const length = Math.hypot(dx, dy) || 1;
  // The two directions of a pair bend to different sides.
  const bend = Math.min(36, 8 + length * 0.12);
  const middle = { x: (begin.x + end.x) / 2 - (dy / length) * bend, y: (begin.y + end.y) / 2 + (dx / length) * bend };
  layers.flows.append(svg("path", {
    class: "flow", d: `M${begin.x} ${begin.y}Q${middle.x} ${middle.y} ${end.x} ${end.y}`, "stroke-width": thickness(speed) * 0.5 + 0.5, "marker-end": "url(#flow-head)",
  }, svg("title", { text: `${from} → ${to}: ${rate(speed)}` })));
}

const arrowHead = () => svg("defs", {}, svg("marker", { id: "flow-head", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, markerUnits: "userSpaceOnUse", orient: "auto" },
  svg("path", { d: "M0 0L8 4L0 8z" })));

function drawWorker(layer, spot, name, worker, size) {
  const state = worker?.state ?? "lost";
  const g = svg("g", { class: `worker ${state}`, transform: `translate(${spot.x - size.width / 2} ${spot.y - size.height / 2})` },
    svg("title", { text: `${name}: ${state}${worker?.job ? `, ${worker.job}` : ""}` }),
    svg("rect", { width: size.width, height: size.height, rx: size === CARD ? 8 : 5 }));
  if (size === CARD) {
    const clip = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
    g.append(svg("text", { class: "sign", x: 10, y: 19, text: SIGNS[state] ?? "" }), svg("text", { class: "name", x: 26, y: 19, text: clip(name, 14) }),
      svg("text", { class: "job", x: 10, y: 36, text: clip(worker?.job ? `${worker.fragments.join(", ")} of ${worker.job}` : state, 19) }));
  } else {
    g.append(svg("text", { class: "sign", x: size.width / 2, y: 14, "text-anchor": "middle", text: SIGNS[state] ?? "" }));
  }
  layer.append(g);
}
