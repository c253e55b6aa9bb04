// A table whose rows are known by key: only what has changed is touched, so that hundreds of rows stay smooth.

import { el, setText } from "./dom.js";

// A column is { head, cell(item) -> text } or { head, draw(td, item) }; `number` aligns it to the right.
export class Table {
  constructor(caption, columns, empty) {
    this.columns = columns;
    this.body = el("tbody");
    this.rows = new Map();
    const heads = columns.map(({ head, number }) => el("th", { text: head, scope: "col", class: number && "number" }));
    this.table = el("table", {}, el("caption", { class: "hidden", text: caption }), el("thead", {}, el("tr", {}, ...heads)), this.body);
    this.none = empty;
    this.empty = el("p", { class: "quiet" });
    this.element = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, this.table, this.empty);
    this.show([], false);
  }

  // `items` are [key, item], in order. Until all that there are is `known`, none is no news.
  show(items, known = true) {
    const keys = new Set();
    let previous = null;
    for (const [key, item] of items) {
      keys.add(key);
      const row = this.rows.get(key) ?? this.#make(key);
      this.columns.forEach((column, index) => {
        const cell = row.cells[index];
        if (column.draw) column.draw(cell, item);
        else setText(cell, column.cell(item));
      });
      const next = previous ? previous.nextSibling : this.body.firstChild;
      if (next !== row) this.body.insertBefore(row, next);
      previous = row;
    }
    for (const [key, row] of this.rows) {
      if (keys.has(key)) continue;
      row.remove();
      this.rows.delete(key);
    }
    this.table.hidden = keys.size === 0;
    this.empty.hidden = keys.size > 0;
    setText(this.empty, known ? this.none : "Asking the coordinator…");
  }

  #make(key) {
    const cells = this.columns.map(({ number, rowHead }) =>
      el(rowHead ? "th" : "td", { class: number && "number", scope: rowHead && "row" }));
    const row = el("tr", {}, ...cells);
    this.rows.set(key, row);
    return row;
  }
}
