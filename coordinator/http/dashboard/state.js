// What the page knows of the pool, kept by the stream; pages are told, in groups, what has changed.

import { read } from "./api.js";

export const STORY_LENGTH = 500;
const QUIET_MILLISECONDS = 100;

export const workers = new Map();
export const jobs = new Map();
export const memory = new Map();
export const events = [];
export let traffic = [];
export let known = false; // whether the stream has told all that there is

const listeners = new Set();
let pending = new Map();
let timer = null;
let arriving = null;
let held = null;

// `listener(changes)` gets a map from the kind of change to the list of what came; returns what ends it.
export function listen(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function changed(kind, item) {
  if (!pending.has(kind)) pending.set(kind, []);
  pending.get(kind).push(item);
  timer ??= setTimeout(() => requestAnimationFrame(() => {
    const changes = pending;
    pending = new Map();
    timer = null;
    for (const listener of [...listeners]) listener(changes);
  }), QUIET_MILLISECONDS);
}

function tell(found) {
  const last = events.length ? events[events.length - 1].seq : 0;
  const fresh = found.filter((event) => event.seq > last);
  events.push(...fresh);
  events.splice(0, Math.max(0, events.length - STORY_LENGTH));
  for (const event of fresh) changed("event", event);
}

// What happened while nobody listened comes first; what happens meanwhile waits for it.
async function catchUp() {
  held = [];
  const last = events.length ? events[events.length - 1].seq : 0;
  try {
    tell((await read(`events?after=${last}&newest=${STORY_LENGTH}`)).events);
  } finally {
    const waiting = held ?? [];
    held = null;
    tell(waiting);
  }
}

export const hear = {
  // The stream begins with the present state, which the first pulse ends: what was not in it is gone.
  open() {
    arriving = { workers: new Set(), jobs: new Set() };
    catchUp().catch(() => {});
    changed("open", null);
  },
  worker(worker) {
    arriving?.workers.add(worker.name);
    if (worker.state === "left") workers.delete(worker.name);
    else workers.set(worker.name, worker);
    memory.set(worker.name, worker.memory_used_bytes);
    changed("worker", worker);
  },
  job(job) {
    arriving?.jobs.add(job.id);
    jobs.set(job.id, { ...jobs.get(job.id), ...job });
    changed("job", job);
  },
  metrics(metric) {
    const job = jobs.get(metric.job);
    if (!job || metric.step <= job.step) return;
    const pace = [...(job.pace ?? []), metric.step_seconds].slice(-15);
    Object.assign(job, {
      step: metric.step,
      loss: metric.loss ?? job.loss,
      first_loss: job.first_loss ?? metric.loss,
      step_seconds: metric.step_seconds,
      tokens_per_second: metric.tokens && metric.step_seconds ? metric.tokens / metric.step_seconds : null,
      samples_per_second: metric.samples && metric.step_seconds ? metric.samples / metric.step_seconds : null,
      sent_bytes: job.sent_bytes + metric.sent_bytes,
      pace,
    });
    changed("metrics", metric);
  },
  event(event) {
    if (held) held.push(event);
    else tell([event]);
  },
  log(line) {
    changed("log", line);
  },
  pulse(pulse) {
    if (arriving) {
      for (const name of [...workers.keys()]) if (!arriving.workers.has(name)) workers.delete(name);
      for (const id of [...jobs.keys()]) if (!arriving.jobs.has(id)) jobs.delete(id);
      arriving = null;
      known = true;
      changed("worker", null);
      changed("job", null);
    }
    for (const [name, used] of Object.entries(pulse.memory)) memory.set(name, used);
    traffic = pulse.traffic;
    changed("pulse", pulse);
  },
};

// Seconds until the job is done, by the median of its last steps, which one slow step does not move.
export function secondsLeft(job) {
  const pace = [...(job.pace?.length ? job.pace : [job.step_seconds])].filter(Boolean).sort((a, b) => a - b);
  return job.state === "running" && pace.length ? (job.steps - job.step) * pace[Math.floor(pace.length / 2)] : null;
}
