// The plan: fragments and hosts, what crosses each link, and what changed from one plan to the next.

import { jobPath, read } from "./api.js";
import { el, section, setText } from "./dom.js";
import { bytes, count, flops, plural, rate, seconds } from "./format.js";
import { jobs } from "./state.js";
import { Table } from "./table.js";

const LEAST_MILLISECONDS = 3000;
const modules = ({ first_module: first, last_module: last }) => (first === last ? first || "–" : `${first || "–"} … ${last || "–"}`);
const ratio = (plain, wire) => (wire > 0 ? `${(plain / wire).toFixed(plain / wire < 10 ? 2 : 0)} ×` : "–");

export function planTab(root, id) {
  const summary = el("p", { class: "quiet" });
  const fragments = new Table("Fragments", [
    { head: "Fragment", rowHead: true, cell: ({ index }) => count(index) },
    { head: "Worker", cell: ({ worker }) => worker },
    { head: "Backup", cell: ({ backup }) => backup ?? "–" },
    { head: "Modules", cell: modules },
    { head: "Ops", number: true, cell: ({ ops }) => count(ops) },
    { head: "Parameters", number: true, cell: ({ parameter_bytes: size }) => bytes(size) },
    { head: "FLOP per micro-batch, forward + backward", number: true, cell: (fragment) => flops(fragment.flops + fragment.backward_flops) },
  ], "No plan yet.");
  const links = new Table("Links of the job", [
    { head: "From", rowHead: true, cell: (link) => link.from },
    { head: "To", cell: ({ to }) => to },
    { head: "Codec", cell: ({ codecs }) => codecs.join(", ") },
    { head: "Plain per step", number: true, cell: (link) => bytes(link.plain_bytes) },
    { head: "On the wire", number: true, cell: (link) => bytes(link.wire_bytes) },
    { head: "Ratio", number: true, cell: (link) => ratio(link.plain_bytes, link.wire_bytes) },
    { head: "Measured per step", number: true, cell: (link) => bytes(link.measured_bytes) },
    { head: "Now", number: true, cell: (link) => rate(link.bytes_per_second) },
  ], "Nothing crosses a link: one worker has it all.");
  const history = el("div", { class: "plans" });
  root.append(section("Fragments", summary, fragments.element), section("Links", links.element), section("Plans, the newest first", history));
  let asked = 0;
  let timer = null;

  function showFragments() {
    const job = jobs.get(id);
    if (!job) return;
    const { plan } = job;
    setText(summary, plan
      ? `${plan.policy}, ${plan.schedule}, ${plural(job.fragments.length, "fragment")}` +
        (plan.predicted_step_seconds ? `, predicted ${seconds(plan.predicted_step_seconds)} per step, measured ${seconds(job.step_seconds)}` : "")
      : "No plan yet.");
    fragments.show(job.fragments.map((fragment) => [fragment.index, { ...fragment, backup: job.backups[fragment.index] }]));
  }

  async function load() {
    asked = Date.now();
    const [found, { plans }] = await Promise.all([read(jobPath(id, "links")), read(jobPath(id, "plans"))]);
    links.show(found.links.map((link) => [`${link.from} ${link.to}`, link]));
    history.replaceChildren(...plans.map((each, index) => card(each, plans[index - 1])).reverse());
  }

  function soon() {
    timer ??= setTimeout(() => {
      timer = null;
      load().catch(() => {});
    }, Math.max(0, asked + LEAST_MILLISECONDS - Date.now()));
  }

  showFragments();
  load().catch((error) => setText(summary, `The plan can't be read: ${error.message}`));
  return {
    update(changes) {
      if (changes.has("job") || changes.has("metrics")) showFragments();
      if (["open", "pulse", "job"].some((kind) => changes.has(kind))) soon();
    },
    close: () => clearTimeout(timer),
  };
}

// One plan, and what it changed of the one before.
function card({ plan, fragments, first_step: first, steps, mean_step_seconds: mean }, before) {
  const moved = (fragment) => {
    const host = before && before.plan.cuts.join() === plan.cuts.join() ? before.plan.placement[fragment.index] : null;
    return host && host !== fragment.worker ? host : null;
  };
  const moves = fragments.filter(moved).length;
  const faster = mean && before?.mean_step_seconds ? before.mean_step_seconds / mean : null;
  const facts = [
    plan.policy,
    plan.predicted_step_seconds ? `predicted ${seconds(plan.predicted_step_seconds)}` : null,
    steps ? `measured ${seconds(mean)} over ${plural(steps, "step")} from step ${count(first)}` : "no step recorded under it",
    faster ? `${faster >= 1 ? `${faster.toFixed(2)} × as fast` : `${(1 / faster).toFixed(2)} × as slow`} as the plan before` : null,
    before ? `${plural(moves, "fragment")} moved` : null,
  ];
  return el("article", { class: "plan", "aria-label": `Plan of epoch ${plan.epoch}` },
    el("h3", { text: `Epoch ${plan.epoch}` }), el("p", { class: "quiet", text: facts.filter(Boolean).join(" · ") }),
    el("ol", { class: "placement" }, ...fragments.map((fragment) => {
      const from = moved(fragment);
      return el("li", { class: from ? "moved" : null, title: modules(fragment) },
        el("span", { class: "quiet", text: `${fragment.index} ` }), fragment.worker, from ? el("span", { class: "from", text: ` ← ${from}` }) : null);
    })));
}
