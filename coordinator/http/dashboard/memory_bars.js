// How much of its memory each worker uses, as bars with the numbers beside them.

import { bytes, percent } from "./format.js";
import { memory, workers } from "./state.js";
import { Table } from "./table.js";
import { el, setText } from "./dom.js";

export class MemoryBars {
  constructor() {
    this.table = new Table("Memory by worker", [
      { head: "Worker", rowHead: true, cell: ({ name }) => name },
      { head: "Used", draw: drawUsed },
    ], "No worker has it now.");
    this.element = this.table.element;
  }

  show(names) {
    this.table.show(names.map((name) => [name, {
      name, used: memory.get(name) ?? null, limit: workers.get(name)?.device.memory_bytes ?? 0,
    }]));
  }
}

function drawUsed(td, { name, used, limit }) {
  if (!td.firstChild) td.append(el("div", { class: "used" }, el("meter", { min: 0, max: 1, high: 0.9 }), el("span")));
  const [meter, figure] = td.firstChild.children;
  setText(figure, bytes(used) + (limit ? ` of ${bytes(limit)}` : ""));
  const share = limit && used !== null ? Math.min(1, used / limit) : 0;
  meter.value = share;
  meter.hidden = !limit;
  meter.setAttribute("aria-label", `${name} uses ${limit ? percent(share) : bytes(used)}`);
  setText(meter, percent(share));
}
