// The operator's token, kept in this page's memory only, and what it lets a person do: submit and cancel jobs, drain workers.

import { ApiError, write } from "./api.js";
import { el } from "./dom.js";

let token = null;
const button = document.getElementById("operator");

function mark() {
  button.textContent = token ? "Operator: forget token" : "Operator";
  button.setAttribute("aria-pressed", String(token !== null));
}

function forget() {
  token = null;
  mark();
}

// A modal question; resolves to what `answer` returns when it is agreed to, and to null when not.
function ask(title, agree, answer, ...content) {
  return new Promise((resolve) => {
    const say = (value) => {
      dialog.close();
      dialog.remove();
      resolve(value);
    };
    const form = el("form", {},
      el("h2", { text: title, id: "dialog-title" }), ...content,
      el("div", { class: "row end" },
        el("button", { type: "button", text: "Not now", onclick: () => say(null) }),
        el("button", { type: "submit", class: "primary", text: agree })));
    const dialog = el("dialog", { "aria-labelledby": "dialog-title" }, form);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      say(answer());
    });
    dialog.addEventListener("cancel", () => say(null));
    document.body.append(dialog);
    dialog.showModal();
  });
}

async function askForToken(why) {
  const input = el("input", { type: "password", autocomplete: "off", required: true, id: "token" });
  const given = await ask("Operator's token", "Use it", () => input.value.trim(),
    el("p", { text: why }),
    el("label", { for: "token", text: "Token" }), input,
    el("p", { class: "quiet" }, "It stays in this page's memory until the page is closed. ", el("code", { text: "fusion coordinator" }),
      " prints where the token is kept; ", el("code", { text: "fusion token create --role operator" }), " makes another."));
  if (given) {
    token = given;
    mark();
  }
  return given;
}

// Asks whether to, does it, and shows in `notice` what came of it. Resolves to the answer, or to null.
export async function act(title, text, agree, path, notice, body = undefined) {
  const agreed = await ask(title, agree, () => true, el("p", { text }));
  if (!agreed) return null;
  if (!token && !(await askForToken("Changing something needs the operator's token."))) return null;
  try {
    const answer = await write(path, token, body);
    notice(`${title}: asked for.`, true);
    return answer;
  } catch (error) {
    if (error instanceof ApiError && (error.status === 401 || error.status === 403)) forget();
    notice(`${title}: ${error.message}`, false);
    return null;
  }
}

// A line below which actions say how they went.
export function noticeLine() {
  const line = el("p", { class: "notice", role: "alert" });
  return [line, (text, good) => {
    line.textContent = text;
    line.className = `notice ${good ? "good" : "bad"}`;
  }];
}

button.addEventListener("click", () => {
  if (token) forget();
  else askForToken("With it this page can submit and cancel jobs and drain workers.");
});
mark();
