// The dashboard: one stream of the whole pool keeps workers, jobs and the story; the chosen job's past is fetched once.

import { LossChart } from "./chart.js";
import { bytes, clock, count, flops, loss, seconds, stateClass } from "./format.js";

const STORY_LENGTH = 400;
const at = (id) => document.getElementById(id);
const workers = new Map();
const jobs = new Map();
const told = new Set();
const chart = new LossChart(at("chart"));
let chosen = decodeURIComponent(location.hash.slice(1)) || null;
let followsNewest = chosen === null;

// Everything is set as text: nothing that a job or worker is called can become markup.
function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

function row(...cells) {
  const made = document.createElement("tr");
  for (const cell of cells) {
    const td = document.createElement("td");
    if (cell instanceof Node) td.append(cell);
    else if (typeof cell === "object") { td.textContent = cell.number; td.className = "number"; }
    else td.textContent = cell;
    made.append(td);
  }
  return made;
}

const pill = (state) => element("span", state, `pill ${stateClass(state)}`);
const number = (text) => ({ number: text });

function showWorkers() {
  const rows = [...workers.values()].map((worker) => row(
    worker.name,
    pill(worker.state),
    worker.job ?? "",
    worker.fragments.join(", "),
    `${worker.device.kind}, ${worker.device.threads} thread${worker.device.threads === 1 ? "" : "s"}`,
    number(worker.device.flops_per_second ? `${flops(worker.device.flops_per_second)}FLOP/s` : "–"),
    number(worker.device.memory_bytes ? bytes(worker.device.memory_bytes) : "–"),
  ));
  at("workers").tBodies[0].replaceChildren(...rows);
  at("workers").hidden = rows.length === 0;
  at("no-workers").hidden = rows.length > 0;
}

function showJobs() {
  const rows = [...jobs.values()].reverse().map((job) => {
    const button = element("button", job.id);
    button.type = "button";
    button.addEventListener("click", () => choose(job.id, false));
    const made = row(
      button, pill(job.state), number(`${count(job.step)} / ${count(job.steps)}`), number(loss(job.loss)), job.workers.join(", "),
    );
    made.classList.toggle("chosen", job.id === chosen);
    return made;
  });
  at("jobs").tBodies[0].replaceChildren(...rows);
  at("jobs").hidden = rows.length === 0;
  at("no-jobs").hidden = rows.length > 0;
}

function showJob() {
  const job = jobs.get(chosen);
  at("job").hidden = !job;
  if (!job) return;
  at("job-title").textContent = job.id;
  at("job-state").textContent = job.state;
  at("job-state").className = `pill ${stateClass(job.state)}`;
  at("job-reason").textContent = job.reason;
  at("job-progress").value = job.step / job.steps;
  const left = job.state === "running" && job.step_seconds ? seconds((job.steps - job.step) * job.step_seconds) : "–";
  const numbers = [
    ["Step", `${count(job.step)} / ${count(job.steps)}`],
    ["Loss", loss(job.loss)],
    ["First loss", loss(job.first_loss)],
    ["Step time", seconds(job.step_seconds)],
    ["Tokens/s", count(job.tokens_per_second)],
    ["Sent", bytes(job.sent_bytes)],
    ["Left", left],
    ["Plan epoch", job.epoch],
    ["Checkpoint", job.checkpoint === null ? "none" : `step ${job.checkpoint}`],
  ];
  at("job-numbers").replaceChildren(...numbers.map(([name, value]) => {
    const pair = document.createElement("div");
    pair.append(element("dt", name), element("dd", String(value)));
    return pair;
  }));
  const plan = job.plan;
  at("plan-summary").textContent = plan
    ? `${plan.policy}, ${plan.schedule}, ${job.fragments.length} fragment${job.fragments.length === 1 ? "" : "s"}` +
      (plan.predicted_step_seconds ? `, predicted ${seconds(plan.predicted_step_seconds)} per step` : "")
    : "No plan yet.";
  at("plan").tBodies[0].replaceChildren(...job.fragments.map((fragment) => row(
    number(fragment.index),
    fragment.worker,
    fragment.first_module === fragment.last_module ? fragment.first_module : `${fragment.first_module} … ${fragment.last_module}`,
    number(count(fragment.ops)),
    number(bytes(fragment.parameter_bytes)),
    number(flops(fragment.flops)),
  )));
  at("plan").hidden = job.fragments.length === 0;
}

