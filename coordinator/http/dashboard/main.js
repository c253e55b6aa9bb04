// Starts the stream and shows the page that the address names: `#/`, `#/jobs`, `#/job/ID/TAB`, `#/events`, `#/submit`.

import { setClass, setText } from "./dom.js";
import { eventsPage } from "./events_page.js";
import { jobPage } from "./job_page.js";
import { jobsPage } from "./jobs_page.js";
import { Live } from "./live.js";
import "./operator.js";
import { poolPage } from "./pool_page.js";
import { hear, listen } from "./state.js";
import { submitPage } from "./submit_page.js";

const PAGES = { "": poolPage, jobs: jobsPage, job: jobPage, events: eventsPage, submit: submitPage };
const main = document.getElementById("main");
let close = () => {};

function route() {
  if (location.hash === "#main") return; // the skip link
  const [name, ...rest] = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  const make = PAGES[name] ?? poolPage;
  close();
  main.replaceChildren();
  // A page is { title, update(changes), close() } and fills `main` itself.
  const page = make(main, ...rest);
  const stop = listen((changes) => page.update?.(changes));
  close = () => {
    stop();
    page.close?.();
  };
  document.title = `${page.title} · Fusion`;
  const here = name === "job" ? "#/jobs" : `#/${name}`;
  for (const link of document.querySelectorAll("header nav a")) {
    if (link.getAttribute("href") === here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

addEventListener("hashchange", () => {
  route();
  if (location.hash !== "#main") scrollTo(0, 0);
});
route();

// How the connection does, and why the coordinator can't record what happens, if so: what is shown is old then.
let connection = { text: "", good: true };
let unwritten = null;

function showConnection() {
  const shown = document.getElementById("connection");
  const good = connection.good && !unwritten;
  setText(shown, connection.good && unwritten ? `nothing can be recorded: ${unwritten}` : connection.text);
  setClass(shown, `pill ${good ? "good" : "bad"}`);
  document.body.classList.toggle("stale", !good);
}

new Live(hear, (text, good) => {
  connection = { text, good };
  showConnection();
});
listen((changes) => {
  if (!changes.has("pulse")) return;
  unwritten = changes.get("pulse").at(-1).unwritten;
  showConnection();
});

fetch("/healthz").then((answer) => answer.json()).then((health) => {
  document.getElementById("version").textContent = `Fusion ${health.version}`;
}, () => {});
