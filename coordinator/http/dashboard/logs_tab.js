// What happened to a job and what its workers had to say, in one column each.

import { jobPath, read } from "./api.js";
import { el, section } from "./dom.js";
import { clock } from "./format.js";
import { command } from "./submit_page.js";
import { Story } from "./story.js";

const NEWEST = 1000;

export function logsTab(root, id) {
  const story = new Story(`What happened to ${id}`, { withJob: false });
  const lines = el("ol", { class: "log", tabindex: "0", "aria-label": "Log lines", role: "log" });
  const empty = el("p", { class: "quiet", text: "Workers have said nothing." });
  let lastEvent = 0;
  let lastLine = 0;
  root.append(
    section("What happened", story.element),
    section("Logs", lines, empty),
    section("By command",
      command(`fusion logs ${id} -f`, "follow the logs"),
      command(`fusion job ${id} --timeline trace.json`, "write the pipeline's timeline for Perfetto"),
      command(`fusion checkpoint get ${id} -o model.safetensors`, "get the checkpoint")));

  function tell(events) {
    const fresh = events.filter((event) => event.job === id && event.seq > lastEvent);
    if (!fresh.length) return;
    lastEvent = fresh[fresh.length - 1].seq;
    story.add(fresh);
  }

  function log(found) {
    for (const line of found) {
      if (line.job !== id || line.seq <= lastLine) continue;
      lastLine = line.seq;
      lines.append(el("li", {}, el("time", { text: clock(line.time) }), el("span", { class: "kind", text: line.worker }), el("pre", { text: line.message })));
    }
    while (lines.children.length > NEWEST) lines.firstChild.remove();
    empty.hidden = lines.children.length > 0;
  }

  async function load() {
    const [told, logged] = await Promise.all([
      read(jobPath(id, `events?after=${lastEvent}&newest=${NEWEST}`)), read(jobPath(id, `logs?after=${lastLine}&newest=${NEWEST}`)),
    ]);
    tell(told.events);
    log(logged.logs);
  }

  load().catch((error) => { empty.textContent = `The logs can't be read: ${error.message}`; });
  return {
    update(changes) {
      if (changes.has("open")) load().catch(() => {});
      else {
        tell(changes.get("event") ?? []);
        log(changes.get("log") ?? []);
      }
    },
  };
}
