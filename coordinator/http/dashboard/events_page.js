// Everything that happened in the pool, to be narrowed down by words or to what went wrong.

import { el, section } from "./dom.js";
import { plural } from "./format.js";
import { events, STORY_LENGTH } from "./state.js";
import { Story, tone } from "./story.js";

export function eventsPage(main) {
  const story = new Story("What happened", { length: STORY_LENGTH });
  const search = el("input", { type: "search", placeholder: "words, a worker, a job", autocomplete: "off", id: "words", oninput: show });
  const trouble = el("input", { type: "checkbox", id: "trouble", onchange: show });
  const found = el("span", { class: "quiet", role: "status" });

  const wanted = (event) => {
    const text = `${event.event} ${event.message} ${event.job ?? ""}`.toLowerCase();
    return (!trouble.checked || ["bad", "warn"].includes(tone(event))) &&
      search.value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
  };

  function show() {
    story.clear(trouble.checked || search.value.trim() ? "Nothing that fits." : undefined);
    const shown = events.filter(wanted);
    story.add(shown);
    found.textContent = plural(shown.length, "event");
  }

  main.append(section("What happened",
    el("div", { class: "row" },
      el("label", { for: "words", text: "Show" }), search,
      el("label", { class: "check" }, trouble, " trouble only"), found),
    story.element));
  show();
  return {
    title: "Events",
    update(changes) {
      if (changes.has("event")) {
        story.add(changes.get("event").filter(wanted));
        found.textContent = plural(events.filter(wanted).length, "event");
      }
    },
  };
}
