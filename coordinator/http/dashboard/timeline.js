// The last steps of a pipeline on a canvas: a lane per worker. Forward tasks fill the upper part of a lane, backward tasks the
// lower, as do the gradients of weights that they leave for later, updates both; thin bars at the foot are transfers that arrive; what stays empty is idle.

import { el, setText } from "./dom.js";
import { seconds } from "./format.js";
import { Scale } from "./scale.js";

const LANE = 34;
const BAR = 24;
const TOP = 24;
export const KINDS = [
  ["forward", "forward"], ["backward", "backward"], ["weights", "gradients of weights"], ["update", "update"], ["evaluate", "evaluation"],
  ["activation", "activation on its way"], ["gradient", "gradient on its way"], ["idle", "idle"],
];
const PLACES = { forward: [0, 14], backward: [10, 14], weights: [10, 14], update: [0, BAR], evaluate: [0, BAR], activation: [BAR + 1, 3], gradient: [BAR + 5, 3] };
const LETTERS = { forward: "F", backward: "B", weights: "W", update: "U", evaluate: "E" };

export class Timeline {
  constructor() {
    this.canvas = el("canvas", { class: "timeline", role: "img", tabindex: "0", "aria-label": "Pipeline timeline" });
    this.readout = el("output", { class: "readout" });
    const legend = el("span", { class: "keys" }, ...KINDS.map(([kind, text]) => el("span", { class: `key swatch ${kind}`, text })));
    this.element = el("figure", { class: "chart-box" },
      el("figcaption", {}, legend, this.readout), el("div", { class: "scroll tall" }, this.canvas));
    this.data = { steps: [], workers: [], spans: [] };
    this.cursor = null;
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => this.#choose(null));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.redraw = () => this.#draw();
    this.dark.addEventListener("change", this.redraw);
    this.resized = new ResizeObserver(this.redraw);
    this.resized.observe(this.element);
  }

  close() {
    this.resized.disconnect();
    this.dark.removeEventListener("change", this.redraw);
  }

  show(data) {
    this.data = data;
    this.spans = [...data.spans].sort((a, b) => a.begin - b.begin);
    this.cursor = null;
    this.#draw();
    const { steps } = data;
    this.canvas.setAttribute("aria-label", steps.length
      ? `Pipeline timeline of step ${steps.map(({ step }) => step).join(" and ")} on ${data.workers.length} workers, ` +
        `${seconds(steps[steps.length - 1].end)} long. Arrow keys go through the tasks; the table below has each worker's shares.`
      : "Pipeline timeline: no step has been traced yet");
  }

  #draw() {
    const { steps, workers } = this.data;
    const width = this.element.clientWidth - 2;
    this.canvas.hidden = !steps.length;
    if (width <= 0 || !steps.length) return;
    const height = TOP + workers.length * LANE + 4;
    const scale = devicePixelRatio || 1;
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    this.canvas.style.height = `${height}px`;
    const pen = this.pen = this.canvas.getContext("2d");
    const style = getComputedStyle(this.canvas);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.font = `12px ${style.fontFamily}`;
    pen.textBaseline = "middle";
    this.left = Math.min(width * 0.3, 14 + Math.max(...workers.map((name) => pen.measureText(name).width)));
    this.x = new Scale(0, steps[steps.length - 1].end, this.left, width - 6);
    this.#marks(pen, height, colour);
    workers.forEach((name, index) => {
      const y = TOP + index * LANE;
      pen.fillStyle = colour("idle");
      pen.fillRect(this.left, y, this.x.to - this.left, BAR);
      pen.fillStyle = colour("ink");
      pen.fillText(shortened(pen, name, this.left - 10), 2, y + BAR / 2);
    });
    const lane = new Map(workers.map((name, index) => [name, TOP + index * LANE]));
    pen.textAlign = "center";
    for (const span of this.spans) {
      if (!lane.has(span.worker)) continue;
      const [offset, tall] = PLACES[span.kind];
      const from = this.x.at(span.begin), wide = Math.max(0.75, this.x.at(span.end) - from - 0.5);
      const y = lane.get(span.worker) + offset;
      pen.fillStyle = colour(span.kind);
      pen.fillRect(from, y, wide, tall);
      const text = span.kind in LETTERS ? `${LETTERS[span.kind]}${["forward", "backward", "weights"].includes(span.kind) ? span.micro_batch : ""}` : "";
      if (text && wide > 9 + 7 * text.length) {
        pen.fillStyle = colour("on-bar");
        pen.fillText(text, from + wide / 2, y + tall / 2 + 0.5);
      }
    }
    pen.textAlign = "start";
    const chosen = this.cursor === null ? null : this.spans[this.cursor];
    if (chosen) {
      const [offset, tall] = PLACES[chosen.kind];
      const from = this.x.at(chosen.begin);
      pen.strokeStyle = colour("ink");
      pen.lineWidth = 2;
      pen.strokeRect(from - 1, lane.get(chosen.worker) + offset - 1, Math.max(3, this.x.at(chosen.end) - from + 1), tall + 2);
    }
  }

  #marks(pen, height, colour) {
    const room = Math.max(2, Math.floor((this.x.to - this.left) / 90));
    for (const mark of this.x.marks(room).marks) {
      const x = this.x.at(mark);
      pen.fillStyle = colour("line");
      pen.fillRect(x, TOP - 6, 1, height);
      pen.fillStyle = colour("quiet");
      pen.textAlign = x > this.x.to - 24 ? "end" : "center";
      pen.fillText(mark === 0 ? "0" : seconds(mark), x, 9);
    }
    pen.textAlign = "start";
    for (const { begin } of this.data.steps.slice(1)) {
      pen.fillStyle = colour("accent");
      pen.fillRect(this.x.at(begin), TOP - 6, 1.5, height);
    }
  }

  #point(event) {
    if (!this.x) return;
    const index = Math.floor((event.offsetY - TOP) / LANE);
    const inside = event.offsetY - TOP - index * LANE;
    const time = this.x.back(event.offsetX);
    const slack = (this.x.high - this.x.low) / (this.x.to - this.x.from) * 2;
    const found = this.spans.findIndex((span) => {
      const [offset, tall] = PLACES[span.kind];
      return span.worker === this.data.workers[index] && inside >= offset && inside <= offset + tall &&
        span.begin - slack <= time && time <= span.end + slack;
    });
    this.#choose(found < 0 ? null : found);
  }

  #key(event) {
    const last = (this.spans?.length ?? 0) - 1;
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined || last < 0) return;
    event.preventDefault();
    this.#choose(Math.min(last, Math.max(0, (this.cursor ?? (by < 0 ? last + 1 : -1)) + by)));
  }

  #choose(index) {
    if (index === this.cursor) return;
    this.cursor = index;
    const span = index === null ? null : this.spans[index];
    setText(this.readout, span
      ? `${span.worker}: ${span.kind}${span.sender ? ` from ${span.sender}` : ""} of fragment ${span.fragment}, ` +
        `micro-batch ${span.micro_batch}, step ${span.step}: at ${seconds(span.begin)} for ${seconds(span.end - span.begin)}`
      : "");
    this.#draw();
  }
}

function shortened(pen, text, room) {
  if (pen.measureText(text).width <= room) return text;
  let length = text.length;
  while (length > 1 && pen.measureText(`${text.slice(0, length)}…`).width > room) length -= 1;
  return `${text.slice(0, length)}…`;
}
