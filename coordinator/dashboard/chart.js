// The loss curve of one job, redrawn at most a few times a second however fast the steps come.

const REDRAW_MILLISECONDS = 250;

export class LossChart {
  constructor(element) {
    this.element = element;
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.dark.addEventListener("change", () => this.#soon());
    this.timer = null;
    this.clear();
  }

  clear() {
    this.steps = [];
    this.losses = [];
    this.evalSteps = [];
    this.evalLosses = [];
    this.#soon();
  }

  // Steps that are there already (a reconnect tells them again) are left alone.
  add(metric) {
    if (this.steps.length && metric.step <= this.steps[this.steps.length - 1]) return;
    this.steps.push(metric.step);
    this.losses.push(metric.loss);
    if (metric.eval_loss !== undefined && metric.eval_loss !== null) {
      this.evalSteps.push(metric.step);
      this.evalLosses.push(metric.eval_loss);
    }
    this.#soon();
  }

  get last() {
    return this.steps.length ? this.steps[this.steps.length - 1] : 0;
  }

  #soon() {
    this.timer ??= setTimeout(() => {
      this.timer = null;
      this.#draw();
    }, REDRAW_MILLISECONDS);
  }

  #draw() {
    if (!window.Plotly) {
      this.element.textContent = "The chart library did not load; the numbers above are live all the same.";
      return;
    }
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const line = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line") };
    const traces = [
      { x: this.steps, y: this.losses, name: "loss", mode: this.steps.length < 2 ? "markers" : "lines", line: { color: colour("--accent"), width: 2 } },
    ];
    if (this.evalSteps.length) {
      traces.push({ x: this.evalSteps, y: this.evalLosses, name: "held-out loss", mode: "lines+markers", line: { color: colour("--warn"), dash: "dot" } });
    }
    const layout = {
      margin: { l: 52, r: 12, t: 8, b: 40 },
      paper_bgcolor: "transparent",
      plot_bgcolor: "transparent",
      font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 12 },
      xaxis: { title: { text: "step" }, ...line },
      yaxis: { title: { text: "loss" }, ...line },
      showlegend: this.evalSteps.length > 0,
      legend: { orientation: "h", y: 1.05, x: 1, xanchor: "right" },
      hovermode: "x unified",
      hoverlabel: { bgcolor: colour("--card"), font: { color: colour("--ink") } },
    };
    window.Plotly.react(this.element, traces, layout, { displayModeBar: false, responsive: true });
  }
}
