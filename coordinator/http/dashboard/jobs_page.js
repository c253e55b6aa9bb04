// All jobs, the newest first.

import { el, section, setClass, setText } from "./dom.js";
import { count, day, precise, seconds, stateClass } from "./format.js";
import { jobs, known, secondsLeft } from "./state.js";
import { Table } from "./table.js";

export function drawState(td, item) {
  td.firstChild ?? td.append(el("span"));
  setText(td.firstChild, item.state);
  setClass(td.firstChild, `pill ${stateClass(item.state)}`);
}

export function jobTable() {
  return new Table("Jobs", [
    {
      head: "Job", rowHead: true, draw: (td, job) => {
        td.firstChild ?? td.append(el("a", { href: `#/job/${encodeURIComponent(job.id)}`, text: job.id }));
      },
    },
    { head: "State", draw: drawState },
    { head: "Step", number: true, cell: (job) => `${count(job.step)} / ${count(job.steps)}` },
    { head: "Loss", number: true, cell: (job) => precise(job.loss) },
    { head: "Step time", number: true, cell: (job) => seconds(job.step_seconds) },
    { head: "Left", number: true, cell: (job) => seconds(secondsLeft(job)) },
    { head: "Workers", number: true, cell: (job) => count(job.workers.length) },
    { head: "Submitted", cell: (job) => day(job.submitted_at) },
    { head: "Why", cell: (job) => job.reason },
  ], "No job yet. The page “Submit” has the command.");
}

export const jobItems = () => [...jobs.values()].reverse().map((job) => [job.id, job]);

export function jobsPage(main) {
  const table = jobTable();
  const show = () => table.show(jobItems(), known);
  main.append(section("Jobs", table.element));
  show();
  return {
    title: "Jobs",
    update(changes) {
      if (changes.has("job") || changes.has("metrics")) show();
    },
  };
}
