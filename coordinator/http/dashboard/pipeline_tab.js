// The pipeline of the last traced steps, and how each worker spends a step.

import { jobPath, read } from "./api.js";
import { el, section } from "./dom.js";
import { percent, plural, seconds } from "./format.js";
import { Table } from "./table.js";
import { Timeline } from "./timeline.js";

const LEAST_MILLISECONDS = 2000;
const share = (part) => (row) => `${seconds(row[part])} (${percent(row.step_seconds ? row[part] / row.step_seconds : null)})`;

export function pipelineTab(root, id) {
  const timeline = new Timeline();
  const summary = el("p", { role: "status" });
  const table = new Table("How each worker spends a mean step", [
    { head: "Worker", rowHead: true, cell: ({ worker }) => worker },
    { head: "Forward", number: true, cell: share("forward") },
    { head: "Backward", number: true, cell: share("backward") },
    { head: "Update", number: true, cell: share("update") },
    { head: "Idle", number: true, cell: share("idle") },
    { head: "Step", number: true, cell: ({ step_seconds }) => seconds(step_seconds) },
  ], "Nothing was measured yet.");
  root.append(section("Pipeline", summary, timeline.element), section("A mean step", table.element));
  let timer = null;
  let asked = 0;

  async function load() {
    asked = Date.now();
    const found = await read(jobPath(id, "timeline"));
    timeline.show(found);
    const place = ({ worker }) => found.workers.indexOf(worker);
    table.show(found.shares.sort((a, b) => place(a) - place(b)).map((row) => [row.worker, row]));
    const steps = found.steps.map(({ step }) => step).join(" and ");
    summary.textContent = (found.bubble === null ? "" : `Bubble ${percent(found.bubble)} of the workers' time over the last steps. `) +
      (found.steps.length
        ? `Below: ${found.steps.length > 1 ? "steps" : "step"} ${steps} by the coordinator's clock, ${plural(found.spans.length, "bar")}.`
        : "No step has been traced since the coordinator was started.");
  }

  function soon() {
    timer ??= setTimeout(() => {
      timer = null;
      load().catch(() => {});
    }, Math.max(0, asked + LEAST_MILLISECONDS - Date.now()));
  }

  load().catch((error) => { summary.textContent = `The timeline can't be read: ${error.message}`; });
  return {
    update(changes) {
      if (changes.has("open") || (changes.get("metrics") ?? []).some(({ job }) => job === id)) soon();
    },
    close() {
      clearTimeout(timer);
      timeline.close();
    },
  };
}
