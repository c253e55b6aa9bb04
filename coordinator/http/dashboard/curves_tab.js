// The curves of a job, and the memory of its workers.

import { el, section } from "./dom.js";
import { bytes, count, perSecond, precise, seconds } from "./format.js";
import { LineChart } from "./line_chart.js";
import { MemoryBars } from "./memory_bars.js";
import { Series } from "./series.js";
import { jobs } from "./state.js";

const RANGES = [["all steps", 0], ["last 1,000", 1000], ["last 100", 100]];

export function curvesTab(root, id) {
  const series = new Series(id);
  const perStep = (unit) => {
    const job = jobs.get(id);
    const speed = job?.[`${unit}_per_second`];
    // A step always has the same number of them.
    return speed && job.step_seconds ? speed * job.step_seconds : null;
  };
  const charts = {
    loss: new LineChart("Loss", [{ name: "loss", label: "loss" }, { name: "eval_loss", label: "held-out loss", dots: true }], precise),
    seconds: new LineChart("Step time", [{ name: "step_seconds", label: "time" }], seconds, { zero: true }),
    tokens: new LineChart("Tokens per second", [{ name: "speed", label: "tokens/s" }], perSecond, { zero: true }),
    samples: new LineChart("Samples per second", [{ name: "speed", label: "samples/s" }], perSecond, { zero: true }),
    sent: new LineChart("Sent per step", [{ name: "sent_bytes", label: "sent" }], bytes, { zero: true, base: 1024 }),
    norm: new LineChart("Gradient norm", [{ name: "gradient_norm", label: "norm" }], precise, { zero: true }),
  };
  const bars = new MemoryBars();
  const range = el("select", { id: "range", onchange: show },
    ...RANGES.map(([text, steps]) => el("option", { text, value: steps })));
  const grain = el("span", { class: "quiet", role: "status" });
  const problem = el("p", { class: "notice bad", role: "alert" });
  root.append(
    section("Curves",
      el("div", { class: "row" }, el("label", { for: "range", text: "Show" }), range, grain), problem,
      charts.loss.element, el("div", { class: "charts" }, charts.seconds.element, charts.tokens.element, charts.samples.element, charts.sent.element, charts.norm.element)),
    section("Memory by worker", bars.element));

  function show() {
    const steps = Number(range.value);
    const from = steps ? Math.max(0, series.last - steps) : 0;
    const points = (name) => series.points(name, from);
    charts.loss.show({ loss: points("loss"), eval_loss: points("eval_loss") });
    charts.seconds.show({ step_seconds: points("step_seconds") });
    charts.sent.show({ sent_bytes: points("sent_bytes") });
    for (const unit of ["tokens", "samples"]) {
      const amount = perStep(unit);
      charts[unit].element.hidden = !amount;
      if (!amount) continue;
      const speed = (value) => (value > 0 ? amount / value : 0);
      charts[unit].show({ speed: points("step_seconds").filter(({ low }) => low > 0)
        .map((point) => ({ ...point, low: speed(point.high), high: speed(point.low), mean: speed(point.mean) })) });
    }
    const norms = points("gradient_norm");
    charts.norm.element.hidden = !norms.length;
    charts.norm.show({ gradient_norm: norms });
    grain.textContent = series.width > 1 ? `each point is ${count(series.width)} steps: mean, least and greatest` : "";
  }

  async function load() {
    try {
      await series.load();
      problem.textContent = "";
      show();
    } catch (error) {
      problem.textContent = `The curves can't be read: ${error.message}`;
    }
  }

  const memory = () => bars.show(jobs.get(id)?.workers ?? []);
  load();
  memory();
  return {
    series,
    update(changes) {
      if (changes.has("open")) load();
      const mine = (changes.get("metrics") ?? []).filter((metric) => metric.job === id);
      if (mine.length) {
        if (series.loading) series.loading.then(() => series.add(mine) ? show() : load());
        else if (series.add(mine)) show();
        else load();
      }
      if (["pulse", "worker", "job"].some((kind) => changes.has(kind))) memory();
    },
    close() {
      for (const chart of Object.values(charts)) chart.close();
    },
  };
}
