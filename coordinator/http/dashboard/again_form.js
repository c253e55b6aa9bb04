// Submits a job whose model the coordinator has already, with other settings: no code of the model is needed for that.

import { jobPath, read } from "./api.js";
import { el } from "./dom.js";
import { act, noticeLine } from "./operator.js";
import { jobs } from "./state.js";

export class AgainForm {
  constructor() {
    this.job = el("select", { id: "again-job", onchange: () => this.load() });
    this.after = el("select", { id: "again-after" });
    this.settings = el("textarea", { id: "again-settings", rows: "16", spellcheck: "false" });
    const [notice, say] = noticeLine();
    this.say = say;
    this.none = el("p", { class: "quiet", text: "Once a job has been submitted, it can be submitted again from here." });
    this.form = el("form", {},
      el("label", { for: "again-job", text: "Model and data of" }), this.job,
      el("label", { for: "again-after", text: "Begin" }), this.after,
      el("label", { for: "again-settings", text: "Settings" }), this.settings,
      el("div", { class: "row" }, el("button", { type: "submit", class: "primary", text: "Submit…" })), notice);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.element = el("div", {}, this.none, this.form);
    this.update();
  }

  update() {
    const known = new Set([...this.job.options].map((option) => option.value));
    for (const id of jobs.keys()) if (!known.has(id)) this.job.prepend(el("option", { value: id, text: id }));
    this.none.hidden = jobs.size > 0;
    this.form.hidden = jobs.size === 0;
    if (jobs.size > 0 && known.size === 0) {
      this.job.selectedIndex = 0;
      this.load();
    }
  }

  async load() {
    const id = this.job.value;
    try {
      const [settings, kept] = await Promise.all([read(jobPath(id, "settings")), read(jobPath(id, "checkpoints"))]);
      if (id !== this.job.value) return;
      this.settings.value = JSON.stringify(settings, null, 2);
      const steps = kept.checkpoints.map((each) => each.step).reverse();
      this.after.replaceChildren(
        el("option", { value: "", text: "from the start" }),
        ...steps.map((step) => el("option", { value: String(step), text: `after step ${step}` })));
      this.say("", true);
    } catch (error) {
      this.say(`${id}: ${error.message}`, false);
    }
  }

  async submit() {
    let settings;
    try {
      settings = JSON.parse(this.settings.value);
    } catch (error) {
      this.say(`The settings are not JSON: ${error.message}`, false);
      return;
    }
    const after = this.after.value === "" ? null : Number(this.after.value);
    const made = await act(`Submit ${this.job.value} again`, "A new job with these settings is queued.", "Submit the job",
      jobPath(this.job.value, "again"), this.say, { settings, after });
    if (made) location.hash = `#/job/${encodeURIComponent(made.id)}`;
  }
}
