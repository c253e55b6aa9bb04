// Curves over steps as SVG: a line for the mean, a band from least to greatest, a cursor for pointer and arrow keys.

import { el, setText, svg } from "./dom.js";
import { count } from "./format.js";
import { Scale } from "./scale.js";

const MARGIN = { left: 62, right: 14, top: 10, bottom: 28 };
const HEIGHT = 210;

export class LineChart {
  // `lines` are { name, label, dots }; the first is what the cursor walks along. With `zero` the axis begins there, with
  // `base` its marks are round in powers of it.
  constructor(title, lines, format, { zero = false, base = 1 } = {}) {
    Object.assign(this, { title, lines, format, zero, base, points: {}, cursor: null });
    this.drawing = svg("svg", { class: "chart", role: "img", tabindex: "0", "aria-label": title, height: HEIGHT });
    this.readout = el("output", { class: "readout" });
    const keys = lines.length > 1
      ? el("span", { class: "keys" }, ...lines.map(({ label }, index) => el("span", { class: `key line-${index}`, text: label })))
      : null;
    this.element = el("figure", { class: "chart-box" },
      el("figcaption", {}, el("span", { class: "title", text: title }), keys, this.readout), this.drawing);
    this.drawing.addEventListener("pointermove", (event) => this.#point(event.offsetX));
    this.drawing.addEventListener("pointerleave", () => this.#move(null));
    this.drawing.addEventListener("blur", () => this.#move(null));
    this.drawing.addEventListener("keydown", (event) => this.#key(event));
    this.resized = new ResizeObserver(() => this.#draw());
    this.resized.observe(this.drawing);
  }

  close() {
    this.resized.disconnect();
  }

  // `points` is a list of { step, low, high, mean } by the name of each line.
  show(points) {
    this.points = points;
    this.#draw();
  }

  #draw() {
    const width = this.drawing.clientWidth;
    if (!width) return;
    const all = this.lines.flatMap(({ name }) => this.points[name] ?? []);
    const main = this.points[this.lines[0].name] ?? [];
    if (!all.length) {
      this.drawing.replaceChildren(svg("text", { class: "nothing", x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "nothing recorded yet"));
      this.drawing.setAttribute("aria-label", `${this.title}: nothing recorded yet`);
      return;
    }
    this.x = new Scale(all.reduce((low, point) => Math.min(low, point.step), Infinity),
      all.reduce((high, point) => Math.max(high, point.step), 0), MARGIN.left, width - MARGIN.right);
    this.y = new Scale(all.reduce((low, point) => Math.min(low, point.low), this.zero ? 0 : Infinity),
      all.reduce((high, point) => Math.max(high, point.high), -Infinity), HEIGHT - MARGIN.bottom, MARGIN.top);
    const parts = [...this.#axes(width)];
    this.lines.forEach(({ name, dots }, index) => {
      const points = this.points[name] ?? [];
      if (!points.length) return;
      const place = ({ step }, value) => `${this.x.at(step).toFixed(1)} ${this.y.at(value).toFixed(1)}`;
      if (points.some((point) => point.high > point.low)) {
        const edge = [...points.map((point) => place(point, point.high)), ...points.toReversed().map((point) => place(point, point.low))];
        parts.push(svg("path", { class: `band line-${index}`, d: `M${edge.join("L")}Z` }));
      }
      parts.push(svg("path", { class: `line line-${index}`, d: `M${points.map((point) => place(point, point.mean)).join("L")}` }));
      if (dots || points.length === 1) {
        parts.push(...points.slice(-200).map((point) => svg("circle", { class: `dot line-${index}`, cx: this.x.at(point.step), cy: this.y.at(point.mean), r: 3 })));
      }
    });
    this.hair = svg("line", { class: "hair", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
    this.drawing.replaceChildren(...parts, this.hair);
    const last = main[main.length - 1];
    const said = last
      ? `${this.title}: ${this.format(main[0].mean)} at step ${main[0].step}, ${this.format(last.mean)} at step ${last.step}. Arrow keys move along the curve.`
      : this.title;
    this.drawing.setAttribute("aria-label", said);
    this.#move(this.cursor);
  }

  *#axes(width) {
    const bottom = HEIGHT - MARGIN.bottom;
    for (const mark of this.y.marks(4, this.base).marks) {
      const y = this.y.at(mark);
      yield svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y });
      yield svg("text", { class: "mark", x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, this.#mark(mark));
    }
    const room = Math.max(2, Math.floor((width - MARGIN.left) / 90));
    for (const mark of this.x.marks(room).marks.filter(Number.isInteger)) {
      const x = this.x.at(mark);
      yield svg("line", { class: "grid", x1: x, x2: x, y1: bottom, y2: bottom + 4 });
      yield svg("text", { class: "mark", x, y: bottom + 18, "text-anchor": "middle" }, count(mark));
    }
  }

  // Marks are told apart even where the format rounds more than the axis does.
  #mark(value) {
    const { marks, digits } = this.y.marks(4, this.base);
    const texts = new Set(marks.map(this.format));
    return texts.size === marks.length && !/\.\d{3,}/.test(this.format(value)) ? this.format(value) : value.toFixed(Math.min(digits, 6));
  }

  #point(pixel) {
    const main = this.points[this.lines[0].name] ?? [];
    if (!main.length || !this.x) return;
    const step = this.x.back(pixel);
    let low = 0, high = main.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (main[middle].step < step) low = middle + 1;
      else high = middle;
    }
    this.#move(low > 0 && step - main[low - 1].step < main[low].step - step ? low - 1 : low);
  }

  #key(event) {
    const last = (this.points[this.lines[0].name]?.length ?? 0) - 1;
    const page = Math.max(1, Math.round(last / 10));
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -page, PageDown: page, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined || last < 0) return;
    event.preventDefault();
    this.#move(Math.min(last, Math.max(0, (this.cursor ?? last) + by)));
  }

  #move(cursor) {
    const main = this.points[this.lines[0].name] ?? [];
    this.cursor = cursor !== null && cursor < main.length ? cursor : null;
    if (this.cursor === null) {
      this.hair?.setAttribute("visibility", "hidden");
      setText(this.readout, "");
      return;
    }
    const point = main[this.cursor];
    this.hair.setAttribute("visibility", "visible");
    for (const end of ["x1", "x2"]) this.hair.setAttribute(end, this.x.at(point.step));
    const steps = point.first < point.step ? `steps ${count(point.first)}–${count(point.step)}` : `step ${count(point.step)}`;
    const values = this.lines.map(({ name, label }) => {
      const here = (this.points[name] ?? []).find((each) => each.step >= point.first && each.first <= point.step);
      if (!here) return null;
      const spread = here.high > here.low ? ` (${this.format(here.low)} to ${this.format(here.high)})` : "";
      return `${label} ${this.format(here.mean)}${spread}`;
    });
    setText(this.readout, `${steps}: ${values.filter(Boolean).join(", ")}`);
  }
}
