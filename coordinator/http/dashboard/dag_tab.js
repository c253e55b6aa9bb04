// The job's OP-DAG, coloured by worker: a page of its own, drawn again when the plan has changed.

import { jobPath } from "./api.js";
import { el, section } from "./dom.js";
import { jobs } from "./state.js";

export function dagTab(root, id) {
  const address = `/api/v1/${jobPath(id, "diagram")}`;
  const frame = el("iframe", { class: "dag", title: `OP-DAG of ${id}`, sandbox: "allow-scripts" });
  let epoch = null;
  root.append(section("OP-DAG by worker",
    el("p", { class: "quiet" }, "Every box is an operator or a folded module; its colour and its text say which worker runs it. ",
      el("a", { href: address, target: "_blank", rel: "noopener", text: "Open it as a page" })),
    frame));

  function show() {
    const now = jobs.get(id)?.epoch ?? null;
    if (now === epoch) return;
    epoch = now;
    frame.src = address;
  }

  show();
  return { update: (changes) => { if (changes.has("job")) show(); } };
}
