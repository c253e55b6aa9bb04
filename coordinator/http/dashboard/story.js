// Events as a readable story, the newest first: what went wrong stands out by a sign and a word, not by colour alone.

import { el, setText } from "./dom.js";
import { clock, day } from "./format.js";

const BAD = new Set([
  "worker-lost", "failed", "checkpoint-failed", "checkpoint-copy-failed", "checkpoint-missing", "loss-not-finite",
  "snapshot-damaged", "link-failed",
]);
const WARN = new Set([
  "warning", "adoption", "restarted", "moved", "move-given-up", "no-move", "no-backup", "snapshot-refused", "cancelled",
  "coordinator-restarted", "worker-left", "worker-draining", "link-changed", "speed-corrected",
]);
const GOOD = new Set(["done", "started", "replayed", "stands-by", "worker-joined"]);
const NOTHING = "Nothing has happened yet.";
const SIGNS = { bad: "✕", warn: "!", good: "✓", plain: "·" };

export function tone(event) {
  if (BAD.has(event.event)) return "bad";
  if (WARN.has(event.event)) return "warn";
  return GOOD.has(event.event) ? "good" : "plain";
}

export class Story {
  constructor(label, { withJob = true, length = 500 } = {}) {
    this.withJob = withJob;
    this.length = length;
    this.list = el("ol", { class: "story", "aria-label": label, tabindex: "0" });
    this.empty = el("p", { class: "quiet", text: NOTHING });
    this.element = el("div", {}, this.list, this.empty);
    this.seen = new Set();
    this.day = "";
  }

  add(events) {
    for (const event of events) {
      if (this.seen.has(event.seq)) continue;
      this.seen.add(event.seq);
      this.list.prepend(this.#line(event));
    }
    while (this.list.children.length > this.length) this.list.lastChild.remove();
    this.empty.hidden = this.seen.size > 0;
  }

  // `nothing` is what stands there until something is added.
  clear(nothing = NOTHING) {
    this.seen.clear();
    setText(this.empty, nothing);
    this.list.replaceChildren();
    this.empty.hidden = false;
  }

  #line(event) {
    const kind = tone(event);
    const time = el("time", { text: clock(event.time), datetime: new Date(event.time * 1000).toISOString(), title: day(event.time) });
    const message = el("span", { class: "message" });
    setText(message, event.message);
    const line = el("li", { class: kind },
      time, el("span", { class: "sign", text: SIGNS[kind], "aria-hidden": "true" }),
      el("span", { class: "kind", text: event.event }), message);
    if (this.withJob && event.job) message.append(" ", el("a", { href: `#/job/${encodeURIComponent(event.job)}`, text: event.job }));
    return line;
  }
}
