// A job's metrics as buckets: fetched once, then added to step by step as they come.

import { jobPath, read } from "./api.js";

const NAMES = ["loss", "step_seconds", "sent_bytes", "gradient_norm", "eval_loss"];
const MOST = 1024;

export class Series {
  constructor(job) {
    this.job = job;
    this.last = 0;
    this.width = 1;
    this.buckets = [];
    this.loading = null;
  }

  // The whole past; calls while it is on its way wait for the same answer.
  load() {
    this.loading ??= read(jobPath(this.job, "curves")).then((found) => {
      this.last = found.last;
      this.width = found.width;
      this.stretches = found.stretches;
      this.buckets = found.first_step.map((first, index) => {
        const bucket = { first, last: found.last_step[index] };
        for (const name of NAMES) {
          const { low, high, mean } = found.values[name];
          if (mean[index] !== null) bucket[name] = { low: low[index], high: high[index], mean: mean[index] };
        }
        return bucket;
      });
    }).finally(() => { this.loading = null; });
    return this.loading;
  }

  // Adds the steps that follow; false when some are missing, so that all must be loaded again.
  add(metrics) {
    for (const metric of metrics) {
      if (metric.step <= this.last) continue;
      if (metric.step !== this.last + 1 || this.buckets.length >= MOST) return false;
      this.#add(metric);
    }
    return true;
  }

  #add(metric) {
    const { step } = metric;
    const tail = this.buckets[this.buckets.length - 1];
    const together = tail && Math.floor((tail.first - 1) / this.width) === Math.floor((step - 1) / this.width);
    const bucket = together ? tail : { first: step, last: step };
    const before = bucket.last - bucket.first + 1;
    for (const name of NAMES) {
      const value = metric[name];
      if (value === null || value === undefined) continue;
      const known = bucket[name];
      bucket[name] = known && together
        ? { low: Math.min(known.low, value), high: Math.max(known.high, value), mean: (known.mean * before + value) / (before + 1) }
        : { low: value, high: value, mean: value };
    }
    bucket.last = step;
    if (!together) this.buckets.push(bucket);
    this.last = step;
  }

  // Points of one metric: step, least, greatest, mean.
  points(name, from = 0) {
    return this.buckets.filter((bucket) => bucket[name] && bucket.last > from)
      .map((bucket) => ({ first: bucket.first, step: bucket.last, ...bucket[name] }));
  }
}
