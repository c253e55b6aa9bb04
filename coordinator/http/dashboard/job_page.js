// One job: what it is and what can be done about it, above tabs of which one is shown.

import { jobPath } from "./api.js";
import { dagTab } from "./dag_tab.js";
import { curvesTab } from "./curves_tab.js";
import { el, setClass, setText, Facts } from "./dom.js";
import { bytes, count, pace, precise, seconds, stateClass } from "./format.js";
import { logsTab } from "./logs_tab.js";
import { act, noticeLine } from "./operator.js";
import { pipelineTab } from "./pipeline_tab.js";
import { planTab } from "./plan_tab.js";
import { jobs, secondsLeft } from "./state.js";

const TABS = [
  ["", "Curves", curvesTab],
  ["pipeline", "Pipeline", pipelineTab],
  ["plan", "Plan and links", planTab],
  ["dag", "OP-DAG", dagTab],
  ["logs", "Events and logs", logsTab],
];
const ENDED = new Set(["done", "failed", "cancelled"]);

export function jobPage(main, id, tab = "") {
  const home = `#/job/${encodeURIComponent(id)}`;
  const title = el("h1", { text: id });
  const state = el("span", { class: "pill", text: "…" });
  const reason = el("p", { class: "quiet" });
  const bar = el("progress", { max: 1, value: 0, "aria-label": "Steps done" });
  const facts = new Facts("The job in numbers");
  const [notice, say] = noticeLine();
  const cancel = el("button", {
    type: "button", text: "Cancel…",
    onclick: () => act(`Cancel ${id}`, "The job ends; its last checkpoint stays.", "Cancel the job", jobPath(id, "cancel"), say),
  });
  const links = TABS.map(([name, text]) =>
    el("a", { href: name ? `${home}/${name}` : home, text, "aria-current": name === tab ? "page" : null }));
  const content = el("div", { class: "tab" });
  const missing = el("p", { class: "quiet", text: `No job ${id} here (yet).` });
  const head = el("section", { class: "card", "aria-label": `Job ${id}` },
    el("div", { class: "row" }, title, state, el("span", { class: "spacer" }), cancel), notice, reason, bar, facts.element);
  main.append(head, el("nav", { class: "tabs", "aria-label": "Parts of the job" }, ...links), missing, content);
  const [, , make] = TABS.find(([name]) => name === tab) ?? TABS[0];
  let part = null;

  function show() {
    const job = jobs.get(id);
    missing.hidden = Boolean(job);
    head.hidden = !job;
    if (!job) return;
    setText(state, job.state);
    setClass(state, `pill ${stateClass(job.state)}`);
    setText(reason, job.reason);
    reason.hidden = !job.reason;
    bar.value = job.step / job.steps;
    cancel.hidden = ENDED.has(job.state);
    facts.show([
      ["Step", `${count(job.step)} / ${count(job.steps)}`],
      ["Loss", precise(job.loss)],
      ["First loss", precise(job.first_loss)],
      ["Step time", seconds(job.step_seconds)],
      ["Speed", pace(job)],
      ["Left", seconds(secondsLeft(job))],
      ["Sent", bytes(job.sent_bytes)],
      ["Workers", count(job.workers.length)],
      ["Plan epoch", count(job.epoch)],
      ["Recoveries", count(job.recoveries)],
      ["Restarts", count(job.restarts)],
      ["Checkpoint", job.checkpoint === null ? "none" : `step ${count(job.checkpoint)}`],
    ]);
    if (!part) part = make(content, id);
  }

  show();
  return {
    title: id,
    update(changes) {
      if (["job", "metrics", "open"].some((kind) => changes.has(kind))) show();
      part?.update?.(changes);
    },
    close: () => part?.close?.(),
  };
}
