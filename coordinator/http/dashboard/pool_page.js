// The pool: its workers and links drawn, and listed.

import { read } from "./api.js";
import { el, Facts, section } from "./dom.js";
import { bits, bytes, count, flops, percent, rate, seconds } from "./format.js";
import { drawState, jobItems, jobTable } from "./jobs_page.js";
import { act, noticeLine } from "./operator.js";
import { jobs, known, memory, traffic, workers } from "./state.js";
import { Table } from "./table.js";
import { TopologyView } from "./topology.js";

const MAP_MILLISECONDS = 5000;
const OLD_MILLISECONDS = 30_000; // links are measured again now and then
const MOST_LINKS = 100;
const MOST_LISTED = 60; // workers: the links of more are too many to list
const LIVE = new Set(["running", "preparing", "queued"]);

export function poolPage(main) {
  const facts = new Facts("The pool in numbers");
  const view = new TopologyView();
  const [notice, say] = noticeLine();
  const running = jobTable();
  const table = workerTable(say);
  const links = linkTable();
  const more = el("p", { class: "quiet" });
  main.append(el("h1", { class: "hidden", text: "Pool" }),
    el("section", { class: "card", "aria-label": "The pool in numbers" }, facts.element),
    section("Topology", view.element), section("Jobs", running.element),
    section("Workers", notice, table.element), section("Links", links.element, more));
  let map = { groups: [], between: [], relayed: [] };
  let measured = null;
  let asked = 0;
  let timer = null;

  function show() {
    const all = [...workers.values()];
    const live = all.filter(({ state }) => state !== "lost");
    const used = live.reduce((sum, { name }) => sum + (memory.get(name) ?? 0), 0);
    const once = (text) => (known ? text : "–");
    facts.show([
      ["Workers", once(count(live.length))],
      ["Busy", once(count(all.filter(({ state }) => state === "busy").length))],
      ["Jobs running", once(count([...jobs.values()].filter(({ state }) => state === "running").length))],
      ["Speed together", once(`${flops(live.reduce((sum, { device }) => sum + device.flops_per_second, 0))}FLOP/s`)],
      ["Memory used", once(bytes(used))],
      ["On the links now", once(rate(traffic.reduce((sum, flow) => sum + flow.bytes_per_second, 0)))],
    ]);
    const drawn = new Set(map.groups.flatMap((group) => group.workers));
    const fresh = all.map(({ name }) => name).filter((name) => !drawn.has(name));
    const groups = map.groups.map((group) => ({ ...group, workers: group.workers.filter((name) => workers.has(name)) }));
    if (fresh.length) {
      groups.push({ name: groups.length ? "just joined" : "pool", kind: "pool", workers: fresh });
      soon(); // for a map that has them
    }
    view.show({ groups: groups.filter((group) => group.workers.length), between: map.between, relayed: map.relayed, traffic, workers });
    table.show(all.map((worker) => [worker.name, worker]), known);
    showLinks();
  }

  // Steps come often, so they touch nothing else.
  function showJobs() {
    running.show(jobItems().filter(([, job]) => LIVE.has(job.state)), known);
  }

  // Every link that was measured or carries something now, the busiest first.
  function showLinks() {
    const rows = new Map((measured ?? []).map((link) => [`${link.from} ${link.to}`, { ...link, flow: 0 }]));
    for (const flow of traffic) {
      const key = `${flow.from} ${flow.to}`;
      rows.set(key, { from: flow.from, to: flow.to, ...rows.get(key), flow: flow.bytes_per_second });
    }
    const sorted = [...rows].sort(([, a], [, b]) => b.flow - a.flow);
    links.show(sorted.slice(0, MOST_LINKS), measured !== null);
    more.textContent = sorted.length > MOST_LINKS ? `The busiest ${MOST_LINKS} of ${count(sorted.length)}; all: fusion workers --links` :
      workers.size > MOST_LISTED ? "Those in use; all that were measured: fusion workers --links" : "";
  }

  async function load() {
    asked = Date.now();
    [map, measured] = await Promise.all([read("map"), workers.size > MOST_LISTED ? [] : read("links").then((found) => found.links, () => [])]);
    show();
  }

  function soon() {
    timer ??= setTimeout(() => {
      timer = null;
      load().catch(() => {});
    }, Math.max(0, asked + MAP_MILLISECONDS - Date.now()));
  }

  show();
  showJobs();
  load().catch(() => {});
  return {
    title: "Pool",
    update(changes) {
      if (changes.has("worker") || changes.has("open") || Date.now() - asked > OLD_MILLISECONDS) soon();
      if (changes.has("job") || changes.has("metrics")) showJobs();
      if (["worker", "job", "pulse"].some((kind) => changes.has(kind))) show();
    },
    close() {
      clearTimeout(timer);
      view.close();
    },
  };
}

function workerTable(say) {
  return new Table("Workers", [
    { head: "Name", rowHead: true, cell: ({ name }) => name },
    { head: "State", draw: drawState },
    {
      head: "Job", draw: (td, { job }) => {
        if (td.dataset.job === (job ?? "")) return;
        td.dataset.job = job ?? "";
        td.replaceChildren(job ? el("a", { href: `#/job/${encodeURIComponent(job)}`, text: job }) : "–");
      },
    },
    { head: "Fragments", cell: ({ fragments }) => fragments.join(", ") || "–" },
    { head: "Device", cell: ({ device }) => `${device.kind}, ${device.threads} thr.` },
    { head: "Speed", number: true, cell: ({ device }) => (device.flops_per_second ? `${flops(device.flops_per_second)}FLOP/s` : "–") },
    {
      head: "Memory", number: true, cell: ({ name, device }) => {
        const used = memory.get(name);
        return device.memory_bytes ? `${bytes(used)} of ${bytes(device.memory_bytes)} (${percent(used / device.memory_bytes)})` : bytes(used);
      },
    },
    {
      head: "", draw: (td, { name, state }) => {
        const button = td.firstChild ?? el("button", {
          type: "button", text: "Drain…", "aria-label": `Drain ${name}`,
          onclick: () => act(`Drain ${name}`, "Its fragments move to other workers, then it leaves the pool.", "Drain it", `workers/${encodeURIComponent(name)}/drain`, say),
        });
        if (!td.firstChild) td.append(button);
        button.hidden = ["lost", "draining"].includes(state);
      },
    },
  ], "No worker yet. The coordinator printed the command that joins one: fusion worker --join …");
}

function linkTable() {
  return new Table("Links", [
    { head: "From", rowHead: true, cell: ({ from }) => from },
    { head: "To", cell: ({ to }) => to },
    { head: "Now", number: true, cell: ({ flow }) => rate(flow) },
    { head: "Bandwidth", number: true, cell: ({ bytes_per_second: speed }) => bits(speed) },
    { head: "Latency", number: true, cell: ({ seconds: latency }) => seconds(latency) },
    { head: "Known by", cell: ({ source, error, relay }) => error || [source, relay && `relayed over ${relay}`].filter(Boolean).join(", ") || "–" },
    { head: "Age", number: true, cell: ({ source, age_seconds: age }) => (source === "declared" ? "–" : seconds(age)) },
  ], "Nothing was measured, and nothing is on its way.");
}