async function choose(id, automatic) {
  if (!automatic) {
    followsNewest = false;
    history.replaceState(null, "", `#${encodeURIComponent(id)}`);
  }
  chosen = id;
  chart.clear();
  showJobs();
  showJob();
  await loadMetrics(id);
}

async function loadMetrics(id) {
  for (;;) {
    const answer = await fetch(`/api/v1/jobs/${encodeURIComponent(id)}/metrics?after=${chart.last}`);
    if (!answer.ok || id !== chosen) return;
    const { metrics } = await answer.json();
    if (id !== chosen) return;
    metrics.forEach((metric) => chart.add(metric));
    if (metrics.length === 0) return;
  }
}

function tell(event) {
  if (told.has(event.seq)) return;
  told.add(event.seq);
  const item = document.createElement("li");
  const time = element("time", clock(event.time));
  time.dateTime = new Date(event.time * 1000).toISOString();
  const bad = ["worker-lost", "failed", "checkpoint-failed", "warning", "loss-not-finite"].includes(event.event);
  item.append(time, element("span", event.message, bad ? "warn" : event.event === "done" ? "good" : ""));
  at("story").prepend(item);
  while (at("story").children.length > STORY_LENGTH) at("story").lastChild.remove();
}

const hear = {
  worker(worker) {
    if (worker.state === "left") workers.delete(worker.name);
    else workers.set(worker.name, worker);
    showWorkers();
  },
  job(job) {
    const known = jobs.has(job.id);
    jobs.set(job.id, job);
    if (chosen === null || (!known && followsNewest)) choose(job.id, true);
    else showJobs();
    if (job.id === chosen) showJob();
  },
  metrics(metric) {
    const job = jobs.get(metric.job);
    if (!job) return;
    const tokens = metric.tokens && metric.step_seconds ? metric.tokens / metric.step_seconds : null;
    Object.assign(job, {
      step: metric.step,
      loss: metric.loss,
      first_loss: job.first_loss ?? metric.loss,
      step_seconds: metric.step_seconds,
      tokens_per_second: tokens,
      sent_bytes: job.sent_bytes + metric.sent_bytes,
    });
    showJobs();
    if (metric.job === chosen) {
      showJob();
      // Live steps wait for the past to be there, so that the curve has no gap.
      if (metric.step === chart.last + 1) chart.add(metric);
      else loadMetrics(chosen);
    }
  },
  event: tell,
  log() {},
};

async function begin() {
  const health = await (await fetch("/healthz")).json();
  at("version").textContent = `version ${health.version}`;
  let last = 0;
  for (;;) {
    const { events } = await (await fetch(`/api/v1/events?after=${last}`)).json();
    events.slice(-STORY_LENGTH).forEach(tell);
    if (events.length === 0) break;
    last = events[events.length - 1].seq;
  }
  const stream = new EventSource("/api/v1/stream");
  stream.addEventListener("open", () => {
    // The stream begins with the present state: what is gone must not stay.
    workers.clear();
    showWorkers();
    at("connection").textContent = "live";
    at("connection").className = "pill good";
    if (chosen !== null) loadMetrics(chosen);
  });
  stream.addEventListener("error", () => {
    at("connection").textContent = "connection lost, trying again";
    at("connection").className = "pill bad";
  });
  for (const [kind, handler] of Object.entries(hear)) {
    stream.addEventListener(kind, (message) => handler(JSON.parse(message.data)));
  }
  showJobs();
  showWorkers();
}

begin().catch((error) => {
  at("connection").textContent = `can't read the coordinator: ${error.message}`;
  at("connection").className = "pill bad";
});
